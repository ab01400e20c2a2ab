"""Which rows make which update. A pure function of seed and numbers, so that any run can be repeated."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


class Order:
    """The micro-batches of every update: each epoch sees every row once, in a fresh order."""

    def __init__(self, lengths: Sequence[int], grouping: Grouping, seed: int) -> None:
        self._lengths, self._grouping, self._seed = lengths, grouping, seed
        self._epoch = 0
        self._batches = grouping.epoch(lengths, seed, 0)
        self._per_epoch = math.ceil(len(self._batches) / grouping.accumulation)

    def update(self, step: int) -> list[list[int]]:
        """The rows of update ``step`` (from 1), micro-batch by micro-batch."""
        epoch, place = divmod(step - 1, self._per_epoch)
        if epoch != self._epoch:
            self._batches = self._grouping.epoch(self._lengths, self._seed, epoch)
            self._epoch = epoch
        start = place * self._grouping.accumulation
        return self._batches[start : start + self._grouping.accumulation]

    def largest(self) -> list[int]:
        """The micro-batch of the present epoch that takes the most memory: its tokens, padding counted."""
        packed = self._grouping.capacity is not None

        def tokens(group: Sequence[int]) -> int:
            lengths = [int(self._lengths[i]) for i in group]
            return sum(lengths) if packed else max(lengths) * len(lengths)

        return max(self._batches, key=tokens)


def spread(groups: Sequence[Sequence[int]], ranks: int) -> list[list[Sequence[int]]]:
    """The micro-batches of each rank, in turns; a rank may have one less than another, or none."""
    return [list(groups[rank::ranks]) for rank in range(ranks)]


def divide(groups: Sequence[Sequence[int]], parts: int) -> list[list[int]]:
    """Each micro-batch cut into up to ``parts`` of nearly equal numbers of rows."""
    return [
        list(group[i * len(group) // parts : (i + 1) * len(group) // parts])
        for group in groups
        for i in range(parts)
        if i * len(group) // parts < (i + 1) * len(group) // parts
    ]


def epoch_order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the rows, fixed by seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return tuple(torch.randperm(rows, generator=generator).tolist())


def _shuffled(groups: list[list[int]], seed: int, epoch: int) -> list[list[int]]:
    return [groups[i] for i in epoch_order(len(groups), seed, epoch)]
