"""The language-model loss: a *sum* over labelled tokens, so that whoever adds up can divide exactly once.

Logits are the largest tensor of a training step (512 tokens and 128 k words: 128 MB in bf16).
`cross_entropy_sum` works on a few rows at a time and keeps one number a row for the backward pass, where plain
autograd holds two float32 copies of all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # the label of tokens that carry no loss, as everywhere in this field
_CHUNK = 1 << 20  # logits handled at once: 4 MB in float32


def cross_entropy_sum_reference(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Σ −log softmax(logits)[label] in float32 (or better), over the tokens whose label is not `IGNORE`."""
    return F.cross_entropy(_wide(logits_NV), labels_N, ignore_index=IGNORE, reduction="sum")


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


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def _rows(x_NV: Tensor) -> tuple[Tensor, ...]:
    return x_NV.split(max(1, _CHUNK // max(1, x_NV.shape[1])))
