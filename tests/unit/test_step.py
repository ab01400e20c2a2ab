"""One exact update: batching changes nothing, clipping is global, what is not finite moves nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_parts import NO_CLIP, a_copy, adam, adapted, padded, random_rows, sgd, trainable, values
from transformers import PreTrainedModel

from lorakit.adapters.attach import attach, rank_allocator
from lorakit.adapters.spec import LoRAConfig
from lorakit.data.collate import Batch, pack
from lorakit.errors import DivergedError, TargetError
from lorakit.lowrank.budget import RankSchedule
from lorakit.models.load import load_model
from lorakit.models.patch import packed
from lorakit.models.sources import locate
from lorakit.ops.loss import IGNORE
from lorakit.training.scale import LossScale
from lorakit.training.signals import Stopped
from lorakit.training.step import check_gradients_arrive, train_step, try_pass

RATE = 0.1


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> PreTrainedModel:
    return adapted(tiny_llama)


@pytest.fixture
def model(base: PreTrainedModel) -> PreTrainedModel:
    return a_copy(base)


def one_step(
    base: PreTrainedModel,
    batches: Sequence[Batch],
    max_grad_norm: float = NO_CLIP,
    *,
    empty: int = 0,
    scale: LossScale | None = None,
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, norm and the gradient that plain SGD followed, on a copy of the model."""
    model = a_copy(base)
    before = values(model)
    result = train_step(sgd(model, RATE), batches, max_grad_norm, empty=empty, scale=scale)
    gradients = {name: (before[name] - p.detach()) / RATE for name, p in trainable(model).items()}
    assert all(p.grad is None for p in model.parameters())
    return result.loss, result.grad_norm, gradients


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def check_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in values(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


class TestStep:
    @pytest.mark.parametrize("seed", range(3))
    def test_batching_does_not_change_the_gradient(self, base: PreTrainedModel, seed: int) -> None:
        rows = random_rows(4, seed)
        ways: dict[str, Callable[[], tuple[float, float, dict[str, Tensor]]]] = {
            "one padded": lambda: one_step(base, [padded(rows)]),
            "four of one": lambda: one_step(base, [padded([row]) for row in rows]),
            "three and one": lambda: one_step(base, [padded(rows[:3]), padded(rows[3:])]),
            "one that fills up": lambda: one_step(base, [padded(rows), padded(rows[:1])], empty=1),
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

    def test_the_tokens_are_counted_without_padding_and_filling(self, model: PreTrainedModel) -> None:
        rows = random_rows(3)
        batches = [padded(rows[:2]), padded(rows[2:]), padded(rows[:1])]
        result = train_step(sgd(model, RATE), batches, 1.0, empty=1)
        assert result.tokens == sum(len(row.ids) for row in rows)

    def test_polling_after_each_pass_can_leave_without_a_trace(self, model: PreTrainedModel) -> None:
        strategy, passes = sgd(model, RATE), 0
        before = values(model)

        def poll() -> None:
            nonlocal passes
            passes += 1
            if passes == 2:
                raise Stopped(2)

        with pytest.raises(Stopped):
            train_step(strategy, [padded([row]) for row in random_rows(3)], 1.0, poll=poll)
        assert passes == 2
        check_unchanged(model, before)

    def test_a_tried_pass_leaves_no_gradient(self, model: PreTrainedModel) -> None:
        before = values(model)
        try_pass(sgd(model, RATE), padded(random_rows(2)))
        assert all(p.grad is None for p in model.parameters())
        check_unchanged(model, before)

    def test_adalora_pulls_towards_orthogonal_matrices_unseen_by_the_loss(self, tiny_llama: Path) -> None:
        rows = random_rows(2)
        seen = []
        for weight in (0.0, 0.5):
            model = load_model(locate(str(tiny_llama)), precision="fp32")
            schedule = RankSchedule(target_r=2, total_step=100, tinit=10, tfinal=20, orth_reg_weight=weight)
            attach(model, LoRAConfig(4, 8, method="adalora", schedule=schedule), seed=1)
            seen.append(train_step(adam(model), [padded(rows)], 1.0, budget=rank_allocator(model)))
        assert seen[0].loss == seen[1].loss
        assert seen[1].grad_norm > seen[0].grad_norm


class TestNotFinite:
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_nothing_is_updated_when_the_loss_is_not_finite(
        self, model: PreTrainedModel, poison: float
    ) -> None:
        strategy = adam(model)
        train_step(strategy, [padded(random_rows(2))], 1.0)
        next(iter(trainable(model).values())).data[0, 0] = poison
        before, steps = values(model), strategy.optimizer.state_dict()["state"][0]["step"].clone()
        with pytest.raises(DivergedError, match="it has diverged, nothing was updated") as caught:
            train_step(strategy, [padded(random_rows(2))], 1.0, step=2)
        assert "at update 2" in caught.value.message
        assert caught.value.exit_code == 5
        assert strategy.optimizer.state_dict()["state"][0]["step"] == steps
        check_unchanged(model, before)

    def test_an_endless_rate_stops_the_run_at_the_next_update(self, model: PreTrainedModel) -> None:
        strategy = adam(model, rate=math.inf)
        with pytest.raises(DivergedError):
            for _ in range(2):
                train_step(strategy, [padded(random_rows(2))], 1.0)

    def test_an_infinite_gradient_of_a_finite_loss_is_caught_and_can_be_looked_at(
        self, model: PreTrainedModel
    ) -> None:
        name, parameter = next(iter(trainable(model).items()))
        parameter.register_hook(lambda gradient: gradient * math.inf)
        before, strategy = values(model), sgd(model, 1.0)
        with pytest.raises(DivergedError, match=r"loss [0-9.]+ and gradient norm (inf|nan)"):
            train_step(strategy, [padded(random_rows(2))], 1.0)
        check_unchanged(model, before)
        assert [key for key, norm in strategy.norms().items() if not math.isfinite(norm)] == [name]


class TestLossScale:
    @pytest.mark.parametrize("value", [2.0**-3, 2.0**10, 2.0**30])
    def test_a_power_of_two_changes_nothing(self, base: PreTrainedModel, value: float) -> None:
        batches = [padded(random_rows(2)), padded(random_rows(2, seed=1))]
        plain, scaled = (one_step(base, batches, 0.5, scale=scale) for scale in (None, LossScale(value)))
        assert plain[:2] == scaled[:2]
        assert all(torch.equal(plain[2][name], gradient) for name, gradient in scaled[2].items())

    def test_an_overflow_is_not_updated_with(self, model: PreTrainedModel) -> None:
        before = values(model.float())
        with pytest.raises(DivergedError):
            train_step(sgd(model, RATE), [padded(random_rows(2))], 1.0, scale=LossScale(2.0**127))
        check_unchanged(model, before)

    def test_it_halves_and_doubles(self) -> None:
        scale = LossScale(8.0, interval=3)
        assert scale.back_off() and scale.value == 4.0
        for _ in range(3):
            scale.grow()
        assert (scale.value, scale.good) == (8.0, 0)
        scale.grow()
        assert scale.back_off() and (scale.value, scale.good) == (4.0, 0)

    def test_there_is_a_lowest_factor(self) -> None:
        scale = LossScale(1.0)
        tries = 0
        while scale.back_off():
            tries += 1
        assert tries == 10
        assert scale.value == 1.0  # it was not to blame


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
