"""Attention over packed segments on a GPU: PyTorch's FlashAttention for rows of different lengths.

It is exact, reads flat batches as they lie, and shares key heads (arXiv 2307.08691). Not run on a GPU yet:
tests check what it is called with against its documented meaning.
"""

from __future__ import annotations

import functools
import inspect

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)
_MOST = 256  # numbers of a head


def fits(q_THD: Tensor, cap: float) -> bool:
    """Ampere or later, half precision, heads that its kernels have, scores without a cap."""
    size = q_THD.shape[-1]
    if not q_THD.is_cuda or q_THD.dtype not in _HALVES or cap or size % 8 or size > _MOST:
        return False
    modern = torch.version.hip is None and torch.cuda.get_device_capability(q_THD.device) >= (8, 0)
    return modern and _has_windows()


@functools.cache
def _has_windows() -> bool:
    """Whether this version's function takes windows and shared key heads."""
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def attend(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, starts: Tensor, longest: int, scaling: float, window: int
) -> Tensor:
    """Causal attention inside segments that begin at ``starts`` [S + 1]; a window of 0 sees all keys before."""
    from torch.nn.attention.varlen import varlen_attn

    edges = starts.to(q_THD.device, torch.int32)
    seen = (window - 1 if window else -1, 0)  # keys before a query, and after it
    shared = q_THD.shape[1] != k_TGD.shape[1]
    found = varlen_attn(
        q_THD, k_TGD, v_TGD, edges, edges, longest, longest, scale=scaling, window_size=seen, enable_gqa=shared
    )
    assert isinstance(found, Tensor)  # two of them only for who asks for the sums
    return found
