"""One update, exactly: the loss of every supervised token counts the same, whatever batch or rank it came in.

    loss = Σ over ranks Σ over micro-batches Σ over supervised tokens −log p(token)  /  all supervised tokens

The divisor is known before the first backward pass, so padding, packing, accumulation and the number of ranks
cannot change the gradient. A loss or gradient that is not finite, on any rank, stops every rank before an
optimizer can spread it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.data.collate import Batch
from lorakit.errors import DivergedError, MemoryLimitError, TargetError
from lorakit.evals.objective import batch_loss
from lorakit.hardware import is_out_of_memory
from lorakit.lowrank.budget import RankAllocator, orthogonality
from lorakit.parallel.strategy import Strategy
from lorakit.training.scale import LossScale


@dataclass(frozen=True)
class StepResult:
    """What one update saw, on all ranks together."""

    loss: float  # mean over the supervised tokens
    grad_norm: float  # before clipping
    tokens: int


class ShortOfMemory(Exception):  # noqa: N818 - a request to divide the update, not a fault
    """Some rank had too little memory for a pass; nothing was updated, the gradient is gone."""


def train_step(
    strategy: Strategy,
    batches: Sequence[Batch],
    max_grad_norm: float,
    *,
    budget: RankAllocator | None = None,
    step: int = 1,
    empty: int = 0,
    scale: LossScale | None = None,
    poll: Callable[[], None] = lambda: None,
) -> StepResult:
    """Accumulate the gradient of all ``batches``, clip its global norm, update.

    Args:
        strategy: model, optimizer and ranks.
        batches: this rank's micro-batches, at least one, and as many on every rank.
        max_grad_norm: the gradient is scaled down to this 2-norm.
        budget: AdaLoRA's; its orthogonality term is part of the gradient, not of the reported loss, and the
            ranks are chosen after the update.
        step: number of the update, from 1.
        empty: how many of ``batches``, at their end, only fill up and carry no weight.
        scale: multiplies the loss so that float16 gradients do not vanish.
        poll: called after each pass; what it raises leaves the weights as they were.

    Raises:
        DivergedError: loss or gradient norm is not finite; nothing was updated, the gradient is still there.
        ShortOfMemory: see there.
    """
    world, factor = strategy.world, scale.value if scale else 1.0
    counted = batches[: len(batches) - empty]
    supervised, tokens = world.sum(
        sum(len(batch.targets_N) for batch in counted), sum(batch.tokens for batch in counted)
    )
    total = 0.0
    if budget is not None:
        weight = factor * budget.schedule.orth_reg_weight / world.size
        strategy.backward(weight * orthogonality(budget.layers.values()), last=False)
    for number, batch in enumerate(batches, start=1):
        weight = factor / supervised if number <= len(counted) else 0.0
        total += _pass(strategy, batch, weight, last=number == len(batches)) / factor
        poll()
    strategy.reduce()
    (total,) = world.sum(total)
    if factor != 1.0:
        strategy.scale(1 / factor)
    norm = strategy.norm()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise DivergedError(
            f"loss {total} and gradient norm {norm} at update {step}: it has diverged, nothing was updated",
            remedy="lower learning_rate, or check the data for broken rows",
        )
    share = max_grad_norm / (norm + 1e-6)
    if share < 1.0:
        strategy.scale(share)
    strategy.step()
    if budget is not None:
        budget.update(step)
    strategy.discard()
    return StepResult(total, norm, int(tokens))


def try_pass(strategy: Strategy, batch: Batch) -> None:
    """One pass whose gradient is thrown away; ``ShortOfMemory`` if any rank had too little."""
    _pass(strategy, batch, 1.0, last=True)
    strategy.discard()


def _pass(strategy: Strategy, batch: Batch, weight: float, *, last: bool) -> float:
    """Add ``weight`` times a batch's gradient, and return so many times its loss."""
    value, short = 0.0, False
    try:
        loss = batch_loss(strategy.forward, batch) * weight
        strategy.backward(loss, last=last)
        value = loss.item()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if not strategy.recovers:
            raise MemoryLimitError(
                "out of memory in the middle of an update that all ranks share",
                remedy="lower per_device_train_batch_size and raise gradient_accumulation_steps",
            ) from error
        short = True
    if strategy.recovers and strategy.world.any(short):
        strategy.discard()
        raise ShortOfMemory
    return value


def check_gradients_arrive(model: nn.Module, batch: Batch) -> None:
    """Refuse to train parameters that the loss does not reach; leaves no gradient behind.

    Raises:
        TargetError: naming them.
    """
    batch_loss(model, batch).backward()
    dead = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    if dead:
        raise TargetError(
            f"{len(dead)} trainable tensors get no gradient, first {', '.join(dead[:3])}",
            remedy="their modules are not used by the forward pass: take them out of lora_target",
        )
