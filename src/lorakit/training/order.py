"""Which rows make which update. A pure function of seed and numbers, so that any run can be repeated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from lorakit.data.packing import best_fit, by_length, within_budget


@dataclass(frozen=True)
class Grouping:
    """How rows become micro-batches (one forward pass each), and micro-batches updates.

    Attributes:
        size: rows in a micro-batch; with ``capacity`` bins of rows.
        accumulation: micro-batches in an update.
        capacity: pack rows into bins of this many tokens.
        budget: fill micro-batches of like lengths up to this many tokens instead, padding counted.
        like_lengths: rows of like length share a micro-batch.
    """

    size: int
    accumulation: int
    capacity: int | None = None
    budget: int | None = None
    like_lengths: bool = False

    def epoch(self, lengths: Sequence[int], seed: int, epoch: int) -> list[list[int]]:
        """The micro-batches of one epoch; every row is in one of them."""
        order = epoch_order(len(lengths), seed, epoch)
        if self.capacity is not None:
            bins = _shuffled(best_fit(lengths, self.capacity, order), seed, epoch)
            return [list(chain(*bins[start : start + self.size])) for start in range(0, len(bins), self.size)]
        if self.budget is not None:
            return _shuffled(within_budget(lengths, self.budget, order), seed, epoch)
        if self.like_lengths:
            return _shuffled(by_length(lengths, self.size, order), seed, epoch)
        return [list(order[start : start + self.size]) for start in range(0, len(order), self.size)]

    def updates_per_epoch(self, lengths: Sequence[int]) -> int:
        """The same in every epoch: the number of micro-batches does not depend on the order of the rows."""
        return math.ceil(len(self.epoch(lengths, 0, 0)) / self.accumulation)


def total_steps(per_epoch: int, *, epochs: float, max_steps: int | None) -> int:
    """Number of updates: ``max_steps`` if given, else the epochs' worth."""
    if max_steps is not None:
        return max_steps
    return max(math.ceil(epochs * per_epoch), 1)


def updates(lengths: Sequence[int], grouping: Grouping, steps: int, seed: int) -> Iterator[list[list[int]]]:
    """The micro-batches of each of ``steps`` updates: every epoch sees every row once, in a fresh order."""
    done = epoch = 0
    while done < steps:
        batches = grouping.epoch(lengths, seed, epoch)
        for start in range(0, len(batches), grouping.accumulation):
            if done == steps:
                return
            yield batches[start : start + grouping.accumulation]
            done += 1
        epoch += 1


def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the rows, fixed by seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


def _shuffled(groups: list[list[int]], seed: int, epoch: int) -> list[list[int]]:
    return [groups[i] for i in epoch_order(len(groups), seed, epoch)]
