"""Folds: a partition, even in size and in labels, and a pure function of its arguments."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.folds import folds
from lorakit.errors import UsageError


@given(n=st.integers(2, 60), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_every_row_is_held_out_once(n: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(2, n))
    got = folds(n, k, seed)
    assert len(got) == k
    assert sorted(row for _, held in got for row in held) == list(range(n))
    sizes = [len(held) for _, held in got]
    assert max(sizes) - min(sizes) <= 1
    for train, held in got:
        assert sorted(train + held) == list(range(n))
        assert train == sorted(train)
        assert held == sorted(held)
    assert got == folds(n, k, seed)


@given(labels=st.lists(st.sampled_from("abcd"), min_size=3, max_size=60), seed=st.integers(0, 999))
def test_stratified_folds_are_even_in_every_label(labels: list[str], seed: int) -> None:
    got = folds(len(labels), 3, seed, labels)
    assert sorted(row for _, held in got for row in held) == list(range(len(labels)))
    for label in [None, *set(labels)]:
        counts = [sum(label in (None, labels[row]) for row in held) for _, held in got]
        assert max(counts) - min(counts) <= 1


def test_seeds_and_labels_matter_and_nothing_else() -> None:
    random.seed(1)
    first = folds(40, 4, 0)
    random.seed(2)
    assert folds(40, 4, 0) == first
    assert len({str(folds(40, 4, seed)) for seed in range(20)}) == 20
    assert folds(40, 4, 0, ["same"] * 40) == first
    labels = ["rare", *["common"] * 39]
    assert Counter(labels[row] for _, held in folds(40, 4, 0, labels) for row in held) == Counter(labels)


@pytest.mark.parametrize(
    ("n", "k", "labels", "message"),
    [
        (10, 1, None, "10 rows cannot be divided into 1 folds"),
        (10, 0, None, "into 0 folds"),
        (10, 11, None, "into 11 folds"),
        (0, 2, None, "0 rows"),
        (10, 2, ["a"] * 9, "9 labels for 10 rows"),
    ],
)
def test_refused(n: int, k: int, labels: list[str] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        folds(n, k, 0, labels)
