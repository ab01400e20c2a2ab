"""Packed rows against rows alone: the same loss and the same gradients, for every family in the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lorakit.adapters.attach import add_lora_to_model
from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.errors import ModelError
from lorakit.evals.objective import batch_loss, batching
from lorakit.models.patch import PACKABLE, can_pack, packed

VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LAYERS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=9, attn_logit_softcapping=5.0),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=9, layer_types=LAYERS),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),
    "smollm3": SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layers=[1, 0]),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


class Tokenizer:
    """All that padding asks of a tokenizer; the id is also a token of the rows."""

    pad_token_id = 5


def build(config: PretrainedConfig, **changes: Any) -> PreTrainedModel:
    """A random model in float64 with an adapter that is not zero."""
    config = type(config)(**{**config.to_diff_dict(), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    add_lora_to_model(model, r=3, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def random_rows(count: int, *, longest: int, seed: int) -> list[Row]:
    """Rows of unlike lengths with labels on random tokens, the first token's label included."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        marked = (torch.rand(length, generator=generator) < 0.6).tolist()
        marked[1] = True
        rows.append(Row(tuple(ids), tuple(i if m else -100 for i, m in zip(ids, marked, strict=True))))
    return rows


def loss_and_gradients(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = batch_loss(model, batch)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def row_by_row(model: PreTrainedModel, rows: list[Row]) -> Tensor:
    """Σ −log p, one row and one token after the other, without anything of the package."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        log_p = F.log_softmax(model(torch.tensor([row.ids])).logits[0], dim=-1)
        for t, label in enumerate(row.labels[1:]):
            if label != -100:
                total = total - log_p[t, label]
    return total


def assert_packing_is_exact(model: PreTrainedModel, rows: list[Row]) -> None:
    """Against rows alone: padding gives NaN in some families (gemma2 in float64)."""
    alone = [loss_and_gradients(model, pad([row], Tokenizer.pad_token_id)) for row in rows]
    expected = torch.stack([loss for loss, _ in alone]).sum()
    expected_grads = {name: sum(grads[name] for _, grads in alone) for name in alone[0][1]}
    assert expected.item() == pytest.approx(row_by_row(model, rows).item(), rel=1e-9)
    before = model.config._attn_implementation
    with packed(model):
        found, grads = loss_and_gradients(model, pack(rows))
    exact = 1e-6 if model.config.model_type == "gemma2" else 1e-9  # transformers' softmax for it is in float32
    assert model.config._attn_implementation == before
    assert found.item() == pytest.approx(expected.item(), rel=exact)
    assert grads.keys() == expected_grads.keys()
    projections = 4 if model.config.model_type in {"phi3", "gpt_neox"} else 7
    assert len(grads) == 2 * projections * 2  # A and B of each in two blocks
    for name, grad in grads.items():
        assert expected_grads[name].norm() > 0, name
        assert (grad - expected_grads[name]).norm() <= exact * expected_grads[name].norm(), name
    again, _ = loss_and_gradients(model, pad(rows[:1], Tokenizer.pad_token_id))
    assert torch.equal(again, alone[0][0])


def test_every_packable_family_is_here() -> None:
    assert len(PACKABLE) >= 4
    assert set(CONFIGS) == PACKABLE
    assert {config.model_type for config in CONFIGS.values()} == PACKABLE


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_is_alone(family: str, seed: int) -> None:
    model = build(CONFIGS[family])
    rows = random_rows(6, longest=25, seed=seed)
    assert can_pack(model)
    assert_packing_is_exact(model, rows)


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_of_one_pack_do_not_touch_each_other(family: str) -> None:
    model = build(CONFIGS[family]).eval()
    rows = random_rows(4, longest=20, seed=3)
    other = Row(tuple((i + 1) % VOCABULARY for i in rows[1].ids), rows[1].labels)
    with packed(model), torch.no_grad():
        logits = [
            model(**pack([rows[0], row, *rows[2:]]).inputs, use_cache=False).logits[0]
            for row in (rows[1], other)
        ]
    start, stop = len(rows[0].ids), len(rows[0].ids) + len(other.ids)
    assert torch.equal(logits[0][:start], logits[1][:start])
    assert torch.equal(logits[0][stop:], logits[1][stop:])
    assert not torch.equal(logits[0][start:stop], logits[1][start:stop])


@pytest.mark.parametrize(("family", "more"), [("mistral", {}), ("qwen2", {"use_sliding_window": True})])
def test_a_sliding_window_is_kept(family: str, more: dict[str, Any]) -> None:
    if family == "qwen2":
        more = {**more, "max_window_layers": 0}
    model = build(CONFIGS[family], sliding_window=8, layer_types=None, **more)
    rows = random_rows(6, longest=20, seed=5)
    assert max(len(row.ids) for row in rows) > 8
    assert_packing_is_exact(model, rows)
    wide = build(CONFIGS[family], sliding_window=50, layer_types=None, **more)
    with packed(model), packed(wide):
        assert abs(batch_loss(model, pack(rows)).item() / batch_loss(wide, pack(rows)).item() - 1) > 1e-4


def test_attention_dropout_is_not_packed_away() -> None:
    assert not can_pack(build(CONFIGS["llama"], attention_dropout=0.1))


def test_attention_both_ways_is_not_packed() -> None:
    assert not can_pack(build(CONFIGS["gemma3_text"], use_bidirectional_attention=True))


def test_a_family_outside_the_table_is_padded() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    rows = random_rows(5, longest=20, seed=6)
    assert config.model_type not in PACKABLE
    with batching(model, Tokenizer(), rows) as collate:  # type: ignore[arg-type]
        batch = collate(rows)
        assert not batch.packed
        loss = batch_loss(model, batch)
    assert loss.item() == pytest.approx(row_by_row(model, rows).item(), rel=1e-9)
    assert len(batch.targets_N) == sum(row.supervised for row in rows)


def test_batching_packs_and_puts_everything_back() -> None:
    model = build(CONFIGS["llama"])
    rows = random_rows(5, longest=20, seed=7)
    before = model.config._attn_implementation
    with batching(model, Tokenizer(), rows) as collate:  # type: ignore[arg-type]
        batch = collate(rows)
        assert batch.packed
        loss = batch_loss(model, batch)
        with pytest.raises(ModelError, match="without segment_lengths"):
            model(torch.tensor([rows[0].ids]))
    assert model.config._attn_implementation == before
    assert loss.item() == pytest.approx(row_by_row(model, rows).item(), rel=1e-9)


def test_an_error_inside_puts_the_attention_back() -> None:
    model = build(CONFIGS["llama"])
    before = model.config._attn_implementation
    with pytest.raises(KeyError), packed(model):
        raise KeyError("anything")
    assert model.config._attn_implementation == before
