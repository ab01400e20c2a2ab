"""The LoRA linear product: ``y = x Wᵀ + b + s · (drop(x) Aᵀ) Bᵀ`` with W frozen.

`lora_linear_reference` is the definition. `lora_linear` computes the same with one autograd node, which saves
only x and ``h = drop(x) Aᵀ`` (the reference also keeps the product of the update and what was dropped) and
accumulates the update into y and into the gradient of x in place. On a CPU the thin products with A and B are
passes of C++ in float32 that read x, y and their gradients once, and make dropout's mask as they go; a matrix
product with 8 columns is no work for matrix units. `frozen_linear` is the product without an update.

W is a dense tensor, or a `Frozen` weight in a few bits. That one is read in the forward pass and once more in
the backward pass; nothing dense of it is kept in between.

Shapes: x [..., I], W [O, I], b [O], A [R, I], B [O, R], y [..., O].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import native
from lorakit.ops.dropout import Mask, draw_mask
from lorakit.ops.frozen import Frozen
from lorakit.ops.products import back, fits, times

THIN = 32  # ranks up to which C++ passes beat matrix products


def lora_linear_reference(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """The formula of LoRA (arXiv 2106.09685, §4.1) in plain autograd; A and B are cast to x's dtype."""
    h = F.linear(F.dropout(x, p), A.to(x.dtype))
    return F.linear(x, W, bias) + scaling * F.linear(h, B.to(x.dtype))


class _Thin:
    """The products with A and B as matrix products, for any device and rank."""

    @staticmethod
    def down(x_NI: Tensor, A: Tensor, mask: Mask) -> Tensor:
        return _masked(x_NI, mask) @ A.to(x_NI.dtype).T

    @staticmethod
    def up(y_NO: Tensor, h_NR: Tensor, B: Tensor, scaling: float) -> None:
        y_NO.addmm_(h_NR, B.to(y_NO.dtype).T, alpha=scaling)

    @staticmethod
    def up_back(g_NO: Tensor, h_NR: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        gh_NR = (g_NO @ B.to(g_NO.dtype)).mul_(scaling)
        return gh_NR, (g_NO.T @ h_NR).to(B.dtype).mul_(scaling)

    @staticmethod
    def down_back(
        gx_NI: Tensor | None, x_NI: Tensor | None, A: Tensor, gh_NR: Tensor, mask: Mask
    ) -> Tensor | None:
        grad_A = None if x_NI is None else (gh_NR.T @ _masked(x_NI, mask)).to(A.dtype)
        if gx_NI is not None and mask.threshold:
            gx_NI.add_(_masked(gh_NR @ A.to(gh_NR.dtype), mask))
        elif gx_NI is not None:
            gx_NI.addmm_(gh_NR, A.to(gh_NR.dtype))
        return grad_A


class _Passes:
    """The same as passes of C++, with h and its gradient in float32."""

    @staticmethod
    def down(x_NI: Tensor, A: Tensor, mask: Mask) -> Tensor:
        h_NR = x_NI.new_empty(len(x_NI), len(A), dtype=torch.float32)
        native.run("lora_down", x_NI.dtype, x_NI, A, h_NR, *x_NI.shape, len(A), *mask.arguments())
        return h_NR

    @staticmethod
    def up(y_NO: Tensor, h_NR: Tensor, B: Tensor, scaling: float) -> None:
        Bt_RO = B.T.contiguous()
        native.run("lora_up", y_NO.dtype, y_NO, h_NR, Bt_RO, *y_NO.shape, len(Bt_RO), float(scaling))

    @staticmethod
    def up_back(g_NO: Tensor, h_NR: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        Bt_RO, gh_NR = B.T.contiguous(), torch.empty_like(h_NR)
        gBt_RO = torch.zeros_like(Bt_RO)
        native.run(
            "lora_up_back",
            g_NO.dtype,
            g_NO,
            h_NR,
            Bt_RO,
            gh_NR,
            gBt_RO,
            *g_NO.shape,
            len(Bt_RO),
            len(Bt_RO),
            float(scaling),
        )
        return gh_NR, gBt_RO.T

    @staticmethod
    def down_back(
        gx_NI: Tensor | None, x_NI: Tensor | None, A: Tensor, gh_NR: Tensor, mask: Mask
    ) -> Tensor | None:
        grad_A = None if x_NI is None else torch.zeros_like(A)
        like = x_NI if gx_NI is None else gx_NI
        if like is not None:
            native.run(
                "lora_down_back",
                like.dtype,
                gx_NI,
                x_NI,
                A,
                gh_NR,
                grad_A,
                *like.shape,
                len(A),
                *mask.arguments(),
            )
        return grad_A


def _thin(x_NI: Tensor, A: Tensor, B: Tensor, trains: bool) -> type[_Thin] | type[_Passes]:
    """Who computes the thin products of these; answers are rounded as in PEFT, by matrix products."""
    small = trains and len(A) <= THIN and A.dtype == B.dtype == torch.float32 and A.is_contiguous()
    return _Passes if small and native.fits(x_NI) else _Thin


def _masked(x_NI: Tensor, mask: Mask) -> Tensor:
    return mask.applied(x_NI) if mask.threshold else x_NI


class _Update(NamedTuple):
    """What is done with A and B."""

    scaling: float
    mask: Mask
    trains: bool  # or only answers


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor | Frozen,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        update: _Update,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        thin = _thin(x_NI, A, B, update.trains)
        h_NR = thin.down(x_NI, A, update.mask)
        y_NO = _times(W, x_NI, bias)
        thin.up(y_NO, h_NR, B, update.scaling)
        dense, ctx.frozen = (W, None) if isinstance(W, Tensor) else (None, W)
        # A frozen A (LoRA-FA) needs no x in the backward pass: its activation memory is saved.
        ctx.save_for_backward(x_NI if ctx.needs_input_grad[3] else None, h_NR, dense, A, B)
        ctx.thin, ctx.update, ctx.shape = thin, update, x.shape
        return y_NO.view(*x.shape[:-1], B.shape[0])

    @staticmethod
    @once_differentiable  # h is saved as a number: a second derivative would be wrong without a word
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NR, W, A, B = ctx.saved_tensors
        g_NO = grads[0].reshape(-1, B.shape[0]).contiguous()
        need_x, _, _, need_A, need_B, _ = ctx.needs_input_grad
        gh_NR, grad_B = ctx.thin.up_back(g_NO, h_NR, B, ctx.update.scaling)
        grad_x = None
        if need_x:
            grad_x = back((g_NO, W)) if ctx.frozen is None else ctx.frozen.back(g_NO)
        grad_A = ctx.thin.down_back(grad_x, x_NI, A, gh_NR, ctx.update.mask)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, None, grad_A if need_A else None, grad_B if need_B else None, None


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


class _FrozenLinears(torch.autograd.Function):
    """x Wᵀ for several dense W of the same input, whose gradients come back as one sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        ctx.shape = x.shape
        x_NI = x.reshape(-1, x.shape[-1])
        return tuple(times((x_NI, W)).view(*x.shape[:-1], len(W)) for W in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights = ctx.saved_tensors
        pairs = [(g.reshape(-1, len(W)).contiguous(), W) for g, W in zip(grads, weights, strict=True)]
        return back(*pairs).view(ctx.shape), *(None for _ in weights)


def frozen_linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x Wᵀ for each frozen dense weight [O, I]; the gradient of x is summed as it is computed."""
    found: tuple[Tensor, ...] = _FrozenLinears.apply(x, *weights)
    return found


def _times(W: Tensor | Frozen, x_NI: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, a tensor of its own that may be changed in place."""
    if isinstance(W, Tensor) and bias is not None and not fits((x_NI, W)):
        return F.linear(x_NI, W, bias)  # rounds once
    y_NO = times((x_NI, W)) if isinstance(W, Tensor) else W.times(x_NI)
    return y_NO if bias is None else y_NO.add_(bias)


def dropout_fits(x: Tensor) -> bool:
    """Whether `lora_linear` takes p > 0 for x: elsewhere F.dropout is the faster one."""
    return native.fits(x)


def lora_linear(
    x: Tensor, W: Tensor | Frozen, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """`lora_linear_reference`, faster, for a frozen W; y has the dtype of x, or autocast's.

    With a dense W it falls back to the reference where one autograd node cannot serve: a trainable W or bias,
    autocast (which chooses dtypes per product), or x in another dtype than W. Dropout takes an x that
    `dropout_fits`.
    """
    trained = bias is not None and bias.requires_grad
    update = _Update(scaling, draw_mask(p), torch.is_grad_enabled())
    if isinstance(W, Tensor):
        if trained or W.requires_grad or x.dtype != W.dtype or torch.is_autocast_enabled(x.device.type):
            return lora_linear_reference(x, W, bias, A, B, scaling, p)
        return _LoRALinear.apply(x, W, bias, A, B, update)
    dtype, wanted = _dtypes(x, W)
    inside = None if bias is None or trained else bias.to(dtype)
    y: Tensor = _LoRALinear.apply(x.to(dtype), W, inside, A, B, update)
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
