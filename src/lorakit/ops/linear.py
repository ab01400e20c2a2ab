"""The LoRA linear product: ``y = x Wᵀ + b + s · (x Aᵀ) Bᵀ`` with W frozen.

`lora_linear_reference` is the definition. `lora_linear` computes the same with one autograd node, which
saves only x and ``h = x Aᵀ`` (the reference also keeps the product of the update) and accumulates the update
into y and into the gradient of x in place. `frozen_linear` is the product without an update.

W is a dense tensor, or a `Frozen` weight in a few bits. That one is read in the forward pass and once more in
the backward pass; nothing dense of it is kept in between.

Shapes: x [..., I], W [O, I], b [O], A [R, I], B [O, R], y [..., O].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops.frozen import Frozen


def lora_linear_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """The formula of LoRA (arXiv 2106.09685, §4.1) in plain autograd; A and B are cast to x's dtype."""
    h = F.linear(x, A.to(x.dtype))
    return F.linear(x, W, bias) + scaling * F.linear(h, B.to(x.dtype))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | Frozen, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        h_NR = x_NI @ A.to(x.dtype).T
        y_NO = _times(W, x_NI, bias)
        y_NO.addmm_(h_NR, B.to(x.dtype).T, alpha=scaling)
        dense, ctx.frozen = (W, None) if isinstance(W, Tensor) else (None, W)
        # A frozen A (LoRA-FA) needs no x in the backward pass: its activation memory is saved.
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[3] else None, h_NR, dense, A, B)
        ctx.scaling = scaling
        ctx.shape = x.shape
        return y_NO.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @once_differentiable  # h is saved as a number: a second derivative would be wrong without a word
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, W, A, B = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, B.shape[0])
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = (g_NO.T @ h_NR).to(B.dtype).mul_(ctx.scaling)
        if need_x or need_A:
            gh_NR = (g_NO @ B.to(g_NO.dtype)).mul_(ctx.scaling)
            if need_A:
                grad_A = (gh_NR.T @ x_NI).to(A.dtype)
            if need_x:
                grad_x = g_NO @ W if ctx.frozen is None else ctx.frozen.back(g_NO)
                grad_x = grad_x.addmm_(gh_NR, A.to(g_NO.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_A, grad_B, None


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Frozen, bias: Tensor | None) -> Tensor:
        ctx.frozen, ctx.shape = W, x.shape
        y_NO = _times(W, x.reshape(-1, x.shape[-1]), bias)
        return y_NO.view(*x.shape[:-1], y_NO.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        return ctx.frozen.back(g.reshape(-1, g.shape[-1])).view(ctx.shape), None, None


def _times(W: Tensor | Frozen, x_NI: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, a tensor of its own that may be changed in place."""
    if isinstance(W, Tensor):
        return F.linear(x_NI, W, bias)
    y_NO = W.times(x_NI)
    return y_NO if bias is None else y_NO.add_(bias)


def lora_linear(
    x: Tensor, W: Tensor | Frozen, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """`lora_linear_reference`, faster, for a frozen W; y has the dtype of x, or autocast's.

    With a dense W it falls back to the reference where one autograd node cannot serve: a trainable W or bias,
    autocast (which chooses dtypes per product), or x in another dtype than W.
    """
    trained = bias is not None and bias.requires_grad
    if isinstance(W, Tensor):
        if trained or W.requires_grad or x.dtype != W.dtype or torch.is_autocast_enabled(x.device.type):
            return lora_linear_reference(x, W, bias, A, B, scaling)
        return _LoRALinear.apply(x, W, bias, A, B, scaling)
    dtype, wanted = _dtypes(x, W)
    inside = None if bias is None or trained else bias.to(dtype)
    y: Tensor = _LoRALinear.apply(x.to(dtype), W, inside, A, B, scaling)
    return (y + bias.to(dtype) if trained and bias is not None else y).to(wanted)


def frozen_linear(x: Tensor, W: Frozen, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b; y has the dtype of x, or autocast's. Only a trainable bias gets a gradient beside x."""
    dtype, wanted = _dtypes(x, W)
    trained = bias is not None and bias.requires_grad
    inside = None if bias is None or trained else bias.to(dtype)
    y: Tensor = _FrozenLinear.apply(x.to(dtype), W, inside)
    return (y + bias.to(dtype) if trained and bias is not None else y).to(wanted)


def _dtypes(x: Tensor, W: Frozen) -> tuple[torch.dtype, torch.dtype]:
    """In which dtype to multiply, and which one the caller expects."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        return lower, lower
    return W.compute_dtype, x.dtype
