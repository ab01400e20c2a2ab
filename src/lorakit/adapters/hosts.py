"""Hosts: what an adapter sits on. A host knows its module's shapes and how A and B act on its input.

Layout, everywhere in lorakit: A [r, in] goes down, B [out, r] goes up, ΔW = B A [out, in]. Every frozen weight
has a view as such a matrix, so that norms, decompositions and reports need no second case.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import TargetError
from lorakit.quant.store import QUANTIZED, store_of


class Host:
    """One kind of base module; this class itself is a linear layer: weight [out, in], input [..., in].

    Attributes:
        linear: input and output are [..., features], so that base and update may be one fused product.
        transposed: the weight is stored as [in, out].
    """

    name: ClassVar[str] = "linear"
    linear: ClassVar[bool] = True
    transposed: ClassVar[bool] = False

    def matrix(self, W: Tensor) -> Tensor:
        """The weight as a view [out, in]."""
        return W.T if self.transposed else W.flatten(1)

    def like_weight(self, M: Tensor, W: Tensor) -> Tensor:
        """A matrix [out, in] in the layout of the weight W; undoes `matrix`."""
        return M.T if self.transposed else M.reshape(W.shape)

    def shapes(self, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank r."""
        out, features = self.matrix(torch.empty(store_of(module).shape, device="meta")).shape
        return (r, features), (out, r)

    def fan_in(self, A: Tensor) -> int:
        """How many inputs one entry of h = A x sums over."""
        return A[0].numel()

    def down(self, module: Any, x: Tensor, A: Tensor) -> Tensor:
        """h = A x."""
        return F.linear(x, A)

    def up(self, module: Any, h: Tensor, B: Tensor) -> Tensor:
        """B h."""
        return F.linear(h, B)

    def delta(self, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        """B A, in the layout of the weight W."""
        return self.like_weight(B.flatten(1) @ A.flatten(1), W)

    def spread(self, v: Tensor, y: Tensor) -> Tensor:
        """A value per output unit, shaped to multiply the output y."""
        return v

    def silence(self, module: Any, A: Tensor) -> None:
        """Zero what of A must never have an effect, and gets no gradient."""

    def refusal(self, module: Any, r: int) -> str | None:
        """Why this very module cannot carry an adapter of rank r, if it cannot."""
        return None


class TransposedLinearHost(Host):
    """transformers' ``Conv1D`` (GPT-2): a linear layer with weight [in, out]."""

    name = "conv1d-linear"
    transposed = True


class EmbeddingHost(Host):
    """``nn.Embedding``: weight [tokens, features], input token ids; h is a column of A."""

    name = "embedding"
    linear = False
    transposed = True

    def fan_in(self, A: Tensor) -> int:
        """A lookup sums over nothing."""
        return 1

    def down(self, module: nn.Embedding, x: Tensor, A: Tensor) -> Tensor:
        """[...] → [..., r]."""
        return F.embedding(x, A.T, module.padding_idx)

    def silence(self, module: nn.Embedding, A: Tensor) -> None:
        """The padding token's vector stays what it is."""
        if module.padding_idx is not None:
            A[:, module.padding_idx] = 0.0

    def refusal(self, module: nn.Embedding, r: int) -> str | None:
        """A renormalising embedding rewrites its frozen weight in each forward pass."""
        return "its max_norm changes the weight as it runs" if module.max_norm is not None else None


class ConvHost(Host):
    """``nn.Conv1d/2d/3d``: weight [out, in/g, k…]. A convolves as the module does, to r channels; B is 1×1.

    With g groups A is [r, in/g, k…] and B [out, r/g, 1…]: group j of the outputs sees group j of the inputs, as
    in the base, so that the update can be merged.
    """

    name = "conv"
    linear = False

    def __init__(self, axes: int) -> None:
        self.axes = axes

    def shapes(self, module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A [r, in/g, k…], B [out, r/g, 1…]."""
        kernel = module.kernel_size
        return (r, module.in_channels // module.groups, *kernel), (
            module.out_channels, r // module.groups, *(1 for _ in kernel)
        )  # fmt: skip

    def down(self, module: Any, x: Tensor, A: Tensor) -> Tensor:
        """With the module's own stride, padding (and its mode), dilation and groups."""
        return module._conv_forward(x, A, None)

    def up(self, module: Any, h: Tensor, B: Tensor) -> Tensor:
        """A 1×1 convolution."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        return convolve(h, B, groups=module.groups)

    def delta(self, A: Tensor, B: Tensor, W: Tensor) -> Tensor:
        """One product a group."""
        r = A.shape[0]
        g = r // B.shape[1]
        blocks = torch.bmm(B.reshape(g, -1, r // g), A.reshape(g, r // g, -1))
        return blocks.reshape(W.shape)

    def spread(self, v: Tensor, y: Tensor) -> Tensor:
        """Channels stand before the spatial axes."""
        return v.view(-1, *(1 for _ in range(self.axes)))

    def refusal(self, module: Any, r: int) -> str | None:
        """Every group needs its share of the rank."""
        if r % module.groups:
            step = module.groups
            return f"rank {r} does not divide by its {step} groups: take {math.ceil(r / step) * step}"
        return None


# By exact type, written as its full name (transformers is not imported here): a subclass may compute something
# else in its forward pass (quantised layers and scaled embeddings do), or never be called at all
# (`nn.MultiheadAttention` reads its projections' weights directly), and an adapter would silently do nothing.
HOSTS: dict[str, Host] = {
    "torch.nn.modules.linear.Linear": Host(),
    "transformers.pytorch_utils.Conv1D": TransposedLinearHost(),
    "torch.nn.modules.sparse.Embedding": EmbeddingHost(),
    "torch.nn.modules.conv.Conv1d": ConvHost(1),
    "torch.nn.modules.conv.Conv2d": ConvHost(2),
    "torch.nn.modules.conv.Conv3d": ConvHost(3),
    **dict.fromkeys(QUANTIZED, Host()),
}

_ATTENTION = "it reads its projections' weights without calling them, so an adapter would do nothing"
_REFUSALS: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: _ATTENTION,
    nn.modules.linear.NonDynamicallyQuantizableLinear: f"it belongs to an nn.MultiheadAttention: {_ATTENTION}",
}


def host_for(module: nn.Module) -> Host | None:
    """The host for a module of this kind, if there is one."""
    kind = type(module)
    return HOSTS.get(f"{kind.__module__}.{kind.__qualname__}")


def host_of(module: nn.Module, path: str, r: int | None = None) -> Host:
    """The host for ``module``; ``TargetError`` naming the reason or the supported kinds if there is none."""
    host = host_for(module)
    if host is None:
        kinds = ", ".join(kind.rpartition(".")[2] for kind in HOSTS)
        why = _REFUSALS.get(type(module)) or experts(module) or f"supported layers: {kinds}"
        raise TargetError(
            f"a {type(module).__name__} cannot carry an adapter",
            place=f"module {path}",
            remedy=f"{why}; leave this module out of the targets",
        )
    reason = None if r is None else host.refusal(module, r)
    if reason:
        raise TargetError(
            f"this {type(module).__name__} cannot carry the adapter: {reason}",
            place=f"module {path}",
            remedy="change the rank (rank_pattern does for one module) or leave it out of the targets",
        )
    return host


def experts(module: nn.Module) -> str | None:
    """What to say of a module that keeps its experts' matrices stacked in 3-D parameters."""
    stacked = [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3]
    if not stacked:
        return None
    return f"its experts are stacked in the 3-D parameters {', '.join(stacked)}, which have no layer to sit on"
