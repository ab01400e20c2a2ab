"""What the forward pass keeps for the backward pass, and what both need in between.

Counted are the tensors that autograd really saves: a frozen weight saves no input of its own (only an adapter
does), and a tensor that several layers save is there once. With N tokens in a pass, width e bytes, hidden h,
feed-forward width f, H query and G key heads of width d, one block keeps:

* RMS norm: its input, e·N·h, where a C++ pass computes it, else that in float32; layer norm: its input.
* Adapters: the input of each adapted layer once, however many share it, and r numbers a token; no inputs where
  a decoder layer is one operation, which makes them again. DoRA keeps its two outputs, too. Dropout: nothing
  more where C++ passes make its mask; else every layer has its own input, dropped, and the mask beside it.
* Attention: queries, keys and values. `packed`: the output and one float32 a head by C++ passes, which make the
  weights again;
  else the weights, e·H·N·(tokens of a row, about half of them for long rows, whose future is left out). `sdpa`:
  the output and one float32 a head; keys and values repeated for all heads where rows are padded. `eager`: the
  weights twice, in float32 and rounded, and once more where they pass a tanh.
* Feed-forward: gate and up, 2·e·N·f, and once more without a C++ pass; without a gate one or, for GPT-2, four.

With checkpointing a block keeps its input, e·N·h, and one block at a time has all of the above. Tests compare
with what autograd saves. A mixture of experts counts as one expert of the width that a token passes, and
convolutions as their outputs, twice: both are estimates.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from lorakit.modelinfo.facts import Blocks, ModelFacts
from lorakit.planning.adapters import Adapted, trained_whole
from lorakit.planning.setup import Setup

_FLOAT32 = 4
_QUERY_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "c_attn")
_MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "intermediate.dense")
_OUTPUTS = ("o_proj", "out_proj", "attn.c_proj", "attention.output.dense")
_TILE = 256  # queries in one product of packed attention, with the keys up to them (`lorakit.ops.attention`)
_CHUNK, _PRODUCT = 1 << 20, 1 << 25  # logits that the loss handles, and makes, at once (`lorakit.ops.loss`)
_LOSS_COPIES = 3  # of such a piece in float32
_THIN = 32  # ranks up to which C++ passes multiply with A and B, in float32 (`lorakit.ops.linear`)
# Families whose norms, and whose gated units, C++ passes compute (`lorakit.models.fast`).
NORMED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"})
GATED = NORMED - {"phi3"}
# Families whose decoder layers are one operation by matrix units (`lorakit.models.decoder`).
AT_ONCE = frozenset({"llama", "mistral", "qwen2"})


@dataclass(frozen=True)
class Activations:
    """Bytes: kept for the backward pass, needed in between by a block, and around the logits.

    ``block`` is what comes and goes while one block is computed, forward and backward.
    """

    kept: int
    passing: int
    logits: int
    block: int


def activations(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> Activations:
    """What one pass of one device takes besides weights."""
    if facts.blocks is None:
        return _without_blocks(facts, setup, chosen)
    blocks = facts.blocks
    block = _kept_by_block(facts, setup, chosen)
    ends = _norm(facts, blocks, setup)  # the last norm; the first keeps nothing, as nothing before it trains
    passing = _passing(facts, setup, chosen)
    logits = _logits(facts, setup, chosen)
    if setup.checkpointing:
        again = -(-blocks.layers // setup.every)
        inputs = setup.width * setup.tokens * blocks.hidden * again
        if setup.offload_activations and setup.device == "cuda":
            inputs = 0
        kept = inputs + (blocks.layers - again) * block + ends
        return Activations(kept, block + passing, logits, block + passing)
    first = 0 if setup.trains_base else _norm(facts, blocks, setup)
    return Activations(blocks.layers * block + ends - first, passing, logits, block + passing)


def _kept_by_block(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> int:
    """Bytes that one block keeps, on average over the blocks."""
    blocks = facts.blocks
    assert blocks is not None
    return (
        blocks.norms * _norm(facts, blocks, setup)
        + (
            2 * setup.width * setup.tokens * blocks.hidden if blocks.dropout else 0
        )  # masks of a block's two outputs
        + _attention(facts, blocks, setup)
        + _feed_forward(facts, blocks, setup)
        + _inputs(facts, blocks, setup, chosen) // blocks.layers
    )


def _norm(facts: ModelFacts, blocks: Blocks, setup: Setup) -> int:
    return setup.tokens * _normed(facts, blocks, setup, blocks.hidden, 1)


def _normed(facts: ModelFacts, blocks: Blocks, setup: Setup, numbers: int, norms: int) -> int:
    """Bytes that so many norms keep of one token, which has so many numbers for them."""
    if blocks.norm == "rms" and setup.compiled and facts.family in NORMED and not setup.trains_base:
        return setup.width * numbers + _FLOAT32 * norms
    width = _FLOAT32 if blocks.norm == "rms" else setup.width
    return (width + setup.width * setup.trains_base) * numbers


def _attention(facts: ModelFacts, blocks: Blocks, setup: Setup) -> int:
    """Queries, keys, values and what is between them."""
    tokens, width = setup.tokens, setup.width
    queries, keys = blocks.heads * blocks.head_dim, blocks.kv_heads * blocks.head_dim
    kind = setup.attention_of(facts)
    normed = 0
    if blocks.qk_norm and facts.family == "gemma3_text":  # where heads stand before positions already
        normed = _FLOAT32 * tokens * (queries + keys)
    elif blocks.qk_norm:
        normed = tokens * _normed(facts, blocks, setup, queries + keys, blocks.heads + blocks.kv_heads)
    if kind == "packed":
        if setup.compiled:
            return normed + tokens * (width * 2 * (queries + keys) + _FLOAT32 * blocks.heads)
        return normed + width * (tokens * (queries + 2 * keys) + _packed_scores(setup) * blocks.heads)
    repeated = queries if setup.batch > 1 or kind == "eager" else keys
    if kind == "eager":
        rounded = 0 if width == _FLOAT32 or blocks.norm == "layer" else width
        exact = width if blocks.norm == "layer" else _FLOAT32
        scores = exact + rounded + (width if blocks.softcap else 0)
        return normed + tokens * (width * (queries + 2 * repeated) + scores * blocks.heads * setup.length)
    mask = width * tokens * setup.length if setup.batch > 1 else 0
    if blocks.dropout and setup.device == "cpu":
        # No fused kernel drops weights there. In float32: queries, keys, values; weights, mask, product.
        return mask + tokens * (width * queries + 3 * _FLOAT32 * (queries + blocks.heads * setup.length))
    return normed + mask + tokens * (width * (2 * queries + 2 * repeated) + _FLOAT32 * blocks.heads)


def _feed_forward(facts: ModelFacts, blocks: Blocks, setup: Setup) -> int:
    copies = 2 if setup.compiled and facts.family in GATED else 3
    if not blocks.gated:
        copies = 4 if facts.family == "gpt2" else 1
    return copies * setup.width * setup.tokens * blocks.inner


def _inputs(facts: ModelFacts, blocks: Blocks, setup: Setup, chosen: Collection[Adapted]) -> int:
    """What all adapted layers, or all layers that train, keep of their inputs."""
    tokens, width = setup.tokens, setup.width
    if setup.trains_base:
        inner = blocks.hidden + blocks.heads * blocks.head_dim + blocks.hidden + blocks.inner
        own = sum(each.count * width * tokens * each.rank for each in chosen)
        return width * tokens * inner * blocks.layers + own
    fused = setup.method != "dora" and (setup.compiled or not setup.dropout)
    inputs: dict[str, int] = {}
    total = 0
    for each in chosen:
        out, features = each.module.matrix
        own = tokens * each.rank * (_FLOAT32 if fused and setup.compiled and each.rank <= _THIN else width)
        if not fused:
            own += width * each.rank * (out + features)  # the factors, rounded
        if setup.method == "dora":
            own += 2 * width * tokens * out
        if setup.dropout and not fused:
            # Dropped inputs, and the mask: a number each on a CPU, a byte each on a GPU.
            own += tokens * features * (width + (width if setup.device == "cpu" else 1))
        elif not (setup.frozen_a and fused):
            shared = _input_of(each.module.path)
            inputs[shared] = max(inputs.get(shared, 0), each.count * width * tokens * features)
        total += each.count * own
    kind = setup.attention_of(facts)
    if _at_once(facts, setup, chosen):  # norms' results and gated ones are made again
        return total
    if kind == "sdpa" or (kind == "packed" and setup.compiled):  # its output is kept anyway
        inputs = {path: size for path, size in inputs.items() if not path.endswith(_OUTPUTS)}
    return total + sum(inputs.values())


def _at_once(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> bool:
    """Whether a decoder layer is one operation, which takes plain LoRA on 16- and 4-bit weights."""
    fits = setup.compiled and setup.units and setup.precision == "bf16" and setup.bits in (4, 16)
    plain = setup.method == "lora" and all(each.rank <= _THIN for each in chosen) and not setup.checkpointing
    return fits and plain and facts.family in AT_ONCE and setup.attention_of(facts) == "packed"


def _input_of(path: str) -> str:
    """Which tensor a layer has as its input: layers that share one are counted once."""
    for names in (_QUERY_INPUTS, _MLP_INPUTS):
        for name in names:
            if path.endswith(f".{name}"):
                return path.removesuffix(name) + names[0]
    return path


def _passing(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> int:
    """The gradients that a block has at once, less what it has given up by then.

    First those of the feed-forward part: of its inner numbers, of gate and of up. When attention's turn comes,
    the feed-forward part has gone.
    """
    blocks = facts.blocks
    assert blocks is not None
    tokens, width = setup.tokens, setup.width
    kind = setup.attention_of(facts)
    if kind == "packed" and setup.compiled:
        attention = _packed_backward(blocks, setup)
    else:
        tile = min(_TILE, setup.row or setup.length) if kind == "packed" else setup.length
        attention = 0 if kind == "sdpa" else 3 * width * blocks.heads * tokens * tile
    given_up = any(each.module.matrix[1] == blocks.inner for each in chosen) and not setup.frozen_a
    inner = (2 if given_up else 3) * width * tokens * blocks.inner
    if setup.method == "dora":  # scales its outputs and adds them up
        inner += 3 * width * tokens * blocks.inner
    return max(inner, attention - _feed_forward(facts, blocks, setup)) + 2 * width * tokens * blocks.hidden


def _packed_backward(blocks: Blocks, setup: Setup) -> int:
    """What the backward pass of packed attention has at once (`lorakit/ops/attention.cpp`).

    The gradient laid out anew and those of q, k and v; and the space in which threads work, on one row and one
    key head each: its queries, keys, values and gradients, twice or more, and float32 sums for keys and values.
    """
    row, width, size = setup.row or setup.length, setup.width, blocks.head_dim
    queries, keys = blocks.heads * size, blocks.kv_heads * size
    task = row * (width * (2 * queries // blocks.kv_heads + 5 * size) + 3 * _FLOAT32 * size)
    threads = min(blocks.kv_heads, os.cpu_count() or 1)
    return width * setup.tokens * (2 * queries + 2 * keys) + threads * task


def _packed_scores(setup: Setup) -> int:
    """Attention weights of one head for all rows: tiles of queries, with the keys up to their end."""
    row = setup.row or setup.length
    ends = [min(start + _TILE, row) for start in range(0, row, _TILE)]
    of_row = sum(end * (end - start) for start, end in zip([0, *ends], ends, strict=False))
    return setup.tokens * of_row // row


def _logits(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> int:
    """Logits, what the loss makes of them, and their gradient.

    `plain` holds the logits of all positions, two copies of them in float32 and a gradient. `chunked` makes
    them a piece at a time and keeps the gradient of the head's input, for labelled positions only, where rows
    are packed and the head is frozen. If it trains, logits of these positions and their gradient are there as a
    whole; where rows are padded, logits of all positions and those of the labelled ones.
    """
    tokens, labelled = setup.tokens, round(setup.tokens * setup.labelled)
    numbers = facts.vocabulary * labelled
    capped = setup.width * facts.vocabulary * tokens if facts.blocks and facts.blocks.softcap else 0
    if setup.loss == "plain":
        return capped + facts.vocabulary * tokens * (setup.width + 3 * _FLOAT32)
    pieces = _LOSS_COPIES * _FLOAT32 * min(_CHUNK, numbers)
    if setup.attention_of(facts) != "packed":
        return capped + setup.width * (facts.vocabulary * tokens + numbers) + pieces
    if _head_trains(facts, setup, chosen) or facts.blocks is None:
        return setup.width * 2 * numbers + pieces
    made = setup.width * (2 * labelled * facts.blocks.hidden + min(_PRODUCT, numbers))
    return made if setup.compiled else made + pieces


def _head_trains(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> bool:
    adapters = any(each.module.path == facts.head for each in chosen)
    return setup.trains_base or adapters or facts.head in trained_whole(facts, setup)


def _without_blocks(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> Activations:
    """Convolutions by their outputs, kept by the norm and by the activation after it; else inputs alone."""
    per_input = sum(m.shape[0] * m.positions * m.count for m in facts.modules if m.kind == "conv") * 2
    adapted = sum(each.count * (each.module.matrix[1] + each.rank) for each in chosen)
    places = 1 if per_input else setup.length
    kept = setup.width * setup.batch * (per_input + places * adapted)
    return Activations(kept, 0, _logits(facts, setup, chosen) if facts.vocabulary else 0, 0)
