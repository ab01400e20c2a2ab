"""Root mean square normalisation (arXiv 1910.07467): y = x / √(mean(x²) + ε) · (w + offset).

Llama's offset is 0; Gemma's is 1. The fast version is for a frozen w: it rounds once, where the reference,
which is transformers' formula, rounds before the product with w, too.

Shapes: x [..., D], w [D], y [..., D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import buffers, native


def rms_norm_reference(x: Tensor, w: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """The formula, with statistics in float32; ``offset`` is added in float32."""
    wide = x if x.dtype.itemsize >= 4 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (w.to(wide.dtype) + offset)).to(x.dtype) if offset else w * wide.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, offset: float) -> Tensor:
        y, inverse = buffers.empty_like(x), buffers.empty(tuple(x.shape[:-1]), torch.float32)
        native.run("rms_forward", x.dtype, x, w, y, inverse, inverse.numel(), x.shape[-1], eps, offset)
        ctx.save_for_backward(x, w, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, w, inverse = ctx.saved_tensors
        g, gx = grads[0].contiguous(), buffers.empty_like(x)
        sizes = inverse.numel(), x.shape[-1]
        native.run("rms_backward", x.dtype, g, x, w, inverse, gx, None, *sizes, ctx.offset)
        return gx, None, None, None


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm_reference`, in one pass each way where w is frozen and a CPU computes."""
    if w.requires_grad or not native.fits(x, w):
        return rms_norm_reference(x, w, eps, offset)
    y: Tensor = _RMSNorm.apply(x, w, float(eps), float(offset))
    return y
