"""The loop around the updates: what is due when, and what becomes of an update that cannot be made."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_parts import NO_CLIP, a_copy, adapted, padded, random_rows, sgd, values
from transformers import PreTrainedModel

from lorakit.data.collate import Batch
from lorakit.data.encode import Row
from lorakit.data.order import Grouping, Order
from lorakit.errors import DivergedError, MemoryLimitError, StorageError
from lorakit.optim.schedule import Schedule
from lorakit.training.guards import Watch
from lorakit.training.loop import Hooks, Loop, Plan
from lorakit.training.progress import Progress
from lorakit.training.scale import LossScale
from lorakit.training.signals import Stopped, StopRequest


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> PreTrainedModel:
    return adapted(tiny_llama)


@pytest.fixture
def model(base: PreTrainedModel) -> PreTrainedModel:
    return a_copy(base)


def plan(**changes: Any) -> Plan:
    steps = changes.get("steps", 6)
    numbers: dict[str, Any] = {
        "steps": steps, "grouping": Grouping(2, 2), "updates_per_epoch": 3,
        "schedule": Schedule("linear", peak=1e-3, steps=steps, warmup=2), "max_grad_norm": 1.0, "seed": 3,
        "logging_steps": 4, "save_steps": 2,
    }  # fmt: skip
    return Plan(**numbers | changes)


@dataclass
class Told:
    """What the loop told its hooks; the ``at_`` functions may act, or fail, in its name."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    logs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    unfrozen: list[int] = field(default_factory=list)
    at_step: Callable[[int], object] = lambda step: None
    at_save: Callable[[int], object] = lambda step: None
    at_evaluation: Callable[[int], float | None] = lambda step: None
    at_roll_back: Callable[[], None] = lambda: None

    def hooks(self, progress: Progress) -> Hooks:
        def on_step(step: int, loss: float) -> None:
            self.steps.append(step)
            self.losses.append(loss)
            self.at_step(step)

        def save() -> None:
            self.at_save(progress.step)
            self.saves.append(progress.step)

        def evaluate(step: int) -> float | None:
            self.evaluations.append(step)
            return self.at_evaluation(step)

        return Hooks(
            on_step=on_step,
            on_log=self.logs.append,
            on_note=self.notes.append,
            save=save,
            evaluate=evaluate,
            on_refused=self.refused.append,
            roll_back=self.at_roll_back,
            unfreeze=lambda: self.unfrozen.append(progress.step + 1),
        )


def run(
    model: nn.Module,
    told: Told,
    numbers: Plan,
    *,
    rows: Sequence[Row] | None = None,
    progress: Progress | None = None,
    collate: Callable[[Sequence[Row]], Batch] = padded,
    stop: StopRequest | None = None,
) -> Progress:
    progress = progress or Progress()
    Loop(
        sgd(model, 9.0), random_rows(10) if rows is None else rows, numbers, progress,
        collate=collate, hooks=told.hooks(progress), stop=stop or StopRequest(),
    ).run()  # fmt: skip
    return progress


class TestCourse:
    def test_a_whole_run(self, model: PreTrainedModel) -> None:
        rows, told, numbers = random_rows(10), Told(), plan()
        sizes: list[int] = []

        def collate(chosen: Sequence[Row]) -> Batch:
            sizes.append(len(chosen))
            return padded(chosen)

        progress = run(model, told, numbers, rows=rows, collate=collate)
        assert told.steps == [1, 2, 3, 4, 5, 6]
        assert sizes == [2, *[2, 2, 2, 2, 2] * 2]  # the largest is tried; ten rows: updates of 4, 4 and 2
        assert told.saves == [2, 4, 6]
        assert [entry["step"] for entry in told.logs] == [4, 6]
        first, last = told.logs
        assert first["loss"] == pytest.approx(sum(told.losses[:4]) / 4, rel=1e-12)
        assert last["loss"] == pytest.approx(sum(told.losses[4:]) / 2, rel=1e-12)
        rate = numbers.schedule.rate
        assert (first["learning_rate"], last["learning_rate"]) == (rate(3), rate(5))
        assert rate(5) == pytest.approx(0.25e-3)
        order = Order([len(row.ids) for row in rows], numbers.grouping, seed=3)
        tokens = [sum(len(rows[i].ids) for g in order.update(step) for i in g) for step in range(1, 7)]
        assert (first["tokens"], last["tokens"]) == (sum(tokens[:4]), sum(tokens))
        assert (first["epoch"], last["epoch"]) == (pytest.approx(4 / 3, abs=1e-4), 2.0)
        assert last["grad_norm"] > 0 and last["tokens_per_second"] > 0 and last["memory_gb"] > 0
        assert (progress.step, progress.tokens, progress.losses) == (6, sum(tokens), [])
        assert told.notes == []

    def test_the_last_update_is_always_saved_unless_nothing_is(self, model: PreTrainedModel) -> None:
        told = Told()
        run(model, told, plan(steps=3))
        assert told.saves == [2, 3]
        told = Told()
        run(model, told, plan(steps=3, save_steps=None))
        assert told.saves == []

    def test_every_group_learns_at_its_own_multiple(self, model: PreTrainedModel) -> None:
        rates = []
        progress, strategy = Progress(), sgd(model, 9.0)
        strategy.optimizer.param_groups[0]["factor"] = 16.0
        told = Told(at_step=lambda step: rates.append(strategy.optimizer.param_groups[0]["lr"]))
        numbers = plan()
        hooks = told.hooks(progress)
        Loop(
            strategy, random_rows(10), numbers, progress, collate=padded, hooks=hooks, stop=StopRequest()
        ).run()
        assert rates == [16.0 * numbers.schedule.rate(step) for step in range(6)]

    def test_a_second_stage_is_told_before_its_updates(self, model: PreTrainedModel) -> None:
        told = Told()
        run(model, told, plan(unfreeze_after=4))
        assert told.unfrozen == [5, 6]

    def test_the_first_update_is_logged_if_wanted(self, model: PreTrainedModel) -> None:
        told = Told()
        run(model, told, plan(log_first=True))
        assert [entry["step"] for entry in told.logs] == [1, 4, 6]


class TestEvaluation:
    def test_when(self, model: PreTrainedModel) -> None:
        told = Told()
        progress = run(model, told, plan(eval_steps=2, first_eval=3))
        assert told.evaluations == [4, 6]
        assert (progress.evaluated, progress.best) == (6, None)

    @pytest.mark.parametrize(
        ("higher", "scores"), [(False, [5.0, 4.0, 4.0, 4.5, 1.0]), (True, [1.0, 2.0, 2.0, 1.5, 9.0])]
    )
    def test_a_run_that_stands_still_ends_with_its_best_known(
        self, model: PreTrainedModel, higher: bool, scores: list[float]
    ) -> None:
        told = Told(at_evaluation=lambda step: scores[step - 1])
        numbers = plan(eval_steps=1, patience=2, higher_is_better=higher, keep_best=True, save_steps=10)
        progress = run(model, told, numbers)
        assert told.steps == [1, 2, 3, 4]
        assert (progress.best, progress.best_step, progress.waited) == (scores[1], 2, 2)
        assert progress.ended == "no better value for 2 evaluations"
        assert told.notes == ["stopping at update 4: no better value for 2 evaluations, best at 2"]
        assert told.saves == [1, 2, 4]  # each new best, and the last

    def test_one_that_was_left_out_is_made_up_for(self, model: PreTrainedModel) -> None:
        """As after a signal between an update and its evaluation."""
        told = Told()
        run(model, told, plan(eval_steps=2), progress=Progress(step=4))
        assert told.evaluations == [4, 6]
        told = Told()
        run(model, told, plan(eval_steps=2), progress=Progress(step=4, evaluated=4))
        assert told.evaluations == [6]


class TestSignals:
    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_in_the_middle_of_an_update(
        self, model: PreTrainedModel, signum: signal.Signals
    ) -> None:
        told, before = Told(), values(model)

        def at_step(step: int) -> None:
            before.update(values(model))
            if step == 3:
                os.kill(os.getpid(), signum)

        told.at_step = at_step
        progress = Progress()
        with StopRequest() as stop, pytest.raises(Stopped) as caught:
            run(model, told, plan(steps=50), progress=progress, stop=stop)
        assert caught.value.signum == signum
        assert told.steps == [1, 2, 3]
        assert progress.step == 3
        assert all(torch.equal(value, before[name]) for name, value in values(model).items())
        assert all(p.grad is None for p in model.parameters())

    def test_sigusr1_saves_and_goes_on(self, model: PreTrainedModel) -> None:
        told = Told(at_step=lambda step: step in (1, 5) and os.kill(os.getpid(), signal.SIGUSR1))
        with StopRequest() as stop:
            run(model, told, plan(save_steps=None), stop=stop)
        assert told.saves == [1, 5]
        assert told.steps == [1, 2, 3, 4, 5, 6]


class TestSaving:
    def test_a_checkpoint_that_cannot_be_written_is_tried_again(self, model: PreTrainedModel) -> None:
        def refuse(step: int) -> None:
            if step < 12:
                raise StorageError("the disk is full")

        told = Told(at_save=refuse)
        run(model, told, plan(steps=30, save_steps=11))
        assert told.saves == [21, 22, 30]
        assert told.notes == ["ALARM: no checkpoint of update 11: the disk is full; trying again later"]

    def test_or_ends_the_run_if_that_is_the_policy(self, model: PreTrainedModel) -> None:
        def refuse(step: int) -> None:
            raise StorageError("the disk is full")

        told = Told(at_save=refuse)
        with pytest.raises(StorageError, match="the disk is full"):
            run(model, told, plan(on_save_error="stop"))
        assert told.steps == [1, 2]


def poisoned(rows: Sequence[Row]) -> Batch:
    """As `padded`, but a row that starts with token 7 has a loss that is not finite."""
    batch = padded(rows)
    if any(row.ids[0] == 7 for row in rows):
        mask = batch.inputs["attention_mask"].double()
        batch.inputs["attention_mask"] = (mask / 0 * 0)[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    return batch


def rows_with_poison(place: int) -> list[Row]:
    rows = [Row((3, *row.ids), (-100, *row.labels)) for row in random_rows(12)]
    rows[place] = Row((7, *rows[place].ids[1:]), rows[place].labels)
    return rows


PAIRS: dict[str, Any] = {"grouping": Grouping(2, 1), "updates_per_epoch": 6, "steps": 6}


class TestNotFinite:
    @pytest.fixture
    def rows(self) -> list[Row]:
        """Twelve, of which the third update of two has the bad one."""
        place = Order([9] * 12, Grouping(2, 1), seed=3).update(3)[0][1]
        return rows_with_poison(place)

    def test_stop(self, model: PreTrainedModel, rows: list[Row]) -> None:
        told, progress, rng = Told(), Progress(), torch.get_rng_state()
        with pytest.raises(DivergedError, match="at update 3"):
            run(model, told, plan(**PAIRS), rows=rows, progress=progress, collate=poisoned)
        assert (told.steps, progress.step, progress.refused) == ([1, 2], 2, 1)
        (known,) = told.refused
        assert known["step"] == 3 and not any(map(math.isfinite, known["norms"].values()))
        assert 7 in [rows[i].ids[0] for group in known["rows"] for i in group]
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(p.grad is None and torch.isfinite(p).all() for p in model.parameters())

    def test_skip(self, model: PreTrainedModel, rows: list[Row]) -> None:
        told = Told()
        numbers = plan(**PAIRS, on_nonfinite="skip", save_steps=3, eval_steps=3, logging_steps=1)
        progress = run(model, told, numbers, rows=rows, collate=poisoned)
        assert told.steps == [1, 2, 4, 5, 6]
        assert told.notes == ["update 3 was not finite and is left out (1 so far)"]
        assert (progress.step, progress.refused) == (6, 1)
        assert (told.saves, told.evaluations) == ([3, 6], [3, 6])  # what is due is due all the same

    def test_skip_is_not_endless(self, model: PreTrainedModel) -> None:
        rows = [Row((7, *row.ids), (-100, *row.labels)) for row in random_rows(12)]
        told = Told()
        with pytest.raises(DivergedError, match="at update 3"):
            run(
                model, told, plan(**PAIRS, on_nonfinite="skip", max_nonfinite=2),
                rows=rows, collate=poisoned,
            )  # fmt: skip
        assert len(told.refused) == 3

    def test_roll_back_lowers_the_rate(self, model: PreTrainedModel, rows: list[Row]) -> None:
        progress, told, rates = Progress(), Told(), []
        state: dict[str, Any] = {}
        good = [False]

        def at_save(step: int) -> None:
            state.update(progress.to_json())

        def at_roll_back() -> None:
            progress.load(state)
            good[0] = True  # the lower rate helps

        told.at_save, told.at_roll_back = at_save, at_roll_back
        told.at_step = lambda step: rates.append(strategy.optimizer.param_groups[0]["lr"])
        strategy, numbers = sgd(model, 9.0), plan(**PAIRS, on_nonfinite="rollback", logging_steps=1)
        Loop(
            strategy, rows, numbers, progress, collate=lambda chosen: (padded if good[0] else poisoned)(chosen),
            hooks=told.hooks(progress), stop=StopRequest(),
        ).run()  # fmt: skip
        assert told.steps == [1, 2, 3, 4, 5, 6]
        assert told.notes == ["update 3 was not finite: back to update 2, at 0.5 times the rate"]
        rate = numbers.schedule.rate
        assert rates == [rate(0), rate(1), *(rate(step) / 2 for step in range(2, 6))]
        assert [entry["learning_rate"] for entry in told.logs] == rates
        assert (progress.refused, progress.rate_factor) == (1, 0.5)

    def test_an_overflow_of_the_scaled_loss_is_no_fault(self, base: PreTrainedModel) -> None:
        """The same weights as without a scale, bit for bit, and nobody is told."""
        found = []
        for scale in (None, LossScale(2.0**140)):
            model, told = a_copy(base).float(), Told()
            progress = run(model, told, plan(), progress=Progress(scale=scale))
            assert (told.refused, told.notes, progress.refused) == ([], [], 0)
            found.append((told.losses, values(model)))
        assert scale is not None and scale.value < 2.0**127 and scale.good > 0
        assert found[0][0] == found[1][0]
        assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())

    def test_but_a_loss_that_is_never_finite_is(self, model: PreTrainedModel, rows: list[Row]) -> None:
        told = Told()
        with pytest.raises(DivergedError):
            run(
                model, told, plan(**PAIRS), rows=rows, collate=poisoned,
                progress=Progress(scale=LossScale(1.0)),
            )  # fmt: skip
        assert len(told.refused) == 1


class TestSharedPasses:
    @pytest.mark.parametrize("tokens", [1, 15, 40, 1000])
    def test_the_rows_of_an_update_stay(self, base: PreTrainedModel, tokens: int) -> None:
        rows, apart, together = random_rows(13), Told(), Told()
        sizes: list[int] = []

        def collate(some: Sequence[Row]) -> Batch:
            sizes.append(sum(len(row.ids) for row in some))
            return padded(some)

        first, second = a_copy(base), a_copy(base)
        run(first, apart, plan(**FOURS), rows=rows)
        run(second, together, plan(**FOURS, pass_tokens=tokens), rows=rows, collate=collate)
        assert max(sizes) <= max([tokens, *(len(row.ids) for row in rows)])
        assert sizes[0] >= max(len(row.ids) for row in rows)  # the try before the first update
        assert together.losses == pytest.approx(apart.losses, rel=1e-9)
        for name, value in values(first).items():
            torch.testing.assert_close(values(second)[name], value, rtol=1e-9, atol=1e-12)


class Memory:
    """Collates, and then really asks the allocator for more than any machine has if rows are too many."""

    def __init__(self, most: int, after: int = 0) -> None:
        self.most, self.calls, self.after = most, 0, after
        self.sizes: list[int] = []

    def __call__(self, rows: Sequence[Row]) -> Batch:
        self.calls += 1
        self.sizes.append(len(rows))
        return padded(rows)

    def watch(self, model: nn.Module) -> None:
        def check(module: nn.Module, given: Any, arguments: Any) -> None:
            if self.calls > self.after and len(arguments["input_ids"]) > self.most:
                torch.empty(2**50)

        model.register_forward_pre_hook(check, with_kwargs=True)


FOURS: dict[str, Any] = {
    "grouping": Grouping(4, 2), "updates_per_epoch": 2, "steps": 4, "max_grad_norm": NO_CLIP,
}  # fmt: skip


class TestMemory:
    @pytest.mark.parametrize(("most", "after", "splits"), [(2, 0, 2), (1, 0, 4), (1, 4, 4), (3, 0, 2)])
    def test_micro_batches_are_divided_and_updates_stay(
        self, base: PreTrainedModel, most: int, after: int, splits: int
    ) -> None:
        rows, free, tight = random_rows(13), Told(), Told()
        first, second = a_copy(base), a_copy(base)
        run(first, free, plan(**FOURS), rows=rows)
        memory = Memory(most, after)
        memory.watch(second)
        progress = run(second, tight, plan(**FOURS), rows=rows, collate=memory)
        assert progress.splits == splits
        assert len(tight.notes) == splits.bit_length() - 1
        assert tight.notes[-1] == (
            f"out of memory: micro-batches are divided by {splits} from now on; an update keeps its rows"
        )
        assert max(memory.sizes[-8:]) <= most
        assert tight.losses == pytest.approx(free.losses, rel=1e-9)
        for name, value in values(first).items():
            torch.testing.assert_close(values(second)[name], value, rtol=1e-9, atol=1e-12)

    def test_the_generators_are_where_they_would_be(self, base: PreTrainedModel) -> None:
        """The division leaves no other trace than the order in which dropout is drawn."""
        model, memory = a_copy(base), Memory(2)
        memory.watch(model)
        torch.manual_seed(5)
        rng = torch.get_rng_state()
        run(model, Told(), plan(**FOURS), rows=random_rows(13), collate=memory)
        assert torch.equal(torch.get_rng_state(), rng)

    def test_a_row_that_does_not_fit_ends_the_run(self, base: PreTrainedModel) -> None:
        model, memory, told = a_copy(base), Memory(0), Told()
        memory.watch(model)
        with pytest.raises(MemoryLimitError, match="not enough memory for a single row") as caught:
            run(model, told, plan(**FOURS), rows=random_rows(13), collate=memory)
        assert caught.value.exit_code == 7
        assert "cutoff_len" in str(caught.value.remedy)
        assert told.steps == []

    def test_other_errors_are_not_taken_for_it(self, base: PreTrainedModel) -> None:
        model = a_copy(base)
        model.register_forward_pre_hook(lambda module, given: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match="size"):
            run(model, Told(), plan(), rows=random_rows(13))


class TestWatch:
    def test_a_loss_that_does_not_move(self) -> None:
        watch = Watch()
        warnings = [w for step in range(1, 60) for w in watch.see(step, 2.0 + 1e-6 * step)]
        assert len(warnings) == 1 and "has not moved in the first 20 updates" in warnings[0]

    def test_a_loss_of_nothing(self) -> None:
        watch = Watch()
        (warning,) = [w for step in range(1, 30) for w in watch.see(step, 0.0)]
        assert "carry no loss" in warning

    def test_a_loss_that_runs_away_is_told_once(self) -> None:
        watch = Watch()
        losses = [1.0] * 10 + [1.0 + 0.4 * i for i in range(30)]
        warnings = [w for step, loss in enumerate(losses, start=1) for w in watch.see(step, loss)]
        assert len(warnings) == 1 and "running away" in warnings[0]

    def test_a_good_course_is_left_alone(self) -> None:
        watch = Watch()
        losses = [3 * 0.97**step + 0.1 * math.sin(step) for step in range(200)]
        assert [w for step, loss in enumerate(losses) for w in watch.see(step, loss)] == []
