"""Codebooks: the values that codes stand for, derived from the constructions of their papers.

All are float32 and at most one in magnitude: numbers are divided by the absolute maximum of their block before
the nearest value is looked up. Each comes out equal to bitsandbytes' table to the last bit.
"""

from __future__ import annotations

import functools
import itertools
from statistics import NormalDist

import torch
from torch import Tensor


@functools.cache
def codebook(kind: str) -> Tensor:
    """The 16 values of ``nf4`` or ``fp4``, or the 256 of ``dynamic8``, by their code."""
    return {"nf4": _nf4, "fp4": _fp4, "dynamic8": _dynamic8}[kind]()


def _nf4() -> Tensor:
    """NormalFloat (QLoRA, arXiv 2305.14314, §3): quantiles of the standard normal distribution, ascending.

    Seven negative and eight positive ones at equal distances of probability, and an exact zero. The outermost
    probability lies between those of 15 and of 16 equal shares. bitsandbytes rounded it to seven digits and
    took the steps in float32, which decides the last bits.
    """
    outermost = round(1 - (1 / 30 + 1 / 32) / 2, 7)
    quantiles = [
        [NormalDist().inv_cdf(p) for p in torch.linspace(outermost, 0.5, steps)[:-1].tolist()]
        for steps in (8, 9)
    ]
    values = torch.tensor(sorted([*(-q for q in quantiles[0]), 0.0, *quantiles[1]]))
    return values / values.max()


def _fp4() -> Tensor:
    """Floats of one sign bit, two of exponent and one of mantissa, over the largest, in order of their bits.

    Exponent fields 1, 2, 3 stand for 8, 4 and 2, the mantissa adds a half; field 0 holds zero and 1/16.
    """
    magnitudes = [0.0, 1 / 16, *(2.0 ** (4 - e) * (1 + m / 2) for e in (1, 2, 3) for m in (0, 1))]
    values = torch.tensor([sign * magnitude for sign in (1.0, -1.0) for magnitude in magnitudes])
    return values / values.max()


def _dynamic8() -> Tensor:
    """The dynamic tree of arXiv 1511.04561 and 2110.02861 with seven exponent steps, ascending.

    Decade 10^(i−6), i = 0 … 6, is shared by 2^i numbers of either sign, the middles of equal parts of [0.1, 1].
    Zero and one complete the 256.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1)
        middles = (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [sign * middle for sign in (1.0, -1.0) for middle in middles]
    return torch.tensor(sorted(values))


def nearest(kind: str) -> tuple[Tensor, Tensor]:
    """How to find the nearest value: the bounds between ascending values, and the code of each value."""
    return _nearest(kind)


@functools.cache
def _nearest(kind: str) -> tuple[Tensor, Tensor]:
    values, codes = codebook(kind).sort(stable=True)
    return (values[:-1] + values[1:]) / 2, codes.to(torch.uint8)


@functools.cache
def quick(kind: str) -> tuple[Tensor, Tensor]:
    """`nearest` as a table over the upper 16 bits of a float32, read as a signed number plus 32768.

    Of numbers in [-1, 1] that share these bits at most one bound separates some from the others. The first
    tensor, float32 [65536], is that bound, or infinity; the second, uint8 [65536], has the code of those above
    it in the high half and that of the others in the low half.
    """
    bounds, codes = nearest(kind)
    upper = (torch.arange(65536, dtype=torch.int32) - 32768) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    low, high = torch.bucketize(ends, bounds).sort(0).values
    between = torch.where(high > low, bounds[low.clamp_max(len(bounds) - 1)], torch.inf)
    return between, (codes[high] << 4) | codes[low]


@functools.cache
def pairs(kind: str) -> Tensor:
    """[256, 2]: the two values that a byte of two four-bit codes stands for, the high half first."""
    values = codebook(kind)
    return torch.tensor(list(itertools.product(values.tolist(), repeat=2)))
