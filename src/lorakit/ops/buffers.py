"""Memory on a CPU for what passes write: tensors like torch's, whose place the next of their size can take.

torch asks the C library for blocks that begin at a multiple of 64 bytes. To find one, glibc looks for a hole
that is larger by the most this can cost, and leaves what is over to small objects. The hole that such a block
leaves behind is then too small for the next block of the same size as long as one of these lives: the heap
grows with every layer, to twice what a step needs (decisions/0021). These tensors come from blocks without that
demand, and begin at the first such address inside.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: a vector, a line of the cache


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU with arbitrary contents."""
    size = math.prod(shape) * dtype.itemsize
    block = torch.from_numpy(np.empty(size + _ALIGNMENT, np.uint8))
    start = -block.data_ptr() % _ALIGNMENT
    return block[start : start + size].view(dtype).view(shape)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor on the CPU of the shape of x, and of its dtype if no other is given."""
    return empty(tuple(x.shape), dtype or x.dtype)
