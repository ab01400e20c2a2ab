"""Each switch leaves loss and gradients as they are, does what it says, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, ViTConfig, ViTModel

from lorakit.adapters.attach import adapter_layers, attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.errors import ModelError, UsageError
from lorakit.evals.objective import batch_loss
from lorakit.models import memory
from lorakit.models.memory import blocks, offloaded_state, switched
from lorakit.models.patch import packed

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


def model_of(
    kind: str = "llama",
    *,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    targets: str = "all",
    **sizes: Any,
) -> Any:
    """A random model with random adapters, in training mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    attach(model, LoRAConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=targets), seed=0)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.adapter("default").lora_B, std=0.1)
    return model.train()


def rows(*lengths: int) -> list[Row]:
    ids = [tuple(torch.randint(1, 160, (length,)).tolist()) for length in lengths]
    return [Row(ids=row, labels=row) for row in ids]


def gradients(model: PreTrainedModel, batch: Batch, seed: int = 5) -> dict[str, Tensor]:
    """The loss and the gradient of every trainable tensor, from the same random numbers each time."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = batch_loss(model, batch)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 8
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=tolerance * float(expected[name].abs().max())
        )


@contextlib.contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Everything that autograd keeps of what runs inside, one entry each time that it is kept."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def instance_state(model: nn.Module) -> list[dict[str, Any]]:
    return [{k: v for k, v in vars(module).items() if k != "_passes"} for module in model.modules()]


class TestBlocks:
    @pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox", "phi"])
    def test_are_the_layers(self, kind: str) -> None:
        assert len(blocks(model_of(kind))) == 5

    def test_of_a_model_that_does_not_write(self) -> None:
        config = ViTConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32
        )
        assert len(blocks(ViTModel(config))) == 3

    def test_none(self) -> None:
        with pytest.raises(ModelError, match="no repeated blocks are known of Sequential"):
            blocks(nn.Sequential(nn.Linear(2, 2)))


class TestRecomputation:
    @pytest.mark.parametrize("every", [1, 2, 3, 9])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_gives_the_same_bits(self, every: int, dropout: float) -> None:
        model, batch = model_of(dropout=dropout), pad(rows(9, 14, 3), 0)
        expected = gradients(model, batch)
        with switched(model, recompute_every=every):
            assert_same(gradients(model, batch), expected)

    @pytest.mark.parametrize("offload", [False, True])
    def test_of_packed_rows(self, offload: bool) -> None:
        model, batch = model_of(dropout=0.2), pack(rows(9, 14, 3))
        with packed(model):
            expected = gradients(model, batch)
            with switched(model, recompute_every=1, offload=offload):
                assert_same(gradients(model, batch), expected)

    @pytest.mark.parametrize("kind", ["qwen2", "gpt_neox"])
    def test_of_other_families(self, kind: str) -> None:
        model, batch = model_of(kind, dropout=0.1), pad(rows(9, 14, 3), 0)
        expected = gradients(model, batch)
        with switched(model, recompute_every=2):
            assert_same(gradients(model, batch), expected)

    def test_keeps_the_input_of_a_block_and_nothing_else_of_it(self) -> None:
        model, batch = model_of(), pad(rows(11, 8), 0)
        runs: list[int] = []
        hooks = [
            block.mlp.register_forward_pre_hook(lambda *_, n=number: runs.append(n))
            for number, block in enumerate(blocks(model))
        ]
        sizes = {}
        for every in (None, 1, 2):
            runs.clear()
            with switched(model, recompute_every=every), saved_tensors() as kept:
                loss = batch_loss(model, batch)
                sizes[every] = len(kept)
            loss.backward()
            again = [] if every is None else list(range(5))[::every]
            assert sorted(runs) == sorted([*range(5), *again])
        assert sizes[1] < len(hooks) * 4 < sizes[2] < sizes[None]
        for hook in hooks:
            hook.remove()

    def test_offloading_moves_block_inputs_and_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = model_of(), pad(rows(11, 8), 0)
        moved: list[Tensor] = []

        def save_elsewhere(*, pin_memory: bool) -> saved_tensors_hooks:
            def away(tensor: Tensor) -> Tensor:
                moved.append(tensor)
                return tensor.clone()

            return saved_tensors_hooks(away, lambda tensor: tensor)

        expected = gradients(model, batch)
        monkeypatch.setattr(memory, "save_on_cpu", save_elsewhere)
        undo = contextlib.ExitStack()
        for block in blocks(model):
            forward = functools.partial(memory._recompute_from_cpu, block.forward)
            undo.enter_context(memory._with(block, "forward", forward))
        with undo:
            assert_same(gradients(model, batch), expected)
        assert [tuple(tensor.shape) for tensor in moved] == [(2, 11, 32)] * 5

    def test_offloading_says_that_a_cpu_has_no_use_for_it(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "lorakit"), switched(model_of(), recompute_every=1, offload=True):
            pass
        assert "offload_activations: the model is on a CPU" in caplog.text

    def test_evaluation_is_as_ever(self) -> None:
        model, batch = model_of(), pad(rows(11, 8), 0)
        runs: list[int] = []
        blocks(model)[0].mlp.register_forward_hook(lambda *_: runs.append(0))
        with switched(model, recompute_every=1):
            model.eval()
            batch_loss(model, batch).backward()
        assert runs == [0]

    def test_undone(self) -> None:
        model, batch = model_of(), pad(rows(11, 8), 0)
        before = instance_state(model)
        with pytest.raises(ZeroDivisionError), switched(model, recompute_every=1):
            gradients(model, batch)
            raise ZeroDivisionError
        model.zero_grad()
        assert instance_state(model) == before


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and guard as ever, but run what was captured as it is: machine code takes a minute to make."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks, and hides the warning by itself
@pytest.mark.usefixtures("captured")
class TestCompilation:
    def test_serves_all_blocks_and_all_layouts_of_packed_rows(self) -> None:
        model, seen = model_of(dropout=0.3, num_hidden_layers=3, targets="v_proj,down_proj"), []
        with packed(model):
            for lengths in [(5, 7, 9), (12, 3), (20,), (2,) * 9]:
                batch = pack(rows(*lengths))
                expected = gradients(model, batch)
                with switched(model, compiled=True, recompute_every=1):
                    assert_same(gradients(model, batch), expected, tolerance=1e-5)
                seen.append(graphs())
        assert seen[0] > 1
        assert len(set(seen)) == 1, seen

    def test_leaves_evaluation_alone(self) -> None:
        model, batch = model_of(num_hidden_layers=2).eval(), pad(rows(11, 8), 0)
        with switched(model, compiled=True):
            before = graphs()
            batch_loss(model, batch)
            assert graphs() == before

    def test_serves_padded_rows_of_any_length(self) -> None:
        model, seen = model_of(num_hidden_layers=2, targets="v_proj,down_proj"), []
        with switched(model, compiled=True):
            for lengths in [(5, 7, 9), (12, 3), (6, 2, 4, 3)]:
                batch = pad(rows(*lengths), 0)
                found = gradients(model, batch)
                model.eval()
                assert_same(found, gradients(model, batch), tolerance=1e-5)
                model.train()
                seen.append(graphs())
        assert len(set(seen)) == 1, seen


def test_compilation_is_refused_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        raise RuntimeError("no C++ compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    model = model_of(num_hidden_layers=1)
    before = instance_state(model)
    refused = pytest.raises(UsageError, match=r"torch_compile does not work here: .*no C\+\+ compiler here")
    with refused, switched(model, compiled=True):
        pass
    assert instance_state(model) == before


class TestOffloadedState:
    def steps(self, shelf: memory._Shelf | None) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(3)
        weights = [nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(7))]
        optimizer = torch.optim.AdamW(weights, lr=0.1)
        if shelf:
            optimizer.register_step_pre_hook(lambda *_: shelf.bring_back())
            optimizer.register_step_post_hook(lambda changed, *_: shelf.put_away(changed))
        for _ in range(5):
            optimizer.zero_grad()
            sum(weight.square().sum() for weight in weights).backward()
            optimizer.step()
        return weights, [slot for slots in optimizer.state.values() for slot in slots.values()]

    def test_gives_the_same_bits(self) -> None:
        shelf = memory._Shelf()
        weights, state = self.steps(shelf)
        expected, expected_state = self.steps(None)
        assert all(map(torch.equal, weights, expected))
        assert all(map(torch.equal, state, expected_state))
        assert len(shelf._away) == 4  # two moments of two tensors; the counters stay

    def test_says_that_a_cpu_has_no_use_for_it(self, caplog: pytest.LogCaptureFixture) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
        with caplog.at_level(logging.INFO, "lorakit"), offloaded_state(optimizer):
            assert not optimizer._optimizer_step_pre_hooks
        assert "offload_optimizer: the parameters are on a CPU" in caplog.text


def test_autocast_of_a_frozen_base_keeps_casts_of_its_weights() -> None:
    """Why there is no such switch: the numbers are those of a bf16 base, and the backward pass needs more."""
    batch = pad(rows(11, 8), 0)
    losses, copies = [], []
    for dtype in (torch.bfloat16, torch.float32):
        model = model_of(dtype=dtype)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32), saved_tensors() as saved:
            losses.append(batch_loss(model, batch).item())
        kept = {t.untyped_storage().data_ptr(): t for t in saved if t.untyped_storage().data_ptr() not in own}
        shapes = {tuple(layer.weight.shape) for layer in adapter_layers(model).values()}
        copies.append(sum(t.numel() for t in kept.values() if {tuple(t.shape), tuple(t.shape[::-1])} & shapes))
    base = sum(layer.weight.numel() for layer in adapter_layers(model).values())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert copies[0] == 0
    assert copies[1] > 0.9 * base, (copies, base)
