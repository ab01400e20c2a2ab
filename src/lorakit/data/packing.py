"""Which rows share a forward pass: bins filled to a capacity, rows of like length, or a budget of tokens.

All three take the rows in some order (an epoch's), give groups of row numbers in which every row stands once,
and depend on nothing else, so that any run can be repeated. How many groups there are depends on the lengths
alone, not on the order: every epoch has as many updates as the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_WINDOW = 50  # micro-batches that are sorted by length together: like lengths, and still a random order


def best_fit(lengths: Sequence[int], capacity: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Fill bins of ``capacity`` tokens, best fit decreasing: the longest row first, each into the fullest bin
    that still holds it. Rows of the same length are taken in ``order``.

    Free space is looked up in a bit set (bit f: some bin has f tokens free), so that a million rows take
    seconds.

    Raises:
        ValueError: a row has no token, or more than ``capacity``.
    """
    rows = range(len(lengths)) if order is None else order
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> the bins that have just so many
    free_sizes = 0
    for row in sorted(rows, key=lambda row: -lengths[row]):
        need = int(lengths[row])
        if not 0 < need <= capacity:
            raise ValueError(f"row {row} has {need} tokens, a bin holds 1 to {capacity}")
        fitting = free_sizes >> need
        if fitting:
            free = need + (fitting & -fitting).bit_length() - 1
            number = with_room[free].pop()
            if not with_room[free]:
                free_sizes ^= 1 << free
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(row)
        left = free - need
        with_room.setdefault(left, []).append(number)
        free_sizes |= 1 << left
    return bins


def passes(lengths: Sequence[int], rows: Sequence[int], tokens: int) -> list[list[int]]:
    """The rows of one update in forward passes of at most ``tokens``, or of one longer row."""
    sizes = [int(lengths[row]) for row in rows]
    return [[rows[i] for i in group] for group in best_fit(sizes, max([tokens, *sizes]))]


def heaviest_pass(lengths: Sequence[int], tokens: int, rows: int) -> list[int]:
    """The longest rows that `passes` could put together for an update of so many ``rows``."""
    ranked = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:rows]
    chosen, left = ranked[:1], tokens - int(lengths[ranked[0]])
    for row in ranked[1:]:
        if lengths[row] > left:
            break
        chosen.append(row)
        left -= int(lengths[row])
    return chosen


def fill(lengths: Sequence[int], bins: Sequence[Sequence[int]], capacity: int) -> float:
    """The share of the bins' tokens that rows take."""
    return sum(int(lengths[row]) for rows in bins for row in rows) / (capacity * len(bins))


def by_length(lengths: Sequence[int], size: int, order: Sequence[int]) -> list[list[int]]:
    """Groups of ``size`` rows of like length: the order is cut into windows, and each of them is sorted."""
    groups = []
    window = size * _WINDOW
    for start in range(0, len(order), window):
        ranked = sorted(order[start : start + window], key=lambda row: -lengths[row])
        groups += [ranked[i : i + size] for i in range(0, len(ranked), size)]
    return groups


def within_budget(lengths: Sequence[int], budget: int, order: Sequence[int]) -> list[list[int]]:
    """Groups of like length of at most ``budget`` tokens each, padded to their longest row.

    Raises:
        ValueError: a single row has more than ``budget`` tokens.
    """
    groups: list[list[int]] = []
    most = 0
    for row in sorted(order, key=lambda row: -lengths[row]):
        if not groups or len(groups[-1]) == most:
            if lengths[row] > budget:
                raise ValueError(f"row {row} has {lengths[row]} tokens, a batch holds at most {budget}")
            groups.append([])
            most = math.floor(budget / max(int(lengths[row]), 1))
        groups[-1].append(row)
    return groups
