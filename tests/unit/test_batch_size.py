"""The batch size that is found keeps to its bound in real training, and finding it leaves no trace."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import hardware
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.data.collate import pack
from lorakit.data.encode import Row
from lorakit.data.order import Grouping
from lorakit.errors import MemoryLimitError, UsageError
from lorakit.evals import batch_size
from lorakit.evals.batch_size import find_optimal_batch_size, longest_rows, same_update
from lorakit.evals.objective import batch_loss
from lorakit.models.patch import packed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tries are forked")
MEGABYTE = 2**20


class Hungry(nn.Module):
    """A model that takes ``megabytes`` for every row and, if it is told to, ends badly at some size."""

    def __init__(self, megabytes: int, *, worst: int = 1000, end: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.size, self.worst, self.end = megabytes * MEGABYTE // 4, worst, end

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= self.worst:
            self.end()
        return x * self.weight

    def batch(self, rows: int) -> Tensor:
        return torch.ones(rows, self.size)


class Fickle(nn.Module):
    """Every kind of state that a step changes: weights, buffers, modes, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))
        self.layers[2].eval()

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        return self.layers(self.frozen(x + torch.rand_like(x)))


def llama(**sizes: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=None, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def state_of(model: nn.Module) -> list[Any]:
    """All that a step could change, as values to compare."""
    return [
        *[value.clone() for value in model.state_dict().values()],
        *[p.grad.clone() for p in model.parameters() if p.grad is not None],
        torch.random.get_rng_state(),
        torch.tensor([hash(random.getstate())]),
        torch.tensor([module.training for module in model.modules()]),
        torch.tensor([p.requires_grad for p in model.parameters()]),
    ]


class TestSearch:
    @given(most=st.integers(1, 200), limit=st.integers(0, 250))
    def test_finds_the_largest(self, most: int, limit: int) -> None:
        tried: list[int] = []

        def fits(size: int) -> bool:
            tried.append(size)
            return size <= limit

        assert batch_size._largest(fits, most) == min(most, limit)
        assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1
        assert all(1 <= size <= most for size in tried)
        assert max(tried) <= max(1, 2 * limit)  # never much more than what fits

    @given(rows=st.integers(1, 300), most=st.integers(1, 400))
    def test_an_update_keeps_its_rows(self, rows: int, most: int) -> None:
        size, count = same_update(rows, most)
        assert size * count == rows
        assert size <= most
        assert not any(rows % larger == 0 for larger in range(size + 1, min(rows, most) + 1))


class TestLongestRows:
    def test_padded(self) -> None:
        lengths = random.Random(3).sample(range(1, 99), 20)
        chosen = longest_rows(lengths, Grouping(size=1, accumulation=1), 5)
        assert [lengths[i] for i in chosen] == sorted(lengths, reverse=True)[:5]

    def test_packed(self) -> None:
        lengths = random.Random(4).sample(range(1, 61), 40)
        chosen = longest_rows(lengths, Grouping(size=1, accumulation=1, capacity=64), 3)
        assert len(chosen) == len(set(chosen))
        assert {0, 1, 2} <= {sorted(lengths, reverse=True).index(lengths[i]) for i in chosen}
        assert sum(lengths[i] for i in chosen) <= 3 * 64

    @pytest.mark.parametrize("capacity", [None, 10])
    def test_too_few(self, capacity: int | None) -> None:
        assert longest_rows([9, 7], Grouping(size=1, accumulation=1, capacity=capacity), 5) == [0, 1, 0, 1, 0]


class TestMemory:
    def test_a_bound_is_honoured_by_real_training(self) -> None:
        """In a process of its own: what three real steps take, of the size found and of three times as many."""
        program = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from lorakit import hardware
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.evals.batch_size import find_optimal_batch_size

model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=128, intermediate_size=256,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, pad_token_id=None)).requires_grad_(False)
attach(model, LoRAConfig(r=8), seed=0)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
limit = hardware.resident() + 200e6
found = find_optimal_batch_size(model, limit / 1e9, seq_len=256)

def train(rows):
    for _ in range(3):
        ids = torch.randint(4096, (rows, 256))
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return hardware.resident_peak()

print(json.dumps([found, limit, train(found), train(3 * found)]))
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        found, limit, peak, more = json.loads(done.stdout)
        assert 2 < found < 40
        assert peak < 1.1 * limit, (found, peak / limit)
        assert more > limit

    def test_a_peak_of_the_past_does_not_count(self) -> None:
        held = torch.ones(400 * MEGABYTE // 4)
        del held
        model = Hungry(4)
        limit = hardware.resident() + 150 * MEGABYTE
        found = find_optimal_batch_size(model, limit / 1e9, make_batch=model.batch)
        assert 1 < found < 150 / 4 / 3

    def test_all_of_it_fits(self) -> None:
        model = Hungry(0)
        assert find_optimal_batch_size(model, make_batch=lambda n: torch.ones(n, 2), max_batch_size=11) == 11

    def test_not_even_one_row_fits(self) -> None:
        model = Hungry(1)
        with pytest.raises(MemoryLimitError, match=r"a single row takes more than 0\.00 GB"):
            find_optimal_batch_size(model, 0.001, make_batch=model.batch)

    def test_what_the_machine_has_bounds_it_all(self) -> None:
        free = hardware.resident_limit() - hardware.resident()
        assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    @pytest.mark.parametrize("kind", ["allocator", "python", "kernel"])
    def test_running_out_of_memory_is_an_answer(self, kind: str) -> None:
        def no_more() -> None:
            if kind == "allocator":
                torch.empty(2**56)
            if kind == "python":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGKILL)

        model = Hungry(0, worst=6, end=no_more)
        assert find_optimal_batch_size(model, make_batch=lambda n: torch.ones(n, 2)) == 5


class TestNoTrace:
    def model(self) -> Fickle:
        torch.manual_seed(1)
        model = Fickle()
        for parameter in model.layers.parameters():
            parameter.grad = torch.randn_like(parameter)
        return model

    def check(self, run: Callable[[nn.Module], object]) -> None:
        model = self.model()
        optimizer = torch.optim.AdamW(model.layers.parameters())
        optimizer.step()
        identities = [(id(p), id(p.grad)) for p in model.parameters()]
        before, moments = state_of(model), [v.clone() for s in optimizer.state.values() for v in s.values()]
        run(model)
        assert all(torch.equal(*pair) for pair in zip(state_of(model), before, strict=True))
        assert [(id(p), id(p.grad)) for p in model.parameters()] == identities
        after = [v for s in optimizer.state.values() for v in s.values()]
        assert all(map(torch.equal, after, moments))

    def test_of_forked_tries(self) -> None:
        self.check(
            lambda m: find_optimal_batch_size(m, make_batch=lambda n: torch.randn(n + 1, 6), max_batch_size=3)
        )

    def test_of_tries_in_this_process(self) -> None:
        """What a GPU needs, on a CPU."""

        def run(model: nn.Module) -> None:
            step = batch_size._Step(model, lambda rows: torch.randn(rows, 6), batch_size._own_loss)
            before = state_of(model)
            with batch_size._untouched(model):
                step(4)
                changed = [not torch.equal(*pair) for pair in zip(state_of(model), before, strict=True)]
            assert sum(changed) > 8

        self.check(run)

    def test_of_a_try_that_fails(self) -> None:
        def run(model: nn.Module) -> None:
            step = batch_size._Step(model, lambda rows: torch.randn(rows, 7), batch_size._own_loss)
            with pytest.raises(RuntimeError, match="shapes"), batch_size._untouched(model):
                step(4)

        self.check(run)

    def test_of_processes(self) -> None:
        threads = threading.active_count()
        find_optimal_batch_size(Hungry(0), make_batch=lambda n: torch.ones(n, 2), max_batch_size=2)
        assert threading.active_count() == threads
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


class TestModels:
    def test_a_language_model_gets_its_longest_rows(self) -> None:
        seen = []
        for longest, expected in ((40, 40), (5000, 2048)):
            batch = batch_size._random_tokens(llama(max_position_embeddings=longest), None)(3)
            assert batch["input_ids"].shape == (3, expected)
            assert int(batch["input_ids"].max()) < 300
            seen.append(batch["input_ids"])
        assert find_optimal_batch_size(llama(), seq_len=12, max_batch_size=2) == 2

    def test_with_adapters_on_packed_rows(self) -> None:
        model = llama().requires_grad_(False)
        attach(model, LoRAConfig(r=2), seed=0)
        rows = [Row(ids=(1,) * n, labels=(1,) * n) for n in (5, 9, 7, 3)]
        grouping = Grouping(size=1, accumulation=4, capacity=12)
        sizes: list[int] = []

        def make(size: int) -> Any:
            sizes.append(size)
            return pack([rows[i] for i in longest_rows([5, 9, 7, 3], grouping, size)])

        with packed(model):
            make(2)
            assert find_optimal_batch_size(model, make_batch=make, loss_fn=batch_loss, max_batch_size=4) == 4
        assert sizes == [2]  # the tries were elsewhere

    @pytest.mark.parametrize("shape", [dict, tuple])
    def test_any_model(self, shape: type) -> None:
        model = nn.Bilinear(3, 4, 1)

        def make(rows: int) -> Any:
            first, second = torch.randn(rows, 3), torch.randn(rows, 4)
            return {"input1": first, "input2": second} if shape is dict else (first, second)

        assert find_optimal_batch_size(model, make_batch=make, max_batch_size=2) == 2


class TestRefused:
    def test_a_model_without_make_batch(self) -> None:
        with pytest.raises(
            UsageError, match=r"what a batch of Linear looks like is not known\ngive make_batch"
        ):
            find_optimal_batch_size(nn.Linear(2, 2))

    def test_nothing_to_train(self) -> None:
        with pytest.raises(UsageError, match="nothing in the model is trainable"):
            find_optimal_batch_size(
                nn.Linear(2, 2).requires_grad_(False), make_batch=lambda n: torch.ones(n, 2)
            )

    def test_no_size(self) -> None:
        with pytest.raises(UsageError, match="max_batch_size is 0"):
            find_optimal_batch_size(nn.Linear(2, 2), max_batch_size=0, make_batch=lambda n: torch.ones(n, 2))

    def test_another_error_is_told_with_its_text(self) -> None:
        with pytest.raises(UsageError, match="a training step of 1 fails: RuntimeError: mat1 and mat2 shapes"):
            find_optimal_batch_size(nn.Linear(2, 2), make_batch=lambda n: torch.ones(n, 3))

    def test_no_loss(self) -> None:
        with pytest.raises(UsageError, match="ModelError: LlamaModel returns no loss"):
            find_optimal_batch_size(llama().model, make_batch=lambda n: torch.ones(n, 3, dtype=torch.long))

    def test_a_crash(self) -> None:
        model = Hungry(0, worst=2, end=lambda: os._exit(3))
        with pytest.raises(UsageError, match="a training step of 2 fails: its process ended with exit code 3"):
            find_optimal_batch_size(model, make_batch=lambda n: torch.ones(n, 2))

    def test_a_wish_to_stop_ends_a_try_at_once(self) -> None:
        glances = iter(range(4))

        def poll() -> None:
            if next(glances, None) is None:
                raise KeyboardInterrupt

        model = Hungry(0, worst=1, end=threading.Event().wait)
        with pytest.raises(KeyboardInterrupt):
            find_optimal_batch_size(model, make_batch=lambda n: torch.ones(n, 2), poll=poll)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
