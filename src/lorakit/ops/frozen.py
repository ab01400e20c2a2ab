"""Products with a frozen weight that is not kept as a dense tensor: it is read when needed, a block at a time.

A weight W [O, I] in a few bits comes as consecutive blocks of rows. Each is multiplied and forgotten before the
next is made, so that neither the forward nor the backward pass ever holds all of W, and memory is used again
while it is warm: on a CPU most of the time that a large fresh tensor costs is spent on page faults.

Shapes: x [N, I], g [N, O], blocks [rows, I] that add up to O rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from lorakit.ops.products import FourBits


class Frozen(Protocol):
    """A frozen matrix W [O, I] that knows its products."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which W is read and its products run."""
        ...

    def times(self, x_NI: Tensor) -> Tensor:
        """x Wᵀ [N, O] in the dtype of x."""
        ...

    def back(self, g_NO: Tensor) -> Tensor:
        """g W [N, I] in the dtype of g: what `times` hands back to its input."""
        ...

    def factor(self) -> FourBits | None:
        """The weight as products by matrix units take it, if it is kept in four bits."""
        ...


def times(blocks: Iterable[Tensor], x_NI: Tensor, rows: int) -> Tensor:
    """x Wᵀ [N, O], one block of outputs after the other; ``rows`` is O."""
    y_NO = x_NI.new_empty(len(x_NI), rows)
    start = 0
    for W in blocks:
        torch.mm(x_NI, W.to(x_NI.dtype).T, out=y_NO[:, start : start + len(W)])
        start += len(W)
    return y_NO


def back(blocks: Iterable[Tensor], g_NO: Tensor) -> Tensor:
    """g W [N, I], the sum over blocks of what each hands back."""
    total: Tensor | None = None
    start = 0
    for W in blocks:
        part = g_NO[:, start : start + len(W)]
        start += len(W)
        total = part @ W.to(g_NO.dtype) if total is None else total.addmm_(part, W.to(g_NO.dtype))
    assert total is not None, "a weight has at least one block"
    return total
