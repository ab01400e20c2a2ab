"""A decoder layer of Llama's kind (arXiv 2302.13971, §2.2) as one autograd node, where matrix units compute.

    x₁ = x + o(attention(q(n), k(n), v(n))),   n = norm(x)
    y  = x₁ + down(act(gate(m)) · up(m)),      m = norm(x₁)

The parts are those that ops/ have one by one: `rms_norm`, `projections`, `packed_attention`, `gated`. One by
one they wait for Python twenty times a layer, and for PyTorch's sums; here the sums are part of the products,
which round once, and n and m are made again in the backward pass instead of being kept (decisions/0023).

Shapes: x and y [1, T, C], q [T, H · D], k and v [T, G · D], gate and up [T, F].
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import buffers, native
from lorakit.ops.attention import Scores, starts
from lorakit.ops.dropout import Mask, draw_mask
from lorakit.ops.gated import KINDS, Act
from lorakit.ops.products import FourBits
from lorakit.ops.projections import Projection, fields, fitting


class Norm(NamedTuple):
    """RMSNorm with a frozen w [C]."""

    w: Tensor
    eps: float


class Group(NamedTuple):
    """Linear layers of one input, and their dropout's probability."""

    layers: Sequence[Projection]
    p: float = 0.0

    @property
    def rank(self) -> int:
        """Of all together."""
        return sum(layer.rank for layer in self.layers)

    @property
    def trains_down(self) -> bool:
        """Whether an A is trained, whose gradient needs the input."""
        return any(layer.A is not None and layer.A.requires_grad for layer in self.layers)


class Block(NamedTuple):
    """What a decoder layer is made of; o and down have no bias."""

    first: Norm
    qkv: Group
    o: Group
    second: Norm
    gates: Group
    down: Group
    act: Act
    size: int  # of a head
    how: Scores

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order of the forward pass."""
        return self.qkv, self.o, self.gates, self.down


class _Pass(NamedTuple):
    """What a forward pass has beside its input and the block."""

    factors: Sequence[Sequence[Tensor | FourBits]]  # the weights of each group, as the units read them
    masks: Sequence[Mask]
    lengths: tuple[int, ...]
    angles: tuple[Tensor, Tensor]  # cosines and sines [T, D]

    @property
    def depths(self) -> list[int]:
        """The widths of what the groups read."""
        return [factors[0].shape[1] for factors in self.factors]


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    q: Tensor
    k: Tensor
    v: Tensor
    attended: Tensor
    lse: Tensor
    x1: Tensor
    gate: Tensor
    up: Tensor
    inverse: Tensor  # of both norms' root mean squares, [2, T]
    h_qkv: Tensor  # of the updates, [T, R]
    h_o: Tensor
    h_gates: Tensor
    h_down: Tensor


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, how: _Pass, *trained: Tensor | None) -> Tensor:
        rows, width = x.shape[-2:]
        outs = [[_bf16(rows, factor.shape[0]) for factor in factors] for factors in how.factors]
        (q, k, v), (x1,), (gate, up), (y,) = outs
        lse, inverse = _fp32(rows, q.shape[1] // block.size), _fp32(2, rows)
        hs = [_fp32(rows, group.rank) for group in block.groups]
        kept = _Kept(q, k, v, _bf16(*q.shape), lse, x1, gate, up, inverse, *hs)
        parts = [
            fields(group.layers, factors, ys, depth, plus=plus)
            for group, factors, ys, depth, plus in zip(
                block.groups, how.factors, outs, how.depths, (None, x, None, x1), strict=True
            )
        ]
        scratch = [_bf16(rows, width), _bf16(*gate.shape)]
        native.run("block_forward", x.dtype, _described(block, how, kept, parts, [None] * 4, scratch), x)
        ctx.save_for_backward(x, *kept, *trained)
        ctx.block, ctx.how = block, how
        return y.view(x.shape)

    @staticmethod
    @once_differentiable  # h is saved as a number: a second derivative would be wrong without a word
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        kept, block, how = _Kept(*saved[: len(_Kept._fields)]), ctx.block, ctx.how
        rows, width = x.shape[-2:]
        g, g_x1 = grads[0].contiguous(), _bf16(rows, width)
        slopes = [[_bf16(*y.shape) for y in ys] for ys in ((kept.q, kept.k, kept.v), (kept.gate, kept.up))]
        gBs = [[_like(layer.B) for layer in group.layers] for group in block.groups]
        gAs = [
            torch.zeros(group.rank, depth) if group.trains_down else None
            for group, depth in zip(block.groups, how.depths, strict=True)
        ]
        parts = [
            fields(group.layers, factors, ys, depth, to)
            for group, factors, ys, depth, to in zip(
                block.groups, how.factors, (slopes[0], [g_x1], slopes[1], [g]), how.depths, gBs, strict=True
            )
        ]
        scratch = [_bf16(rows, width), _bf16(*kept.gate.shape), _bf16(*kept.q.shape), _bf16(rows, width), g_x1]
        gx = buffers.empty_like(x) if ctx.needs_input_grad[0] else None
        native.run("block_backward", x.dtype, _described(block, how, kept, parts, gAs, scratch), x, g, gx)
        found = zip(_by_layer(block, gAs, gBs), ctx.needs_input_grad[3:], strict=True)
        return gx, None, None, *(grad if needed else None for grad, needed in found)


def _bf16(rows: int, columns: int) -> Tensor:
    return buffers.empty((rows, columns), torch.bfloat16)


def _fp32(rows: int, columns: int) -> Tensor:
    return buffers.empty((rows, columns), torch.float32)


def _like(B: Tensor | None) -> Tensor | None:
    return None if B is None else torch.empty_like(B)


def _by_layer(
    block: Block, gAs: Sequence[Tensor | None], gBs: Sequence[Sequence[Tensor | None]]
) -> Iterator[Tensor | None]:
    """The gradients of A and B of each layer."""
    for group, gA, to in zip(block.groups, gAs, gBs, strict=True):
        ranks = [layer.rank for layer in group.layers]
        split = [None] * len(ranks) if gA is None else gA.split(ranks)
        for layer, each, gB in zip(group.layers, split, to, strict=True):
            yield from (None if layer.A is None else each, gB)


def _described(
    block: Block, how: _Pass, kept: _Kept, parts: Sequence[Any], gAs: Sequence[Tensor | None],
    scratch: Sequence[Tensor],
) -> Any:  # fmt: skip
    """C++'s ``Block``; whoever calls holds what it points at."""
    rows, inner = kept.gate.shape
    found: list[int | float] = [rows, kept.x1.shape[1], inner, KINDS[block.act]]
    for norm, inverse in zip((block.first, block.second), kept.inverse, strict=True):
        found += (norm.w.data_ptr(), float(norm.eps), inverse.data_ptr())
    hs = kept[-len(parts) :]
    for group, depth, mask, part, h, gA in zip(
        block.groups, how.depths, how.masks, parts, hs, gAs, strict=True
    ):
        found += (ctypes.addressof(part), len(group.layers), depth, h.data_ptr())
        found += (0 if gA is None else gA.data_ptr(), *mask.arguments())
    begin = starts(how.lengths)
    found += (tensor.data_ptr() for tensor in (kept.q, kept.k, kept.v, *how.angles, begin))
    found += (len(how.lengths), *(y.shape[1] // block.size for y in (kept.q, kept.k)), block.size)
    found += (block.how.window, float(block.how.scaling))
    found += (tensor.data_ptr() for tensor in (kept.attended, kept.lse, kept.x1, kept.gate, kept.up, *scratch))
    return native.longs(found)


def decoder_block(
    x: Tensor, block: Block, lengths: tuple[int, ...], angles: tuple[Tensor, Tensor]
) -> Tensor | None:
    """y, for segments of these ``lengths`` laid end to end; None where this is not for matrix units."""
    norms = (block.first.w, block.second.w)
    biased = any(layer.bias is not None for layer in (*block.o.layers, *block.down.layers))
    special = biased or block.how.cap or any(w.requires_grad for w in norms)
    if special or len(x) != 1 or not native.fits(x, *norms, *angles):
        return None
    factors = [fitting(x, group.layers) for group in block.groups]
    if not all(factors):
        return None
    masks = [draw_mask(group.p) for group in block.groups]
    trained = [tensor for group in block.groups for layer in group.layers for tensor in (layer.A, layer.B)]
    y: Tensor = _Block.apply(x, block, _Pass(factors, masks, lengths, angles), *trained)
    return y
