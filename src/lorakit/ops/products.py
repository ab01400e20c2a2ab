"""Products of activations and frozen dense weights: matrix units through C++ where they are, else PyTorch.

Shapes: x [N, I], W [O, I], g [N, O]; `times` gives x Wᵀ [N, O], `back` g W [N, I], each summed over its pairs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from lorakit.ops import native

_by_units: ContextVar[bool] = ContextVar("by_units", default=False)
_STEP = 32  # all sizes but the number of rows are multiples of it
_FEWEST = 32  # rows for which packing the weight pays


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
        return _product(pairs, pairs[0][1].shape[0], back=False)
    return functools.reduce(torch.add, (x_NI @ W_OI.T for x_NI, W_OI in pairs))


def back(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Σ g W, a tensor of its own."""
    if fits(*pairs):
        return _product(pairs, pairs[0][1].shape[1], back=True)
    (g_NO, W_OI), *others = pairs
    total = g_NO @ W_OI
    for g_NO, W_OI in others:
        total.addmm_(g_NO, W_OI)
    return total


def fits(*pairs: tuple[Tensor, Tensor]) -> bool:
    """Whether matrix units compute the product of these."""
    if torch.compiler.is_compiling() or not _by_units.get():
        return False
    tensors = [tensor for pair in pairs for tensor in pair]
    whole = not any(size % _STEP for _, W in pairs for size in W.shape)
    many = len(tensors[0]) >= _FEWEST and tensors[0].dtype == torch.bfloat16
    return many and whole and native.fits(*tensors) and native.matrix_units()


def _product(pairs: tuple[tuple[Tensor, Tensor], ...], columns: int, *, back: bool) -> Tensor:
    rows = len(pairs[0][0])
    y = pairs[0][0].new_empty(rows, columns)
    triples = torch.tensor([(x.data_ptr(), W.data_ptr(), x.shape[1]) for x, W in pairs])
    native.run("products", y.dtype, triples, len(pairs), y, rows, columns, int(back))
    return y
