"""One update, exactly: the loss of every supervised token counts the same, whatever batch it came in.

    loss = Σ over micro-batches Σ over supervised tokens −log p(token)  /  all supervised tokens of the update

The divisor is known before the first backward pass, so padding, packing and accumulation cannot change the
gradient. A loss or gradient that is not finite stops the run before the optimizer can spread it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.data.collate import Batch
from lorakit.errors import DivergedError, TargetError
from lorakit.evals.objective import batch_loss
from lorakit.lowrank.budget import RankAllocator, orthogonality


@dataclass(frozen=True)
class StepResult:
    """What one update saw."""

    loss: float  # mean over the supervised tokens
    grad_norm: float  # before clipping
    tokens: int


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    budget: RankAllocator | None = None,
    step: int = 1,
) -> StepResult:
    """Accumulate the gradient of all ``batches``, clip its global norm, update.

    With AdaLoRA's ``budget`` its orthogonality term is part of the gradient, not of the reported loss, and the
    ranks are chosen after the update; ``step`` (from 1) tells the budget how far the training is.

    Raises:
        DivergedError: loss or gradient norm is not finite; nothing was updated.
    """
    supervised = sum(len(batch.targets_N) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = batch_loss(model, batch) / supervised
        loss.backward()
        total += loss.item()
    if budget is not None:
        (budget.schedule.orth_reg_weight * orthogonality(budget.layers.values())).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise DivergedError(
            f"loss {total} and gradient norm {norm}: training has diverged, nothing was updated",
            remedy="lower learning_rate, or check the data for broken rows",
        )
    optimizer.step()
    if budget is not None:
        budget.update(step)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total, norm, sum(batch.tokens for batch in batches))


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
