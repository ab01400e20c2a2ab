"""Gated units (arXiv 2002.05202): act(gate) · up, with act = SiLU (SwiGLU) or the tanh form of GELU (GeGLU).

Shapes: gate and up [..., F], result [..., F].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import buffers, native

Act = Literal["silu", "gelu_tanh"]
KINDS: dict[Act, int] = {"silu": 0, "gelu_tanh": 1}
_PLAIN: dict[Act, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def gated_reference(gate: Tensor, up: Tensor, act: Act) -> Tensor:
    """The formula."""
    return _PLAIN[act](gate) * up


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: int) -> Tensor:
        out, width = buffers.empty_like(gate), gate.shape[-1]
        native.run("gated_forward", gate.dtype, kind, gate, up, out, gate.numel() // width, width, width)
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        g, width = grads[0].contiguous(), gate.shape[-1]
        g_gate, g_up = buffers.empty_like(gate), buffers.empty_like(up)
        rows = gate.numel() // width
        native.run("gated_backward", gate.dtype, ctx.kind, g, gate, up, g_gate, g_up, rows, width, width)
        return g_gate, g_up, None


def gated(gate: Tensor, up: Tensor, act: Act) -> Tensor:
    """`gated_reference`, in one pass each way on a CPU; nothing but gate and up is kept."""
    if gate.shape != up.shape or not native.fits(gate, up):
        return gated_reference(gate, up, act)
    out: Tensor = _Gated.apply(gate, up, KINDS[act])
    return out
