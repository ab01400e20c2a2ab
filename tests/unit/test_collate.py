"""Rows as one batch: every token predicts the next one of its own row, and padding predicts nothing."""

from __future__ import annotations

import random

import pytest
import torch

from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.ops.loss import IGNORE

PAD = 9
ONE = Row((1, 2, 3, 4), (IGNORE, IGNORE, 3, 4))
OTHER = Row((5, 9, 6, 9, 7), (IGNORE, 9, IGNORE, 9, IGNORE))  # holds the padding's id, with loss
SHORT = Row((8, 9), (8, 9))


def random_rows(count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = tuple(rng.randrange(20) for _ in range(rng.randint(2, 12)))
        rows.append(Row(ids, tuple(i if rng.random() < 0.5 else IGNORE for i in ids)))
    return rows


def predicted(batch: Batch) -> list[tuple[int, int]]:
    """(token, token to predict after it) at every kept position."""
    ids = batch.inputs["input_ids"]
    assert isinstance(ids, torch.Tensor)
    return list(zip(ids.flatten()[batch.keep_N].tolist(), batch.targets_N.tolist(), strict=True))


def wanted(rows: list[Row]) -> list[tuple[int, int]]:
    return [
        (row.ids[t], row.labels[t + 1])
        for row in rows
        for t in range(len(row.ids) - 1)
        if row.labels[t + 1] != IGNORE
    ]


def test_packed_rows_lie_end_to_end() -> None:
    batch = pack([ONE, OTHER, SHORT])
    assert batch.packed
    assert batch.tokens == 11
    assert batch.inputs.keys() == {"input_ids", "position_ids", "segment_lengths"}
    assert batch.inputs["segment_lengths"] == (4, 5, 2)
    torch.testing.assert_close(
        batch.inputs["input_ids"], torch.tensor([[1, 2, 3, 4, 5, 9, 6, 9, 7, 8, 9]]), rtol=0, atol=0
    )
    torch.testing.assert_close(
        batch.inputs["position_ids"], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]]), rtol=0, atol=0
    )
    assert batch.keep_N.tolist() == [1, 2, 4, 6, 9]
    assert batch.targets_N.tolist() == [3, 4, 9, 9, 9]


def test_padded_rows_are_filled_up_on_the_right() -> None:
    batch = pad([ONE, OTHER, SHORT], PAD)
    assert not batch.packed
    assert batch.tokens == 11
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    assert isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor)
    assert ids.tolist() == [[1, 2, 3, 4, 9], [5, 9, 6, 9, 7], [8, 9, 9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.keep_N.tolist() == [1, 2, 5, 7, 10]
    assert batch.targets_N.tolist() == [3, 4, 9, 9, 9]


@pytest.mark.parametrize("seed", range(20))
def test_both_ways_predict_the_same_tokens(seed: int) -> None:
    rows = random_rows(count=1 + seed % 7, seed=seed)
    packed, padded = pack(rows), pad(rows, PAD)
    assert predicted(packed) == predicted(padded) == wanted(rows)
    assert len(packed.targets_N) == sum(row.supervised for row in rows)
    assert packed.tokens == padded.tokens == sum(len(row.ids) for row in rows)


def test_a_row_never_predicts_the_first_token_of_the_next() -> None:
    assert predicted(pack([SHORT, SHORT])) == [(8, 9), (8, 9)]


def test_indices_are_integers_even_without_a_target() -> None:
    batch = pack([Row((1, 2), (IGNORE, IGNORE))])
    assert batch.keep_N.dtype == batch.targets_N.dtype == torch.int64
    assert batch.targets_N.shape == (0,)


def test_moving_keeps_everything() -> None:
    batch = pack([ONE, SHORT])
    moved = batch.to("meta")
    assert {moved.keep_N.device.type, moved.targets_N.device.type} == {"meta"}
    assert moved.inputs["segment_lengths"] == (4, 2)
    assert (moved.tokens, moved.packed) == (batch.tokens, batch.packed)
