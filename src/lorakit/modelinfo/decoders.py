"""Decoders, from the keys of their ``config.json`` to modules: Llama and its relatives, and GPT-2.

The families differ in few things: which projections have a bias, whether queries and keys are normed, how many
norms a block has, whether products are fused, whether experts stand in the feed-forward part. Those are one row
of `FAMILIES` each. Paths and shapes are those that transformers 5 builds; tests compare all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.modelinfo.facts import Blocks, Kind, Module
from lorakit.modelinfo.keys import Keys


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Attributes:
        qkv_bias: queries, keys and values always have a bias; the output never.
        qk_norm: queries and keys are normed, head by head.
        norms: norms in a block: four where the outputs of its two halves are normed, too.
        fused: one product makes queries, keys and values, one makes gate and up.
        experts: the feed-forward part is a mixture.
        softcap: scores and logits pass a tanh.
        defaults: what transformers takes for keys that a file leaves out.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    fused: bool = False
    experts: bool = False
    softcap: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


_TIED = {"tie_word_embeddings": True}
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True, defaults={"head_dim": 128}),
    "gemma": Family(defaults={**_TIED, "head_dim": 256}),
    "gemma2": Family(norms=4, softcap=True, defaults={**_TIED, "head_dim": 256}),
    "gemma3_text": Family(
        qk_norm=True,
        norms=4,
        defaults={
            **_TIED,
            "head_dim": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 262208,
        },
    ),
    "phi3": Family(fused=True),
    "mixtral": Family(experts=True),
    "qwen2_moe": Family(qkv_bias=True, experts=True),
    "qwen3_moe": Family(qk_norm=True, experts=True, defaults={"head_dim": 128}),
}


def modules_at(
    prefix: str, blocks: tuple[int, ...], *rows: tuple[str, Kind, tuple[int, ...], int]
) -> Iterator[Module]:
    """Modules of a block: name, kind, shape and numbers beside the weight."""
    for name, kind, shape, extra in rows:
        yield Module(f"{prefix}.{name}", kind, shape, extra, blocks)


def decoder(keys: Keys, family: Family, root: str = "model") -> tuple[list[Module], Blocks]:
    """The modules of a relative of Llama, below ``root``, and its output head."""
    hidden, layers, vocabulary = (
        keys.number("hidden_size"), keys.number("num_hidden_layers"), keys.number("vocab_size"),
    )  # fmt: skip
    heads = keys.number("num_attention_heads")
    groups = keys.optional("num_key_value_heads") or heads
    dim = keys.optional("head_dim") or hidden // heads
    every = tuple(range(layers))
    block = f"{root}.layers.*"
    modules = [Module(f"{root}.embed_tokens", "embedding", (vocabulary, hidden))]
    modules += modules_at(f"{block}.self_attn", every, *_attention(keys, family, (hidden, heads, groups, dim)))
    inner, active = keys.optional("intermediate_size") or 0, 0
    if family.experts:
        mixed, inner, active = _mixture(keys, block, hidden)
        modules += mixed
    else:
        modules += modules_at(f"{block}.mlp", every, *_feed_forward(keys, family, hidden))
    names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    modules += modules_at(block, every, *((name, "norm", (hidden,), 0) for name in names[: family.norms]))
    modules.append(Module(f"{root}.norm", "norm", (hidden,)))
    modules.append(Module("lm_head", "linear", (vocabulary, hidden), shared=keys.flag("tie_word_embeddings")))
    return modules, Blocks(
        layers, hidden, heads, groups, dim, inner,
        norms=family.norms, qk_norm=family.qk_norm, softcap=family.softcap, active=active,
    )  # fmt: skip


Row = tuple[str, Kind, tuple[int, ...], int]


def _attention(keys: Keys, family: Family, sizes: tuple[int, int, int, int]) -> list[Row]:
    hidden, heads, groups, dim = sizes
    everywhere = keys.flag("attention_bias")
    biased = everywhere or family.qkv_bias
    widths = {"q_proj": heads * dim, "k_proj": groups * dim, "v_proj": groups * dim}
    if family.fused:
        widths, biased, everywhere = {"qkv_proj": (heads + 2 * groups) * dim}, False, False
    rows: list[Row] = [
        (name, "linear", (width, hidden), width if biased else 0) for name, width in widths.items()
    ]
    rows.append(("o_proj", "linear", (hidden, heads * dim), hidden if everywhere else 0))
    return rows + [(name, "norm", (dim,), 0) for name in ("q_norm", "k_norm") if family.qk_norm]


def _feed_forward(keys: Keys, family: Family, hidden: int) -> list[Row]:
    inner, biased = keys.number("intermediate_size"), keys.flag("mlp_bias")
    if family.fused:
        return [
            ("gate_up_proj", "linear", (2 * inner, hidden), 0), ("down_proj", "linear", (hidden, inner), 0),
        ]  # fmt: skip
    return [
        ("gate_proj", "linear", (inner, hidden), inner if biased else 0),
        ("up_proj", "linear", (inner, hidden), inner if biased else 0),
        ("down_proj", "linear", (hidden, inner), hidden if biased else 0),
    ]


def _mixture(keys: Keys, block: str, hidden: int) -> tuple[list[Module], int, int]:
    """Experts, their router and what stands beside them; the width that one token passes; how many experts."""
    layers = keys.number("num_hidden_layers")
    step, dense = keys.optional("decoder_sparse_step") or 1, set(keys.numbers("mlp_only_layers"))
    mixed = tuple(n for n in range(layers) if n not in dense and (n + 1) % step == 0)
    count = keys.number("num_local_experts", "num_experts")
    inner = keys.number("moe_intermediate_size", "intermediate_size")
    active = keys.number("num_experts_per_tok")
    modules = list(
        modules_at(
            f"{block}.mlp", mixed,
            ("gate", "other", (count, hidden), 0),
            ("experts.gate_up_proj", "experts", (count, 2 * inner, hidden), 0),
            ("experts.down_proj", "experts", (count, hidden, inner), 0),
        )
    )  # fmt: skip
    width = active * inner
    if beside := keys.optional("shared_expert_intermediate_size"):
        width += beside
        modules += modules_at(
            f"{block}.mlp", mixed,
            ("shared_expert.gate_proj", "linear", (beside, hidden), 0),
            ("shared_expert.up_proj", "linear", (beside, hidden), 0),
            ("shared_expert.down_proj", "linear", (hidden, beside), 0),
            ("shared_expert_gate", "linear", (1, hidden), 0),
        )  # fmt: skip
    if plain := tuple(n for n in range(layers) if n not in mixed):
        modules += modules_at(f"{block}.mlp", plain, *_feed_forward(keys, Family(), hidden))
    return modules, width, active


def gpt2(keys: Keys) -> tuple[list[Module], Blocks]:
    """GPT-2, whose linear layers keep their weight transposed; here it is [out, in] as everywhere."""
    hidden, layers, heads = keys.number("n_embd"), keys.number("n_layer"), keys.number("n_head")
    vocabulary, inner = keys.number("vocab_size"), keys.optional("n_inner") or 4 * hidden
    every = tuple(range(layers))
    modules = [
        Module("transformer.wte", "embedding", (vocabulary, hidden)),
        Module("transformer.wpe", "embedding", (keys.number("n_positions", "n_ctx"), hidden)),
        *modules_at(
            "transformer.h.*", every,
            ("ln_1", "norm", (hidden,), hidden),
            ("attn.c_attn", "linear", (3 * hidden, hidden), 3 * hidden),
            ("attn.c_proj", "linear", (hidden, hidden), hidden),
            ("ln_2", "norm", (hidden,), hidden),
            ("mlp.c_fc", "linear", (inner, hidden), inner),
            ("mlp.c_proj", "linear", (hidden, inner), hidden),
        ),
        Module("transformer.ln_f", "norm", (hidden,), hidden),
        Module("lm_head", "linear", (vocabulary, hidden), shared=True),
    ]  # fmt: skip
    return modules, Blocks(
        layers, hidden, heads, heads, hidden // heads, inner,
        gated=False, norm="layer", dropout=keys.share("attn_pdrop") > 0,
    )  # fmt: skip
