"""The loop: updates in order, the rate by the schedule, metrics, saves, and a clean stop on a signal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit import hardware
from lorakit.data.collate import Batch
from lorakit.data.encode import Row
from lorakit.data.store import lengths_of
from lorakit.lowrank.budget import RankAllocator
from lorakit.training.order import Grouping, updates
from lorakit.training.schedule import learning_rate
from lorakit.training.signals import StopRequest
from lorakit.training.step import StepResult, train_step


@dataclass(frozen=True)
class Plan:
    """The numbers of a run, fixed before it starts."""

    steps: int
    grouping: Grouping
    updates_per_epoch: int
    schedule: str
    learning_rate: float
    warmup: int
    max_grad_norm: float
    seed: int
    logging_steps: int
    save_steps: int | None

    def rate(self, step: int) -> float:
        """The learning rate of update ``step`` (from 0)."""
        return learning_rate(
            step, kind=self.schedule, peak=self.learning_rate, steps=self.steps, warmup=self.warmup
        )


@dataclass(frozen=True)
class Hooks:
    """What the loop tells the outside."""

    on_step: Callable[[int, float], None]  # step (from 1), loss
    on_log: Callable[[dict[str, Any]], None]  # the fields of a ``train`` event
    on_save: Callable[[int], None]


def fit(
    model: nn.Module,
    rows: Sequence[Row],
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    *,
    collate: Callable[[Sequence[Row]], Batch],
    hooks: Hooks,
    budget: RankAllocator | None = None,
) -> int | None:
    """Train ``model`` in place; returns the signal that stopped it early, or None when it finished.

    ``budget`` takes ranks away as AdaLoRA does.
    """
    meter = _Meter(plan)
    order = updates(lengths_of(rows), plan.grouping, plan.steps, plan.seed)
    model.train()
    with StopRequest() as stop:
        for step, groups in enumerate(order, start=1):
            rate = plan.rate(step - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            batches = [collate([rows[i] for i in group]) for group in groups]
            result = train_step(model, batches, optimizer, plan.max_grad_norm, budget, step)
            meter.add(result)
            hooks.on_step(step, result.loss)
            if step % plan.logging_steps == 0 or step == plan.steps or stop.signum:
                hooks.on_log(meter.take(step, rate))
            if plan.save_steps and step % plan.save_steps == 0 and step < plan.steps:
                hooks.on_save(step)
            if stop.signum:
                return stop.signum
    return None


class _Meter:
    """Averages since the last log line; rates by the monotonic clock."""

    def __init__(self, plan: Plan) -> None:
        self._steps = plan.steps
        self._per_epoch = plan.updates_per_epoch
        self._start = self._last = time.monotonic()
        self._seen: list[StepResult] = []
        self._tokens = 0

    def add(self, result: StepResult) -> None:
        self._seen.append(result)
        self._tokens += result.tokens

    def take(self, step: int, rate: float) -> dict[str, Any]:
        now = time.monotonic()
        tokens = sum(result.tokens for result in self._seen)
        entry = {
            "step": step,
            "steps": self._steps,
            "epoch": round(step / self._per_epoch, 4),
            "loss": sum(result.loss for result in self._seen) / len(self._seen),
            "learning_rate": rate,
            "grad_norm": self._seen[-1].grad_norm,
            "tokens": self._tokens,
            "tokens_per_second": tokens / max(now - self._last, 1e-9),
            "memory_gb": hardware.memory_used() / 1e9,
            "seconds": now - self._start,
        }
        self._last = now
        self._seen.clear()
        return entry
