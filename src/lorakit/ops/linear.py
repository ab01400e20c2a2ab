"""The LoRA linear product: ``y = x Wᵀ + b + s · (x Aᵀ) Bᵀ`` with W frozen.

`lora_linear_reference` is the definition. `lora_linear` computes the same with one autograd node, which
saves only x and ``h = x Aᵀ`` (the reference also keeps the product of the update) and accumulates the update
into y and into the gradient of x in place.

Shapes: x [..., I], W [O, I], b [O], A [R, I], B [O, R], y [..., O].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """The formula of LoRA (arXiv 2106.09685, §4.1) in plain autograd; A and B are cast to x's dtype."""
    h = F.linear(x, A.to(x.dtype))
    return F.linear(x, W, bias) + scaling * F.linear(h, B.to(x.dtype))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        h_NR = x_NI @ A.to(x.dtype).T
        y_NO = F.linear(x_NI, W, bias)
        y_NO.addmm_(h_NR, B.to(x.dtype).T, alpha=scaling)
        # A frozen A (LoRA-FA) needs no x in the backward pass: its activation memory is saved.
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[3] else None, h_NR, W, A, B)
        ctx.scaling = scaling
        ctx.shape = x.shape
        return y_NO.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable  # h is saved as a number: a second derivative would be wrong without a word
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, W, A, B = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, W.shape[0])
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        if need_B:
            grad_B = (g_NO.T @ h_NR).to(B.dtype).mul_(ctx.scaling)
        if need_x or need_A:
            gh_NR = (g_NO @ B.to(g_NO.dtype)).mul_(ctx.scaling)
            if need_A:
                grad_A = (gh_NR.T @ x_NI).to(A.dtype)
            if need_x:
                grad_x = (g_NO @ W).addmm_(gh_NR, A.to(g_NO.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_A, grad_B, None


def lora_linear(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """`lora_linear_reference`, faster, for a frozen W and bias.

    Falls back to the reference where one autograd node cannot serve: a trainable W or bias, autocast (which
    chooses dtypes per product), or x in another dtype than W.
    """
    trained = W.requires_grad or (bias is not None and bias.requires_grad)
    if trained or x.dtype != W.dtype or torch.is_autocast_enabled(x.device.type):
        return lora_linear_reference(x, W, bias, A, B, scaling)
    return _LoRALinear.apply(x, W, bias, A, B, scaling)
