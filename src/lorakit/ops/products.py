"""Products of activations and frozen weights: matrix units through C++ where they are, else PyTorch.

Weights in four bits are decoded a piece at a time on their way into the units, by `times_by_units` and
`back_by_units`; where those do not fit, `lorakit.ops.frozen` multiplies.

Shapes: x [N, I], W [O, I], g [N, O]; `times` gives x Wᵀ [N, O], `back` g W [N, I], each summed over its pairs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops import buffers, native

_by_units: ContextVar[bool] = ContextVar("by_units", default=False)
_STEP = 32  # all sizes but the number of rows are multiples of it
_FEWEST = 32  # rows for which packing the weight pays
MOST = 8  # pairs


class FourBits(NamedTuple):
    """A weight [O, I] kept in four bits, as `lorakit.quant.blockwise.FourBit` describes it."""

    shape: tuple[int, int]
    codes: Tensor  # uint8, two of them a byte
    values: Tensor  # float32 [16], of the codes
    blocksize: int
    absmax: Tensor  # float32, or uint8 codes of `dynamic`
    dynamic: Tensor | None = None  # float32 [256]
    nested: Tensor | None = None  # float32, one for 256 absmax
    offset: Tensor | None = None  # float32 []


@contextlib.contextmanager
def by_units() -> Iterator[None]:
    """Within the block matrix units compute, if there are any.

    Elsewhere an adapter that changes nothing gives the base's output bit for bit: that takes its product.
    """
    token = _by_units.set(True)
    try:
        yield
    finally:
        _by_units.reset(token)


def times(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Σ x Wᵀ, a tensor of its own."""
    if fits(*pairs):
        return times_by_units(*pairs)
    return functools.reduce(torch.add, (x_NI @ W_OI.T for x_NI, W_OI in pairs))


def back(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Σ g W, a tensor of its own."""
    if fits(*pairs):
        return back_by_units(*pairs)
    (g_NO, W_OI), *others = pairs
    total = g_NO @ W_OI
    for g_NO, W_OI in others:
        total.addmm_(g_NO, W_OI)
    return total


def fits(*pairs: tuple[Tensor, Tensor | FourBits]) -> bool:
    """Whether matrix units compute the product of these."""
    if torch.compiler.is_compiling() or not _by_units.get() or len(pairs) > MOST:
        return False
    tensors = [tensor for pair in pairs for tensor in pair if isinstance(tensor, Tensor)]
    whole = not any(size % _STEP for _, W in pairs for size in W.shape)
    many = len(tensors[0]) >= _FEWEST and tensors[0].dtype == torch.bfloat16
    return many and whole and native.fits(*tensors) and native.matrix_units()


def times_by_units(*pairs: tuple[Tensor, Tensor | FourBits]) -> Tensor:
    """`times` of what `fits`."""
    return _product(pairs, pairs[0][1].shape[0], back=False)


def back_by_units(*pairs: tuple[Tensor, Tensor | FourBits]) -> Tensor:
    """`back` of what `fits`."""
    return _product(pairs, pairs[0][1].shape[1], back=True)


def _product(pairs: tuple[tuple[Tensor, Tensor | FourBits], ...], columns: int, *, back: bool) -> Tensor:
    rows = len(pairs[0][0])
    y = buffers.empty((rows, columns), pairs[0][0].dtype)
    factors = native.longs(n for x, W in pairs for n in (x.data_ptr(), *described(W, x.shape[1])))
    product = native.longs((ctypes.addressof(factors), len(pairs), rows, columns, back, y.data_ptr(), 0, 0))
    native.run("products", y.dtype, product, 1)
    return y


def described(W: Tensor | FourBits, depth: int) -> tuple[int, ...]:
    """The fields of the C++ passes' ``Factor`` that follow x."""
    if isinstance(W, Tensor):
        return W.data_ptr(), depth, 0, 0, 0, 0, 0, 0
    constants = (0 if tensor is None else tensor.data_ptr() for tensor in (W.dynamic, W.nested, W.offset))
    return (W.codes.data_ptr(), depth, W.values.data_ptr(), W.absmax.data_ptr(), W.blocksize, *constants)
