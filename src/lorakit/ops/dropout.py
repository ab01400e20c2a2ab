"""Dropout whose mask is a hash of the position: nothing is kept for the backward pass but a key of 64 bits.

PyTorch draws one number after the other (7 ns each on a CPU: a quarter of a step at p = 0.1) and keeps the
mask. Here 16 bits for each element are computed wherever they are needed, in any order, and so by the passes
that use them. The key comes from torch's generator: a run that resumes, or recomputes activations, gets the
same masks.

An element is kept if its 16 bits are not below round(65536 · p), and divided by the exact share of what is
kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ops import buffers, native

_BLOCK = 32  # elements of two hashes' worth of lanes: 16 from the low halves, 16 from the high ones
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Mask:
    """Which elements are dropped, for a matrix of any number of rows."""

    key: int  # 64 bits
    threshold: int  # of 65536; 0 drops nothing

    @property
    def scale(self) -> float:
        """Of the elements that are kept."""
        return 65536 / (65536 - self.threshold)

    def arguments(self) -> tuple[int, int, int, float]:
        """As the C++ passes take it."""
        return self.key & _LOW, self.key >> 32, self.threshold, self.scale if self.threshold else 1.0

    def factors(self, rows: int, width: int) -> Tensor:
        """[rows, width] of 0 and `scale`: the definition, with 32-bit arithmetic in int64."""
        blocks = -(-width // _BLOCK)
        position = torch.arange(rows * blocks * _BLOCK // 2)
        x = _hashed((position & _LOW) ^ (self.key & _LOW))
        x = _hashed((x + (position >> 32) + (self.key >> 32)) & _LOW).view(rows, blocks, _BLOCK // 2)
        bits = torch.stack([x & 0xFFFF, x >> 16], 2).view(rows, -1)[:, :width]
        return (bits >= self.threshold) * torch.tensor(self.scale)

    def applied(self, x: Tensor) -> Tensor:
        """x times the factors of its rows."""
        width = x.shape[-1]
        rows = x.numel() // width
        if not native.fits(x):
            return x * self.factors(rows, width).view_as(x).to(x.device, x.dtype)
        y = buffers.empty_like(x)
        native.run("dropout", x.dtype, x, y, rows, width, *self.arguments())
        return y


def _hashed(x: Tensor) -> Tensor:
    """Wellons' lowbias32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _LOW
    return x ^ (x >> 16)


NOTHING = Mask(0, 0)


def draw_mask(p: float) -> Mask:
    """A mask for dropout with probability p, by torch's generator of the CPU, which 0 does not touch."""
    if not p:
        return NOTHING
    return Mask(int(torch.randint(-(2**63), 2**63 - 1, ()).item()) & (2**64 - 1), round(65536 * p))
