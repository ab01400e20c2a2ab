"""No token of a packed bin sees another row: bit for bit on the reference attention, and in the gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorakit.adapters.attach import add_lora_to_model
from lorakit.data.collate import pack
from lorakit.data.encode import Row
from lorakit.data.order import Grouping, Order
from lorakit.data.packing import best_fit
from lorakit.evals.objective import batch_loss
from lorakit.models import patch
from lorakit.ops.attention import Scores, packed_attention, packed_attention_reference

VOCABULARY, CAPACITY = 60, 64


def build(dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    add_lora_to_model(model, r=3, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).train()


def random_rows(count: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 40, (), generator=generator))
        ids = tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())
        rows.append(Row(ids, (-100, *ids[1:])))
    return rows


def bins_of(rows: list[Row]) -> list[list[Row]]:
    bins = best_fit([len(row.ids) for row in rows], CAPACITY)
    assert len(bins) < len(rows) / 2
    return [[rows[number] for number in numbers] for numbers in bins]


LENGTHS = (7, 1, 30, 30, 12, 3)


def heads(seed: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, total, 8, generator=generator) for count in (4, 2, 2))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(3))
def test_each_segment_is_what_it_is_alone(seed: int) -> None:
    q, k, v = heads(seed, sum(LENGTHS))
    together = packed_attention_reference(q, k, v, LENGTHS, Scores(0.35))
    for start, length in zip(itertools.accumulate(LENGTHS, initial=0), LENGTHS, strict=False):
        part = slice(start, start + length)
        alone = packed_attention_reference(q[:, part], k[:, part], v[:, part], [length], Scores(0.35))
        assert torch.equal(together[:, part], alone)


@pytest.mark.parametrize("attention", [packed_attention_reference, packed_attention])
def test_nothing_of_a_poisoned_segment_reaches_another(attention: type(packed_attention)) -> None:  # type: ignore[valid-type]
    q, k, v = heads(5, sum(LENGTHS))
    clean = attention(q, k, v, LENGTHS, Scores(0.35))
    for number, length in enumerate(LENGTHS):
        start = sum(LENGTHS[:number])
        poisoned = [x.clone() for x in (q, k, v)]
        for x in poisoned:
            x[:, start : start + length] = math.nan
        found = attention(*poisoned, LENGTHS, Scores(0.35))
        assert found[:, start : start + length].isnan().all()
        assert torch.equal(found[:, :start], clean[:, :start])
        assert torch.equal(found[:, start + length :], clean[:, start + length :])


def test_a_bin_of_a_model_in_fp32_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "packed_attention", packed_attention_reference)
    model = build(torch.float32).eval()
    rows = next(rows for rows in bins_of(random_rows(40, seed=1)) if len(rows) >= 3)

    def logits(chosen: list[Row]) -> Tensor:
        with torch.no_grad(), patch.packed(model):
            return model(**pack(chosen).inputs, use_cache=False).logits[0]

    before = logits(rows)
    for number, row in enumerate(rows):
        other = Row(tuple((i + 1) % VOCABULARY for i in row.ids), row.labels)
        after = logits([*rows[:number], other, *rows[number + 1 :]])
        start = sum(len(row.ids) for row in rows[:number])
        stop = start + len(row.ids)
        assert torch.equal(after[:start], before[:start])
        assert torch.equal(after[stop:], before[stop:])
        assert not torch.equal(after[start:stop], before[start:stop])


def test_the_gradient_of_packed_updates_is_that_of_single_rows() -> None:
    model = build(torch.float64)
    rows = random_rows(30, seed=2)
    grouping = Grouping(size=2, accumulation=2, capacity=CAPACITY)

    def gradient(batches: list[list[Row]]) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad()
        total = 0.0
        supervised = sum(row.supervised for batch in batches for row in batch)
        with patch.packed(model):
            for batch in batches:
                loss = batch_loss(model, pack(batch)) / supervised
                loss.backward()
                total += loss.item()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    lengths = [len(row.ids) for row in rows]
    order = Order(lengths, grouping, seed=0)
    for step in (1, 2, 3):
        packed_rows = [[rows[number] for number in group] for group in order.update(step)]
        assert all(len(group) > 2 for group in packed_rows)
        loss, found = gradient(packed_rows)
        expected_loss, expected = gradient([[row] for group in packed_rows for row in group])
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        assert found.keys() == expected.keys() and len(found) == 28
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-11 * value.norm(), name
