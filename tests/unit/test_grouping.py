"""Bins, groups of like length, token budgets: every row once, nothing over the limit, the same each time."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.order import Grouping, Order, epoch_order
from lorakit.data.packing import best_fit, by_length, fill, heaviest_pass, passes, within_budget


def first_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """How full each bin becomes, by the definition: look at every bin for every row."""
    bins: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, used in enumerate(bins) if used + length <= capacity]
        if fitting:
            bins[max(fitting, key=lambda number: bins[number])] += length
        else:
            bins.append(length)
    return bins


ROWS = st.lists(st.integers(1, 50), max_size=120)


@given(ROWS, st.integers(0, 10))
def test_bins_hold_every_row_once_and_are_the_fullest_that_fit(lengths: list[int], seed: int) -> None:
    order = epoch_order(len(lengths), seed, 0)
    for bins in (best_fit(lengths, 50), best_fit(lengths, 50, order)):
        assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
        used = [sum(lengths[row] for row in rows) for rows in bins]
        assert all(0 < tokens <= 50 for tokens in used)
        assert sorted(used) == sorted(first_best_fit(lengths, 50))


def test_bins_are_the_same_every_time_and_ties_follow_the_order() -> None:
    lengths = [5, 3, 5, 3, 5, 3]
    assert best_fit(lengths, 8) == best_fit(lengths, 8) == [[0, 5], [2, 3], [4, 1]]
    assert best_fit(lengths, 8, (4, 2, 0, 1, 3, 5)) == [[4, 5], [2, 3], [0, 1]]


@pytest.mark.parametrize("length", [0, 9])
def test_a_row_that_no_bin_holds(length: int) -> None:
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens, a bin holds 1 to 8"):
        best_fit([8, length], 8)


def test_chat_like_lengths_fill_98_percent() -> None:
    rng = random.Random(0)
    lengths = [min(int(rng.lognormvariate(5.2, 0.6)) + 20, 2048) for _ in range(3000)]
    assert fill(lengths, best_fit(lengths, 2048), 2048) >= 0.98


def test_fill_is_the_share_of_tokens() -> None:
    assert fill([3, 4, 1], [[0, 1], [2]], 8) == 0.5


@given(ROWS, st.integers(1, 9), st.integers(0, 10))
def test_rows_of_like_length_lie_together(lengths: list[int], size: int, seed: int) -> None:
    groups = by_length(lengths, size, epoch_order(len(lengths), seed, 0))
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(len(group) == size for group in groups[:-1])
    if len(lengths) <= 50 * size:  # one window
        flat = [lengths[row] for group in groups for row in group]
        assert flat == sorted(flat, reverse=True)


def test_grouping_saves_most_of_the_padding() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(10, 500) for _ in range(2000)]
    order = epoch_order(len(lengths), 0, 0)

    def padded(groups: list[list[int]]) -> int:
        return sum(len(group) * max(lengths[row] for row in group) for group in groups)

    plain = [list(order[start : start + 8]) for start in range(0, len(order), 8)]
    assert padded(plain) > 1.6 * sum(lengths)
    assert padded(by_length(lengths, 8, order)) < 1.05 * sum(lengths)


@given(ROWS, st.integers(50, 300), st.integers(0, 10))
def test_a_budget_is_kept_with_padding_and_used_up(lengths: list[int], budget: int, seed: int) -> None:
    groups = within_budget(lengths, budget, epoch_order(len(lengths), seed, 0))
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    longest = [max(lengths[row] for row in group) for group in groups]
    assert all(len(group) * most <= budget for group, most in zip(groups, longest, strict=True))
    for group, most in zip(groups[:-1], longest[:-1], strict=True):
        assert (len(group) + 1) * most > budget  # one more would not have fitted


def test_a_row_over_the_budget() -> None:
    with pytest.raises(ValueError, match="row 0 has 9 tokens, a batch holds at most 8"):
        within_budget([9], 8, [0])


GROUPINGS = {
    "plain": Grouping(size=3, accumulation=2),
    "packed": Grouping(size=2, accumulation=2, capacity=60),
    "by length": Grouping(size=3, accumulation=2, like_lengths=True),
    "budget": Grouping(size=1, accumulation=2, budget=120),
}


@pytest.mark.parametrize("name", GROUPINGS)
@given(ROWS.filter(len))
def test_every_epoch_sees_every_row_once_in_as_many_updates(name: str, lengths: list[int]) -> None:
    grouping = GROUPINGS[name]
    per_epoch = grouping.updates_per_epoch(lengths)
    order = Order(lengths, grouping, seed=5)
    got = [order.update(step) for step in range(1, 3 * per_epoch + 1)]
    for epoch in range(3):
        mine = got[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for update in mine for batch in update for row in batch) == list(range(len(lengths)))
        assert all(0 < len(update) <= 2 for update in mine)


@pytest.mark.parametrize("name", GROUPINGS)
def test_epochs_differ_and_can_be_repeated(name: str) -> None:
    rng = random.Random(2)
    lengths = [rng.randint(1, 50) for _ in range(90)]
    epochs = [GROUPINGS[name].epoch(lengths, 7, epoch) for epoch in range(3)]
    assert epochs == [GROUPINGS[name].epoch(lengths, 7, epoch) for epoch in range(3)]
    contents = [{frozenset(batch) for batch in batches} for batches in epochs]
    assert contents[0] != contents[1] != contents[2]  # other rows meet, not only in another order


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120), st.integers(0, 10))
def test_passes_hold_the_rows_of_an_update(lengths: list[int], tokens: int, seed: int) -> None:
    rows = epoch_order(len(lengths), seed, 0)[::2]
    found = passes(lengths, rows, tokens)
    assert sorted(itertools.chain(*found)) == sorted(rows)
    sizes = [sum(lengths[row] for row in group) for group in found]
    assert max(sizes) <= max([tokens, *(lengths[row] for row in rows)])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120), st.integers(1, 60))
def test_the_heaviest_pass_is_of_the_longest_rows(lengths: list[int], tokens: int, rows: int) -> None:
    chosen = heaviest_pass(lengths, tokens, rows)
    assert lengths[chosen[0]] == max(lengths)
    assert len(chosen) <= rows, "of one update"
    assert sorted(lengths[row] for row in chosen) == sorted(lengths)[-len(chosen) :]
    assert len(chosen) == 1 or sum(lengths[row] for row in chosen) <= tokens
