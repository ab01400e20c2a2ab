"""Predicted activations against the tensors that autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.modelinfo.architectures import facts_of
from lorakit.modelinfo.facts import ModelFacts
from lorakit.models.fast import LAYERS as LAYERS_AT_ONCE
from lorakit.models.fast import MLPS, NORMS, fast
from lorakit.models.patch import packed
from lorakit.ops import native
from lorakit.planning.activations import AT_ONCE, GATED, NORMED, activations
from lorakit.planning.adapters import adapted
from lorakit.planning.setup import Setup

LAYERS, TOKENS, ROW = 6, 96, 24
NEAR = 0.07
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def small(kind: str, dtype: torch.dtype) -> tuple[ModelFacts, Any]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 160, "vocab_size": 100, "pad_token_id": 0,
        "attention_dropout": 0.0,
    }  # fmt: skip
    if kind == "gpt2":
        config = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "vocab_size": 100, "n_positions": 128}
    if kind in ("bert", "vit"):
        config = {key: value for key, value in config.items() if not key.startswith(("num_key", "head_dim"))}
        config |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1 * (kind == "bert"))
    made = AutoConfig.for_model(kind, **config)
    auto: Any = AutoModel if kind in ("bert", "vit") else AutoModelForCausalLM
    told = {
        "model_type": kind,
        **config,
        "tie_word_embeddings": bool(made.to_dict().get("tie_word_embeddings")),
    }
    return facts_of(told, kind, "here"), auto.from_config(made).to(dtype).requires_grad_(False)


def kept_bytes(model: nn.Module, **inputs: Any) -> int:
    """Bytes of all storages that the forward pass keeps, weights and the logits' own aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # alive, so that no other takes its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(**inputs)
    assert out[0].requires_grad
    return sum(storage.nbytes() for storage in found.values())


def measured(model: Any, kind: str, attention: str) -> int:
    if kind == "vit":
        return kept_bytes(model, pixel_values=torch.randn(1, 3, 224, 224, dtype=model.dtype))
    if attention == "packed":
        ids, places = torch.randint(1, 100, (1, TOKENS)), torch.arange(ROW).repeat(TOKENS // ROW)[None]
        lengths = (ROW,) * (TOKENS // ROW)
        with packed(model), fast(model, attention=True):
            return kept_bytes(
                model, input_ids=ids, position_ids=places, segment_lengths=lengths, use_cache=False
            )
    ids = torch.randint(1, 100, (2, TOKENS // 2))
    mask = torch.ones_like(ids)
    mask[1, ROW:] = 0
    rest = {} if kind == "bert" else {"use_cache": False}
    with fast(model, attention=False):
        return kept_bytes(model, input_ids=ids, attention_mask=mask, **rest)


def shape_of(kind: str, attention: str) -> dict[str, Any]:
    if kind == "vit":
        return {"batch": 1, "length": 197}
    return (
        {"batch": 1, "length": TOKENS, "row": ROW}
        if attention == "packed"
        else {"batch": 2, "length": TOKENS // 2}
    )


CASES = [
    (kind, attention, precision, targets, method, dropout)
    for kind, attention in (
        ("llama", "packed"), ("llama", "sdpa"), ("llama", "eager"), ("qwen3", "packed"),
        ("gemma3_text", "sdpa"), ("phi3", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager"),
        ("bert", "sdpa"), ("vit", "sdpa"),
    )
    for precision, targets, method, dropout in (
        ("bf16", "all", "lora", 0.0), ("fp32", "all", "lora", 0.0), ("bf16", "few", "lora", 0.0),
        ("bf16", "all", "dora", 0.0), ("bf16", "all", "lora", 0.1),
    )
]  # fmt: skip
FEW = {"gpt2": "c_attn", "phi3": "qkv_proj", "bert": "query,value"}


@pytest.fixture(params=[True, False], ids=["C++", "plain"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether C++ passes compute."""
    if not request.param:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler here")
    return bool(request.param)


@pytest.mark.parametrize(("kind", "attention", "precision", "targets", "method", "dropout"), CASES)
def test_kept_bytes(
    kind: str, attention: Any, precision: Any, targets: str, method: Any, dropout: float, passes: bool
) -> None:
    torch.manual_seed(3)
    facts, model = small(kind, DTYPES[precision])
    names = "all" if targets == "all" else FEW.get(kind, "q_proj,v_proj")
    if attention != "packed":
        model.set_attn_implementation(attention)
    attach(model, LoRAConfig(r=4, target_modules=names, method=method, lora_dropout=dropout), seed=3)
    real = measured(model.train(), kind, attention)
    setup = Setup(
        method=method, rank=4, targets=tuple(names.split(",")), dropout=dropout, precision=precision,
        bits=16 if precision == "bf16" else 32, attention=attention, passes=passes,
        units=native.matrix_units(), **shape_of(kind, attention),
    )  # fmt: skip
    # Besides: indices, masks, rotations, and what the head keeps; they do not grow with the number of blocks.
    assert activations(facts, setup, adapted(facts, setup)).kept == pytest.approx(real, rel=NEAR)


def test_the_families_are_those_whose_modules_are_replaced() -> None:
    """smollm3, which is not planned for, is left out."""
    kinds = ((NORMED, NORMS, "RMSNorm"), (GATED, MLPS, "MLP"), (AT_ONCE, LAYERS_AT_ONCE, "DecoderLayer"))
    for families, classes, suffix in kinds:
        names = {"gemma3_text": "gemma3"}
        known = {names.get(family, family) for family in families}
        assert known == {name.removesuffix(suffix).lower() for name in classes} - {"smollm3"}


def test_checkpointing_keeps_the_inputs_of_the_blocks() -> None:
    facts, model = small("llama", torch.bfloat16)
    attach(model, LoRAConfig(r=4, target_modules="all"), seed=3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    setup = Setup(rank=4, checkpointing=True, attention="packed", **shape_of("llama", "packed"))
    found = activations(facts, setup, adapted(facts, setup))
    assert found.kept == pytest.approx(measured(model.train(), "llama", "packed"), rel=NEAR)
    without = activations(facts, replace(setup, checkpointing=False), adapted(facts, setup))
    assert without.kept / LAYERS < found.passing < without.kept


def test_few_labels_need_few_logits() -> None:
    facts, _ = small("llama", torch.bfloat16)
    sizes = []
    for share in (0.1, 1.0):
        setup = Setup(length=4096, labelled=share)
        sizes.append(activations(facts, setup, adapted(facts, setup)).logits)
    assert sizes[0] < sizes[1] / 5
    plain = replace(Setup(length=4096), loss="plain", attention="sdpa")
    assert activations(facts, plain, adapted(facts, plain)).logits == 14 * 100 * 4096
