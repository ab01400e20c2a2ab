"""The parts of a run: one exact update, the loop around it, a polite stop."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.errors import DivergedError, TargetError
from lorakit.models.load import load_model
from lorakit.models.patch import packed
from lorakit.models.sources import locate
from lorakit.ops.loss import IGNORE
from lorakit.training.loop import Hooks, Plan, fit
from lorakit.training.optim import adamw
from lorakit.training.order import Grouping, updates
from lorakit.training.signals import StopRequest
from lorakit.training.step import check_gradients_arrive, train_step

RATE = 0.1
NO_CLIP = 1e9


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> PreTrainedModel:
    """In float64, with an adapter whose B is not zero, so that A gets gradients, too."""
    model = load_model(locate(str(tiny_llama)), precision="fp32").double()
    add_lora_to_model(model, r=4, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in adapter_layers(model).values():
        B = layer.adapter("default").lora_B
        adapter = layer.adapter("default").double()
        adapter.lora_B.data = 0.1 * torch.randn(B.shape, generator=generator, dtype=torch.float64)
    return model.train()


@pytest.fixture
def model(base: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(base)


def random_rows(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = tuple(rng.randrange(384) for _ in range(rng.randint(3, 20)))
        rows.append(Row(ids, (IGNORE, *(i if rng.random() < 0.6 else IGNORE for i in ids[1:-1]), ids[-1])))
    return rows


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def padded(rows: Sequence[Row]) -> Batch:
    return pad(rows, pad_id=2)


def one_step(
    base: PreTrainedModel, batches: Sequence[Batch], max_grad_norm: float = NO_CLIP
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, norm and the gradient that plain SGD followed, on a copy of the model."""
    model = copy.deepcopy(base)
    before = values(model)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=RATE)
    result = train_step(model, batches, optimizer, max_grad_norm)
    gradients = {name: (before[name] - p.detach()) / RATE for name, p in trainable(model).items()}
    assert all(p.grad is None for p in model.parameters())
    return result.loss, result.grad_norm, gradients


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


class TestStep:
    @pytest.mark.parametrize("seed", range(3))
    def test_batching_does_not_change_the_gradient(self, base: PreTrainedModel, seed: int) -> None:
        rows = random_rows(4, seed)
        ways: dict[str, Callable[[], tuple[float, float, dict[str, Tensor]]]] = {
            "one padded": lambda: one_step(base, [padded(rows)]),
            "four of one": lambda: one_step(base, [padded([row]) for row in rows]),
            "three and one": lambda: one_step(base, [padded(rows[:3]), padded(rows[3:])]),
        }
        got = {name: way() for name, way in ways.items()}
        with packed(base):
            got["one packed"] = one_step(base, [pack(rows)])
            got["two packed"] = one_step(base, [pack(rows[:2]), pack(rows[2:])])
        loss, norm, gradients = got["one padded"]
        assert norm > 1e-3
        for name, (other_loss, other_norm, other) in got.items():
            assert other_loss == pytest.approx(loss, rel=1e-9), name
            assert other_norm == pytest.approx(norm, rel=1e-9), name
            for key, gradient in gradients.items():
                torch.testing.assert_close(other[key], gradient, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")

    def test_the_loss_is_the_mean_over_all_labelled_tokens(self, base: PreTrainedModel) -> None:
        rows = random_rows(3, seed=7)
        total, count = 0.0, 0
        with torch.no_grad():
            for row in rows:
                logits = base(torch.tensor([row.ids])).logits[0].log_softmax(-1)
                for t, label in enumerate(row.labels[1:]):
                    if label != IGNORE:
                        total, count = total - float(logits[t, label]), count + 1
        loss, _, _ = one_step(base, [padded([row]) for row in rows])
        assert loss == pytest.approx(total / count, rel=1e-12)

    @pytest.mark.parametrize("share", [0.5, 2.0])
    def test_clipping_goes_by_the_norm_over_all_parameters(self, base: PreTrainedModel, share: float) -> None:
        batches = [padded(random_rows(4))]
        _, norm, free = one_step(base, batches)
        assert norm == pytest.approx(norm_of(free), rel=1e-9)
        _, reported, clipped = one_step(base, batches, max_grad_norm=share * norm)
        assert reported == pytest.approx(norm, rel=1e-12)
        assert norm_of(clipped) == pytest.approx(min(share, 1.0) * norm, rel=1e-5)
        factor = min(share, 1.0)
        for name, gradient in free.items():
            torch.testing.assert_close(clipped[name], factor * gradient, rtol=1e-5, atol=1e-9)

    def test_adamw_takes_all_that_is_trainable(self, model: PreTrainedModel) -> None:
        optimizer = adamw(model, rate=0.5, betas=(0.8, 0.9), epsilon=1e-6, weight_decay=0.1)
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in trainable(model).values()}
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
            0.5,
            (0.8, 0.9),
            1e-6,
            0.1,
        )

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_nothing_is_updated_when_the_loss_is_not_finite(
        self, model: PreTrainedModel, poison: float
    ) -> None:
        optimizer = adamw(model, rate=0.1, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.1)
        train_step(model, [padded(random_rows(2))], optimizer, 1.0)
        next(iter(trainable(model).values())).data[0, 0] = poison
        before, steps = values(model), optimizer.state_dict()["state"][0]["step"].clone()
        with pytest.raises(DivergedError, match="training has diverged, nothing was updated") as caught:
            train_step(model, [padded(random_rows(2))], optimizer, 1.0)
        assert caught.value.exit_code == 5
        assert optimizer.state_dict()["state"][0]["step"] == steps
        for name, value in values(model).items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)

    def test_an_endless_rate_stops_the_run_at_the_next_update(self, model: PreTrainedModel) -> None:
        optimizer = adamw(model, rate=math.inf, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)
        with pytest.raises(DivergedError):
            for _ in range(2):
                train_step(model, [padded(random_rows(2))], optimizer, 1.0)

    def test_an_infinite_gradient_of_a_finite_loss_is_caught(self, base: PreTrainedModel) -> None:
        model = copy.deepcopy(base)
        for parameter in trainable(model).values():
            parameter.register_hook(lambda gradient: gradient * math.inf)
        before = values(model)
        with pytest.raises(DivergedError, match=r"loss [0-9.]+ and gradient norm (inf|nan)"):
            train_step(model, [padded(random_rows(2))], torch.optim.SGD(trainable(model).values(), lr=1), 1.0)
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())


class TestGradientsArrive:
    def test_all_is_well(self, model: PreTrainedModel) -> None:
        check_gradients_arrive(model, padded(random_rows(1)))
        assert all(p.grad is None for p in model.parameters())

    def test_modules_that_are_not_used_are_named(self, model: PreTrainedModel) -> None:
        model.spare = nn.Linear(2, 2, dtype=torch.float64)
        with pytest.raises(TargetError, match="2 trainable tensors get no gradient") as caught:
            check_gradients_arrive(model, padded(random_rows(1)))
        assert "spare.weight, spare.bias" in caught.value.message
        assert all(p.grad is None for p in model.parameters())


def plan(**changes: Any) -> Plan:
    numbers: dict[str, Any] = {
        "steps": 6, "grouping": Grouping(2, 2), "updates_per_epoch": 3, "schedule": "linear",
        "learning_rate": 1e-3, "warmup": 2, "max_grad_norm": 1.0, "seed": 3, "logging_steps": 4,
        "save_steps": 2,
    }  # fmt: skip
    return Plan(**numbers | changes)


class Told:
    """What the loop told its hooks."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.logs: list[dict[str, float]] = []
        self.saves: list[int] = []

    def hooks(self, at_step: Callable[[int], object] = lambda step: None) -> Hooks:
        def on_step(step: int, loss: float) -> None:
            self.steps.append(step)
            self.losses.append(loss)
            at_step(step)

        return Hooks(on_step=on_step, on_log=self.logs.append, on_save=self.saves.append)


class TestLoop:
    def test_a_whole_run(self, model: PreTrainedModel) -> None:
        rows, told, numbers = random_rows(10), Told(), plan()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=9.0)
        sizes: list[int] = []

        def collate(chosen: Sequence[Row]) -> Batch:
            sizes.append(len(chosen))
            return padded(chosen)

        assert fit(model, rows, optimizer, numbers, collate=collate, hooks=told.hooks()) is None
        assert told.steps == [1, 2, 3, 4, 5, 6]
        assert sizes == [2, 2, 2, 2, 2] * 2  # ten rows make updates of 4, 4 and 2
        assert told.saves == [2, 4]  # the last step is saved by who called
        assert [entry["step"] for entry in told.logs] == [4, 6]
        first, last = told.logs
        assert first["loss"] == pytest.approx(sum(told.losses[:4]) / 4, rel=1e-12)
        assert last["loss"] == pytest.approx(sum(told.losses[4:]) / 2, rel=1e-12)
        assert (first["learning_rate"], last["learning_rate"]) == (numbers.rate(3), numbers.rate(5))
        assert optimizer.param_groups[0]["lr"] == numbers.rate(5) == pytest.approx(0.25e-3)
        lengths = [
            [len(rows[i].ids) for batch in update for i in batch]
            for update in updates([1] * 10, Grouping(2, 2), 6, seed=3)
        ]
        assert (first["tokens"], last["tokens"]) == (sum(map(sum, lengths[:4])), sum(map(sum, lengths)))
        assert (first["epoch"], last["epoch"]) == (pytest.approx(4 / 3, abs=1e-4), 2.0)
        assert last["grad_norm"] > 0 and last["tokens_per_second"] > 0 and last["memory_gb"] > 0

    def test_a_signal_ends_it_after_the_update(self, model: PreTrainedModel) -> None:
        told = Told()

        def at_step(step: int) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        stopped = fit(
            model, random_rows(8), optimizer, plan(steps=50), collate=padded, hooks=told.hooks(at_step)
        )
        assert stopped == signal.SIGINT
        assert told.steps == [1, 2, 3]
        assert told.logs[-1]["step"] == 3


class TestStopRequest:
    @pytest.fixture(autouse=True)
    def handlers(self) -> Iterator[None]:
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        yield
        assert {s: signal.getsignal(s) for s in before} == before

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_the_first_signal_is_noted(self, signum: signal.Signals) -> None:
        with StopRequest() as stop:
            assert stop.signum is None
            os.kill(os.getpid(), signum)
            assert stop.signum == signum

    def test_the_second_one_acts_as_usual(self) -> None:
        with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT
            os.kill(os.getpid(), signal.SIGINT)

    def test_outside_the_main_thread_nothing_is_changed(self) -> None:
        seen: list[object] = []

        def use() -> None:
            with StopRequest() as stop:
                seen.extend([stop.signum, signal.getsignal(signal.SIGINT)])

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        assert seen == [None, signal.getsignal(signal.SIGINT)]

    def test_a_second_sigterm_kills(self) -> None:
        program = (
            "import os, signal\n"
            "from lorakit.training.signals import StopRequest\n"
            "with StopRequest() as stop:\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    print(stop.signum, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "15\n", "")
