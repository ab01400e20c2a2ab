"""The loop: updates in order, and after each what is due: log line, evaluation, checkpoint.

All that changes is in `Progress`, the strategy and the random states: what `save` keeps is enough to go on as
if nothing had happened. An update that is interrupted, short of memory or not finite leaves no trace in them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from lorakit import hardware
from lorakit.checkpoint.state import State
from lorakit.data.collate import Batch
from lorakit.data.encode import Row
from lorakit.data.order import Grouping, Order, divide, spread
from lorakit.data.packing import heaviest_pass, passes
from lorakit.data.store import lengths_of
from lorakit.errors import DivergedError, MemoryLimitError, StorageError
from lorakit.lowrank.budget import RankAllocator
from lorakit.optim.build import set_rate
from lorakit.optim.schedule import Schedule
from lorakit.parallel.strategy import Strategy
from lorakit.training.guards import Watch
from lorakit.training.progress import Progress, random_state, restore_random_state
from lorakit.training.signals import Stopped, StopRequest
from lorakit.training.step import ShortOfMemory, StepResult, train_step, try_pass

_RETRY = 10  # updates until a checkpoint that could not be written is tried again


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, fixed before it starts. Steps count updates, from 1; None means never."""

    steps: int
    grouping: Grouping
    updates_per_epoch: int
    schedule: Schedule
    max_grad_norm: float
    seed: int
    logging_steps: int
    save_steps: int | None = None
    eval_steps: int | None = None
    first_eval: int = 0  # no evaluation before this step
    higher_is_better: bool = False
    patience: int | None = None  # evaluations without a better value that end the run
    keep_best: bool = False
    unfreeze_after: int | None = None  # the last step that trains adapters alone
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    max_nonfinite: int = 3
    on_save_error: Literal["continue", "stop"] = "continue"
    log_first: bool = False
    pass_tokens: int | None = None  # rows of an update share passes of so many; None: micro-batches are passes


@dataclass(frozen=True)
class Hooks:
    """What the loop tells and asks the outside."""

    on_step: Callable[[int, float], None]  # step, loss
    on_log: Callable[[dict[str, Any]], None]  # the fields of a ``train`` event
    on_note: Callable[[str], None]  # something a user must know
    save: Callable[[], None]  # a checkpoint of what is now; may raise StorageError
    evaluate: Callable[[int], float | None]  # the watched value of the held-out rows
    on_refused: Callable[[dict[str, Any]], None]  # what is known of an update that was not finite
    roll_back: Callable[[], None]  # to the newest good checkpoint
    unfreeze: Callable[[], None]  # the second stage begins


class Loop:
    """One run's training."""

    def __init__(
        self,
        strategy: Strategy,
        rows: Sequence[Row],
        plan: Plan,
        progress: Progress,
        *,
        collate: Callable[[Sequence[Row]], Batch],
        hooks: Hooks,
        stop: StopRequest,
        budget: RankAllocator | None = None,
    ) -> None:
        self.strategy, self.rows, self.plan, self.progress = strategy, rows, plan, progress
        self.collate, self.hooks, self.stop, self.budget = collate, hooks, stop, budget
        self._lengths = lengths_of(rows)
        self._order = Order(self._lengths, plan.grouping, plan.seed)
        self._watch = Watch()
        self._owed: int | None = None  # the step at which a failed checkpoint is tried again
        self._making = 0.0  # seconds spent on making batches since the last log line

    def run(self) -> None:
        """Train until the plan is done, from wherever `progress` is.

        Raises:
            Stopped: by a signal; the state is that after the last whole update.
            DivergedError, MemoryLimitError: as the policy says; the state is that before the update.
        """
        progress, plan = self.progress, self.plan
        started = time.monotonic() - progress.seconds
        self.strategy.model.train()
        self._try_longest()
        self._evaluate()  # in case the run was stopped between an update and its evaluation
        while progress.step < plan.steps and progress.ended is None:
            result = self._update(progress.step + 1)
            progress.seconds = time.monotonic() - started
            if result is not None:
                progress.step += 1
                self._account(result)
            self._evaluate()
            self._save_if_due()

    def _update(self, step: int) -> StepResult | None:
        """Update number ``step``; None if its gradient was not finite and the policy goes on."""
        plan, progress, strategy = self.plan, self.progress, self.strategy
        if plan.unfreeze_after is not None and step > plan.unfreeze_after:
            self.hooks.unfreeze()
        set_rate(strategy.optimizer, plan.schedule.rate(step - 1) * progress.rate_factor)
        before = random_state()
        while True:
            groups, empty = self._passes(self._order.update(step))
            try:
                result = train_step(
                    strategy,
                    self._batches(groups),
                    plan.max_grad_norm,
                    budget=self.budget,
                    step=step,
                    empty=empty,
                    scale=progress.scale,
                    poll=lambda: self.stop.poll(strategy.world),
                )
            except ShortOfMemory:
                restore_random_state(before)
                self._halve(self._order.update(step))
            except DivergedError as error:
                norms = strategy.norms()
                strategy.discard()
                if progress.scale is None or not progress.scale.back_off():
                    self._refuse(step, groups, norms, error, before)
                    return None
                restore_random_state(before)
            except Stopped:
                strategy.discard()
                restore_random_state(before)
                raise
            else:
                if progress.scale:
                    progress.scale.grow()
                return result

    def _batches(self, groups: Sequence[Sequence[int]]) -> list[Batch]:
        """The micro-batches; how long it takes to make them is part of the log."""
        start = time.monotonic()
        batches = [self.collate([self.rows[i] for i in group]) for group in groups]
        self._making += time.monotonic() - start
        return batches

    def _passes(self, groups: Sequence[Sequence[int]]) -> tuple[list[list[int]], int]:
        """The micro-batches of this rank, as many as any rank has, and how many of them only fill up."""
        world = self.strategy.world
        shares = [divide(self._together(share), self.progress.splits) for share in spread(groups, world.size)]
        mine = shares[world.rank]
        empty = max(map(len, shares)) - len(mine)
        return mine + [shares[0][0]] * empty, empty

    def _together(self, groups: list[Sequence[int]]) -> list[Sequence[int]]:
        """The rows of micro-batches as passes of even size, where they may be put together."""
        if self.plan.pass_tokens is None or not groups:
            return groups
        return [*passes(self._lengths, list(chain(*groups)), self.plan.pass_tokens)]

    def _try_longest(self) -> None:
        """One pass over the largest micro-batch, before hours are spent on smaller ones; it leaves no trace."""
        if not self.strategy.recovers:
            return
        largest, before = self._largest(), random_state()
        while True:
            batch = self.collate([self.rows[i] for i in divide([largest], self.progress.splits)[0]])
            try:
                try_pass(self.strategy, batch)
            except ShortOfMemory:
                self._halve([largest])
            else:
                return
            finally:
                restore_random_state(before)

    def _largest(self) -> Sequence[int]:
        """The rows of the pass that takes the most memory of all."""
        tokens = self.plan.pass_tokens
        if not tokens:
            return self._order.largest()
        shares = spread(self._order.update(1), self.strategy.world.size)
        return heaviest_pass(self._lengths, tokens, max(sum(map(len, share)) for share in shares))

    def _halve(self, groups: Sequence[Sequence[int]]) -> None:
        """Divide micro-batches once more: the same rows in the same update, in more passes."""
        if all(len(part) == 1 for part in divide(groups, self.progress.splits)):
            raise MemoryLimitError(
                "there is not enough memory for a single row",
                remedy="lower cutoff_len, set gradient_checkpointing: true, or quantization_bit: 4",
            )
        self.progress.splits *= 2
        self.hooks.on_note(
            f"out of memory: micro-batches are divided by {self.progress.splits} from now on; "
            "an update keeps its rows"
        )

    def _refuse(
        self, step: int, groups: list[list[int]], norms: dict[str, float], error: DivergedError, before: State
    ) -> None:
        """What the policy does about an update that is not finite; the weights are as they were before it."""
        plan, progress = self.plan, self.progress
        progress.refused += 1
        self.hooks.on_refused({"step": step, "message": error.message, "rows": groups, "norms": norms})
        if plan.on_nonfinite == "stop" or progress.refused > plan.max_nonfinite:
            restore_random_state(before)
            raise error
        if plan.on_nonfinite == "skip":
            progress.step = step
            self.hooks.on_note(f"update {step} was not finite and is left out ({progress.refused} so far)")
            return
        refused, factor = progress.refused, progress.rate_factor / 2
        self.hooks.roll_back()
        progress.refused, progress.rate_factor = refused, factor
        self.hooks.on_note(
            f"update {step} was not finite: back to update {progress.step}, at {factor:g} times the rate"
        )

    def _account(self, result: StepResult) -> None:
        """Count an update, warn of what looks wrong, and write the log line that is due."""
        plan, progress = self.plan, self.progress
        progress.see(result.loss, result.grad_norm, result.tokens)
        self.hooks.on_step(progress.step, result.loss)
        for warning in self._watch.see(progress.step, result.loss):
            self.hooks.on_note(warning)
        due = progress.step % plan.logging_steps == 0 or progress.step == plan.steps
        if due or (plan.log_first and progress.step == 1):
            entry = progress.log_entry(plan.steps, plan.updates_per_epoch)
            entry["learning_rate"] = plan.schedule.rate(progress.step - 1) * progress.rate_factor
            entry |= {"data_seconds": self._making, "memory_gb": hardware.memory_used() / 1e9}
            self._making = 0.0
            self.hooks.on_log(entry)

    def _evaluate(self) -> None:
        """Score the held-out rows if that is due and not done yet; end a run that stands still."""
        plan, progress = self.plan, self.progress
        step = progress.step
        due = plan.eval_steps and step % plan.eval_steps == 0 and step >= plan.first_eval
        if not due or step in (0, progress.evaluated):
            return
        value = self.hooks.evaluate(step)
        progress.evaluated = step
        if value is None:
            return
        sign = -1 if plan.higher_is_better else 1
        if math.isfinite(value) and (progress.best is None or sign * value < sign * progress.best):
            progress.best, progress.best_step, progress.waited = value, step, 0
        else:
            progress.waited += 1
            if plan.patience is not None and progress.waited >= plan.patience:
                progress.ended = f"no better value for {progress.waited} evaluations"
                self.hooks.on_note(f"stopping at update {step}: {progress.ended}, best at {progress.best_step}")

    def _save_if_due(self) -> None:
        """A checkpoint by the plan, of a new best, on request, or that is still owed."""
        plan, progress = self.plan, self.progress
        step, last = progress.step, progress.step == plan.steps or progress.ended is not None
        due = plan.save_steps is not None and (step % plan.save_steps == 0 or last)
        due |= plan.keep_best and progress.evaluated == progress.best_step == step
        due |= self.strategy.world.any(self.stop.take_save()) or step == self._owed
        if not due:
            return
        try:
            self.hooks.save()
            self._owed = None
        except StorageError as error:
            if plan.on_save_error == "stop":
                raise
            self._owed = step + _RETRY
            self.hooks.on_note(f"ALARM: no checkpoint of update {step}: {error.message}; trying again later")
