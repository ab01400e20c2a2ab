"""Linear layers of one input, with LoRA updates or without, as one autograd node.

q, k and v read the same x, as gate and up do. Their A meet it in one pass, their updates are part of the
products with W, and the gradient of x comes back as one sum. They share one dropout mask, too: what is dropped
is x. This is for matrix units; where they do not compute, `lorakit.ops.linear` takes layer by layer.

Shapes: x [..., I], W [O, I], A [R, I], B [O, R], y [..., O].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import buffers, native, products
from lorakit.ops.dropout import Mask, draw_mask
from lorakit.ops.frozen import Frozen
from lorakit.ops.linear import THIN, frozen_linear, frozen_linears, lora_linear
from lorakit.ops.products import FourBits


class Projection(NamedTuple):
    """A frozen W, and an update scaling · B A or none."""

    W: Tensor | Frozen
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """0 without an update."""
        return 0 if self.A is None else len(self.A)

    @property
    def thin(self) -> bool:
        """Whether the C++ passes take the update: in float32, of a small rank, nothing else trained."""
        frozen = [tensor for tensor in (self.W, self.bias) if isinstance(tensor, Tensor)]
        update = [tensor for tensor in (self.A, self.B) if tensor is not None]
        if any(tensor.requires_grad for tensor in frozen):
            return False
        return self.rank <= THIN and all(t.dtype == torch.float32 and t.is_contiguous() for t in update)

    def factor(self, dtype: torch.dtype) -> Tensor | FourBits | None:
        """W as matrix units read it, if they can and it computes in this dtype."""
        if isinstance(self.W, Tensor):
            return self.W
        return self.W.factor() if self.W.compute_dtype == dtype else None


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Projection], factors: list[Tensor | FourBits], mask: Mask,
        *trained: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x_NI = x.reshape(-1, x.shape[-1])
        rows, width = x_NI.shape
        h_NR = buffers.empty((rows, sum(layer.rank for layer in layers)), torch.float32)
        ys = tuple(buffers.empty((rows, factor.shape[0]), x.dtype) for factor in factors)
        described = fields(layers, factors, ys, width)
        native.run("projections", x.dtype, described, len(layers), x_NI, h_NR, rows, width, *mask.arguments())
        # A frozen A (LoRA-FA) needs no x in the backward pass: its activation memory is saved.
        needs_x = any(ctx.needs_input_grad[4::2])
        dense = [factor if isinstance(factor, Tensor) else None for factor in factors]
        ctx.save_for_backward(x_NI if needs_x else None, h_NR, *dense, *trained)
        ctx.layers, ctx.factors, ctx.mask, ctx.shape = layers, factors, mask, x.shape
        return tuple(y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in ys)

    @staticmethod
    @once_differentiable  # h is saved as a number: a second derivative would be wrong without a word
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, *_ = ctx.saved_tensors
        layers: Sequence[Projection] = ctx.layers
        rows, width = len(h_NR), ctx.shape[-1]
        gs = [g.reshape(rows, -1).contiguous() for g in grads]
        gx_NI = buffers.empty((rows, width), gs[0].dtype) if ctx.needs_input_grad[0] else None
        gA_RI = None if x_NI is None else h_NR.new_zeros(h_NR.shape[1], width)
        gBs = [None if layer.B is None else torch.empty_like(layer.B) for layer in layers]
        given = fields(layers, ctx.factors, gs, width, gBs), len(layers), x_NI, h_NR, gA_RI, gx_NI, rows, width
        native.run("projections_back", gs[0].dtype, *given, *ctx.mask.arguments())
        gAs = (None,) * len(layers) if gA_RI is None else gA_RI.split([layer.rank for layer in layers])
        pairs = [grad for pair in zip(gAs, gBs, strict=True) for grad in pair]
        wanted = (
            grad if needed else None for grad, needed in zip(pairs, ctx.needs_input_grad[4:], strict=True)
        )
        return None if gx_NI is None else gx_NI.view(ctx.shape), None, None, None, *wanted


def fields(
    layers: Sequence[Projection], factors: Sequence[Tensor | FourBits], ys: Sequence[Tensor], width: int,
    gBs: Sequence[Tensor | None] = (), plus: Tensor | None = None,
) -> Any:  # fmt: skip
    """C++'s ``Projection`` of each layer; y, gB and ``plus`` [N, O], which is added to y, are of a pass."""
    found: list[int | float] = []
    for layer, factor, y, gB in zip(layers, factors, ys, gBs or [None] * len(layers), strict=True):
        added, stride = (layer.bias, 0) if plus is None else (plus, factor.shape[0])
        pointers = (0 if tensor is None else tensor.data_ptr() for tensor in (layer.A, layer.B, gB, added))
        A, B, to, more = pointers
        found += (y.data_ptr(), *products.described(factor, width))
        found += (factor.shape[0], layer.rank, A, B, to, float(layer.scaling), more, stride)
    return native.longs(found)


def projections(x: Tensor, layers: Sequence[Projection], p: float = 0.0) -> tuple[Tensor, ...]:
    """x Wᵀ + b + scaling · (drop(x) Aᵀ) Bᵀ of each layer; ``p`` is dropout's probability.

    Where matrix units do not compute, one layer after the other, with a mask for each.
    """
    factors = fitting(x, layers)
    if factors:
        mask = draw_mask(p)
        trained = [tensor for layer in layers for tensor in (layer.A, layer.B)]
        found: tuple[Tensor, ...] = _Projections.apply(x, layers, factors, mask, *trained)
        return found
    dense = [layer.W for layer in layers if isinstance(layer.W, Tensor) and layer.thin]
    bare = len(dense) == len(layers) and all(layer.A is None and layer.bias is None for layer in layers)
    same = all(W.dtype == x.dtype for W in dense) and not torch.is_autocast_enabled(x.device.type)
    if bare and same:
        return frozen_linears(x, *dense)
    return tuple(_alone(x, layer, p) for layer in layers)


def _alone(x: Tensor, layer: Projection, p: float) -> Tensor:
    W, bias, A, B, scaling = layer
    if A is not None and B is not None:
        return lora_linear(x, W, bias, A, B, scaling, p)
    return F.linear(x, W, bias) if isinstance(W, Tensor) else frozen_linear(x, W, bias)


def fitting(x: Tensor, layers: Sequence[Projection]) -> list[Tensor | FourBits]:
    """The weights as matrix units read them, if these train in bfloat16 with adapters in float32; else none."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return []
    if not all(layer.thin and (layer.bias is None or layer.bias.dtype == x.dtype) for layer in layers):
        return []
    x_NI = x.reshape(-1, x.shape[-1])
    found = [layer.factor(x.dtype) for layer in layers]
    factors = [factor for factor in found if factor is not None]
    fit = len(factors) == len(layers) and products.fits(*((x_NI, factor) for factor in factors))
    return factors if fit else []
