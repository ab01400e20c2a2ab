"""Which rows make which update. A pure function of seed and numbers, so that any run can be repeated."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


def total_steps(rows: int, per_update: int, *, epochs: float, max_steps: int | None) -> int:
    """Number of updates: ``max_steps`` if given, else the epochs' worth."""
    if max_steps is not None:
        return max_steps
    return max(math.ceil(epochs * math.ceil(rows / per_update)), 1)


def updates(rows: int, per_update: int, steps: int, seed: int) -> Iterator[tuple[int, ...]]:
    """The row numbers of each of ``steps`` updates: every epoch sees every row once, in a fresh order."""
    done = epoch = 0
    while done < steps:
        order = epoch_order(rows, seed, epoch)
        for start in range(0, rows, per_update):
            if done == steps:
                return
            yield order[start : start + per_update]
            done += 1
        epoch += 1


def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the rows, fixed by seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())
