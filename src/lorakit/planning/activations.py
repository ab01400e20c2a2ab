"""What the forward pass keeps for the backward pass, and what both need in between.

Counted are the tensors that autograd really saves: a frozen weight saves no input of its own (only an adapter
does), and a tensor that several layers save is there once. With N tokens in a pass, width e bytes, hidden h,
feed-forward width f, H query and G key heads of width d, one block keeps:

* RMS norm: its input in float32, 4·N·h; layer norm: its input, e·N·h; both again if the model trains whole.
* Adapters: the input of each adapted layer once, however many share it, and r numbers a token. With dropout
  every one has its own input, dropped and the mask beside it; DoRA keeps its two outputs, too.
* Attention: queries, keys and values. `packed`: the weights, e·H·N·(tokens of a row, about
  half of them for long rows, whose future is left out). `sdpa`: the output and
  one float32 a head; keys and values repeated for all heads where rows are padded. `eager`: the weights twice,
  in float32 and rounded, and once more where they pass a tanh.
* Feed-forward: gate, its activation and up, 3·e·N·f; without a gate one or, for GPT-2, four of them.

With checkpointing a block keeps its input, e·N·h, and one block at a time has all of the above. Tests compare
with what autograd saves. A mixture of experts counts as one expert of the width that a token passes, and
convolutions as their outputs, twice: both are estimates.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lorakit.modelinfo.facts import Blocks, ModelFacts
from lorakit.planning.adapters import Adapted
from lorakit.planning.setup import Setup

_FLOAT32 = 4
_QUERY_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "c_attn")
_MLP_INPUTS = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "intermediate.dense")
_OUTPUTS = ("o_proj", "out_proj", "attn.c_proj", "attention.output.dense")
_TILE = 256  # queries in one product of packed attention, with the keys up to them (`lorakit.ops.attention`)
_CHUNK = 1 << 20  # logits that the loss handles at once (`lorakit.ops.loss`)
_LOSS_COPIES = 3  # of such a piece in float32


@dataclass(frozen=True)
class Activations:
    """Bytes: kept for the backward pass, needed in between by a block, and around the logits."""

    kept: int
    passing: int
    logits: int


def activations(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> Activations:
    """What one pass of one device takes besides weights."""
    if facts.blocks is None:
        return _without_blocks(facts, setup, chosen)
    blocks = facts.blocks
    block = _kept_by_block(facts, setup, chosen)
    ends = _norm(blocks, setup)  # the last norm; the first keeps nothing, as nothing before it trains
    passing = _passing(facts, setup)
    if setup.checkpointing:
        again = -(-blocks.layers // setup.every)
        inputs = setup.width * setup.tokens * blocks.hidden * again
        if setup.offload_activations and setup.device == "cuda":
            inputs = 0
        return Activations(
            inputs + (blocks.layers - again) * block + ends, block + passing, _logits(facts, setup)
        )
    first = 0 if setup.trains_base else _norm(blocks, setup)
    return Activations(blocks.layers * block + ends - first, passing, _logits(facts, setup))


def _kept_by_block(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> int:
    """Bytes that one block keeps, on average over the blocks."""
    blocks = facts.blocks
    assert blocks is not None
    return (
        blocks.norms * _norm(blocks, setup)
        + (
            2 * setup.width * setup.tokens * blocks.hidden if blocks.dropout else 0
        )  # masks of a block's two outputs
        + _attention(facts, blocks, setup)
        + _feed_forward(facts, blocks, setup)
        + _inputs(facts, blocks, setup, chosen) // blocks.layers
    )


def _norm(blocks: Blocks, setup: Setup) -> int:
    width = _FLOAT32 if blocks.norm == "rms" else setup.width
    if setup.trains_base:
        width += setup.width
    return width * setup.tokens * blocks.hidden


def _attention(facts: ModelFacts, blocks: Blocks, setup: Setup) -> int:
    """Queries, keys, values and what is between them."""
    tokens, width = setup.tokens, setup.width
    queries, keys = blocks.heads * blocks.head_dim, blocks.kv_heads * blocks.head_dim
    kind = setup.attention_of(facts)
    normed = _FLOAT32 * tokens * (queries + keys) if blocks.qk_norm else 0
    if kind == "packed":
        return normed + width * tokens * (queries + 2 * keys) + width * blocks.heads * _packed_scores(setup)
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
    copies = 3 if blocks.gated else 4 if facts.family == "gpt2" else 1
    return copies * setup.width * setup.tokens * blocks.inner


def _inputs(facts: ModelFacts, blocks: Blocks, setup: Setup, chosen: Collection[Adapted]) -> int:
    """What all adapted layers, or all layers that train, keep of their inputs."""
    tokens, width = setup.tokens, setup.width
    if setup.trains_base:
        inner = blocks.hidden + blocks.heads * blocks.head_dim + blocks.hidden + blocks.inner
        own = sum(each.count * width * tokens * each.rank for each in chosen)
        return width * tokens * inner * blocks.layers + own
    fused = setup.method != "dora" and not setup.dropout
    inputs: dict[str, int] = {}
    total = 0
    for each in chosen:
        out, features = each.module.matrix
        own = width * tokens * each.rank
        if not fused:
            own += width * each.rank * (out + features)  # the factors, rounded
        if setup.method == "dora":
            own += 2 * width * tokens * out
        if setup.dropout:
            # Dropped inputs, and the mask: a number each on a CPU, a byte each on a GPU.
            own += tokens * features * (width + (width if setup.device == "cpu" else 1))
        elif not (setup.frozen_a and fused):
            shared = _input_of(each.module.path)
            inputs[shared] = max(inputs.get(shared, 0), each.count * width * tokens * features)
        total += each.count * own
    if setup.attention_of(facts) == "sdpa":  # its output is kept anyway
        inputs = {path: size for path, size in inputs.items() if not path.endswith(_OUTPUTS)}
    return total + sum(inputs.values())


def _input_of(path: str) -> str:
    """Which tensor a layer has as its input: layers that share one are counted once."""
    for names in (_QUERY_INPUTS, _MLP_INPUTS):
        for name in names:
            if path.endswith(f".{name}"):
                return path.removesuffix(name) + names[0]
    return path


def _passing(facts: ModelFacts, setup: Setup) -> int:
    """The gradients that a block has at once: of its feed-forward part, or of its attention weights."""
    blocks = facts.blocks
    assert blocks is not None
    wide = 3 * setup.width * setup.tokens * blocks.inner
    kind = setup.attention_of(facts)
    tile = min(_TILE, setup.row or setup.length) if kind == "packed" else setup.length
    scores = 0 if kind == "sdpa" else 3 * setup.width * blocks.heads * setup.tokens * tile
    return max(wide, scores) + 2 * setup.width * setup.tokens * blocks.hidden


def _packed_scores(setup: Setup) -> int:
    """Attention weights of one head for all rows: tiles of queries, with the keys up to their end."""
    row = setup.row or setup.length
    ends = [min(start + _TILE, row) for start in range(0, row, _TILE)]
    of_row = sum(end * (end - start) for start, end in zip([0, *ends], ends, strict=False))
    return setup.tokens * of_row // row


def _logits(facts: ModelFacts, setup: Setup) -> int:
    """Logits, what the loss makes of them, and their gradient.

    `chunked` keeps logits and gradient, and three pieces of bounded size in float32 (`lorakit.ops.loss`); where
    rows are packed there are logits of labelled positions only, else of all. `plain` holds the logits, two
    copies of them in float32 and a gradient.
    """
    tokens, labelled = setup.tokens, round(setup.tokens * setup.labelled)
    capped = setup.width * facts.vocabulary * tokens if facts.blocks and facts.blocks.softcap else 0
    if setup.loss == "plain":
        return capped + facts.vocabulary * tokens * (setup.width + 3 * _FLOAT32)
    numbers = facts.vocabulary * labelled * 2
    if setup.attention_of(facts) != "packed":
        numbers += facts.vocabulary * tokens
    return capped + setup.width * numbers + _LOSS_COPIES * _FLOAT32 * min(_CHUNK, facts.vocabulary * labelled)


def _without_blocks(facts: ModelFacts, setup: Setup, chosen: Collection[Adapted]) -> Activations:
    """Convolutions by their outputs, kept by the norm and by the activation after it; else inputs alone."""
    per_input = sum(m.shape[0] * m.positions * m.count for m in facts.modules if m.kind == "conv") * 2
    adapted = sum(each.count * (each.module.matrix[1] + each.rank) for each in chosen)
    places = 1 if per_input else setup.length
    kept = setup.width * setup.batch * (per_input + places * adapted)
    return Activations(kept, 0, _logits(facts, setup) if facts.vocabulary else 0)
