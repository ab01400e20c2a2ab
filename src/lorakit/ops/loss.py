"""The language-model loss: a *sum* over labelled tokens, so that whoever adds up can divide exactly once.

Logits are the largest tensor of a training step (512 tokens and 128 k words: 128 MB in bf16).
`cross_entropy_sum` works on a few rows of them at a time and keeps one number a row for the backward pass,
where plain autograd holds two float32 copies of all. `linear_cross_entropy_sum` makes them from the hidden
states, a chunk at a time, and their gradient at once, in the forward pass, so that they never exist as a
whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import native
from lorakit.ops.products import back, times

IGNORE = -100  # the label of tokens that carry no loss, as everywhere in this field
_CHUNK = 1 << 20  # logits handled at once: 4 MB in float32
_PRODUCT = 1 << 25  # logits made by one matrix product


@dataclass(frozen=True)
class Softening:
    """What the loss does beyond −log softmax(logits)[label].

    Attributes:
        cap: each logit is first made cap · tanh(logit / cap), as in Gemma 2; 0 for none.
        smoothing: share of the target that is spread over all words (arXiv 1512.00567, §7).
        z: weight of the square of log Σ exp(logits) (arXiv 2204.02311, §5).
    """

    cap: float = 0.0
    smoothing: float = 0.0
    z: float = 0.0


PLAIN = Softening()


def cross_entropy_sum_reference(logits_NV: Tensor, labels_N: Tensor, how: Softening = PLAIN) -> Tensor:
    """Σ −log softmax(logits)[label] in float32 (or better), over the tokens whose label is not `IGNORE`."""
    wide_NV = _wide(logits_NV)
    if how.cap:
        wide_NV = how.cap * torch.tanh(wide_NV / how.cap)
    loss = F.cross_entropy(
        wide_NV, labels_N, ignore_index=IGNORE, reduction="sum", label_smoothing=how.smoothing
    )
    if how.z:
        loss = loss + how.z * wide_NV[labels_N != IGNORE].logsumexp(1).square().sum()
    return loss


def linear_cross_entropy_sum(x_ND: Tensor, W_VD: Tensor, labels_N: Tensor, how: Softening = PLAIN) -> Tensor:
    """`cross_entropy_sum_reference` of the logits x Wᵀ, for a frozen W; every label is a word."""
    if not torch.is_grad_enabled() or not x_ND.requires_grad:
        parts = zip(_rows(x_ND, len(W_VD), _PRODUCT), _rows(labels_N, len(W_VD), _PRODUCT), strict=True)
        sums = [cross_entropy_sum_reference(x @ W_VD.T, labels, how) for x, labels in parts]
        return torch.stack(sums).sum()
    total: Tensor = _LinearCrossEntropySum.apply(x_ND, W_VD, labels_N, how)
    return total


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, W_VD: Tensor, labels_N: Tensor, how: Softening) -> Tensor:
        grad_ND, total = torch.empty_like(x_ND), _zero(x_ND)
        start = 0
        for x in _rows(x_ND, len(W_VD), _PRODUCT):
            rows = slice(start, start + len(x))
            start += len(x)
            logits_nV = times((x, W_VD))
            total += _slopes(logits_nV, labels_N[rows], how)
            grad_ND[rows] = back((logits_nV, W_VD))
            del logits_nV  # before the next are made
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None, None


def _slopes(logits_NV: Tensor, labels_N: Tensor, how: Softening) -> Tensor:
    """The loss of these logits, which become its slope."""
    if native.fits(logits_NV):
        loss_N = logits_NV.new_empty(len(logits_NV), dtype=torch.float32)
        settings = (float(how.cap), float(how.smoothing), float(how.z))
        native.run("cross_entropy", logits_NV.dtype, logits_NV, labels_N, loss_N, *logits_NV.shape, *settings)
        return loss_N.sum()
    total = _zero(logits_NV)
    for part, labels in zip(_rows(logits_NV), _rows(labels_N, logits_NV.shape[1]), strict=True):
        wide = _wide(part).detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy_sum_reference(wide, labels, how)
        (slope,) = torch.autograd.grad(loss, wide)
        part.copy_(slope)
        total += loss.detach()
    return total


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """`cross_entropy_sum_reference` in bounded memory."""
    total: Tensor = _CrossEntropySum.apply(logits_NV, labels_N)
    return total


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        lse_N = torch.cat([_wide(part).logsumexp(1) for part in _rows(logits_NV)])
        real_N = labels_N != IGNORE
        labels_N = labels_N.where(real_N, 0)
        picked_N = logits_NV.gather(1, labels_N[:, None])[:, 0]
        ctx.save_for_backward(logits_NV, labels_N, real_N, lse_N)
        return (lse_N - picked_N)[real_N].sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """softmax − one-hot of the label, for each labelled row."""
        logits_NV, labels_N, real_N, lse_N = ctx.saved_tensors
        out_NV = torch.empty_like(logits_NV)
        start = 0
        for part in _rows(logits_NV):
            rows = slice(start, start + len(part))
            start += len(part)
            slope = (_wide(part) - lse_N[rows, None]).exp_()
            slope[torch.arange(len(part), device=part.device), labels_N[rows]] -= 1
            slope *= grads[0]
            out_NV[rows] = slope.masked_fill_(~real_N[rows, None], 0.0)
        return out_NV, None


def _zero(like: Tensor) -> Tensor:
    """A sum to add to, in float32 or better."""
    return like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def _rows(x_NV: Tensor, width: int | None = None, most: int = _CHUNK) -> tuple[Tensor, ...]:
    """A few rows at a time, as many as ``most`` logits have if one has ``width``."""
    return x_NV.split(max(1, most // max(1, width or x_NV.shape[1])))
