"""LoftQ (arXiv 2310.08659): a low-rank start that takes back what quantising a weight has lost.

The paper minimises ‖W − Q − s·B A‖ over a quantised Q and factors of rank r, in turns: Q = q(W − s·B A), then
B A from the r leading singular triplets of W − Q. The start ``loftq`` of an adapter is the first turn, on the
base as it is. Further turns give another Q; `alternate` is for who quantises a model for that purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

_ROUNDS, _MORE = 4, 8  # within 1 % of the exact decomposition's error on weights of SmolLM2


def halves(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A = √(S/s) Vᵀ and B = U √(S/s): s·B A is the product of the three."""
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root


def leading_factors(
    M: Tensor, r: int, scaling: float, generator: Generator | None, rounds: int = _ROUNDS
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] with s·B A ≈ M [out, in], nearly the best of rank r.

    By subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4) with 8 more columns than needed.
    """
    Q = torch.randn(M.shape[1], min(r + _MORE, *M.shape), generator=generator).to(M)
    Q = torch.linalg.qr(Q)[0]
    for _ in range(rounds):
        P = torch.linalg.qr(M @ Q)[0]
        Q = torch.linalg.qr(M.T @ P)[0]
    U, S, Vh = torch.linalg.svd(M @ Q, full_matrices=False)
    return halves(U[:, :r], S[:r], Vh[:r] @ Q.T, scaling)


def alternate(
    W: Tensor,
    rounded: Callable[[Tensor], Tensor],
    r: int,
    scaling: float,
    iterations: int,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What to quantise instead of W [out, in], A [r, in] and B [out, r] after some turns (the paper takes 5).

    Args:
        W: the dense weight, in float32.
        rounded: quantises a matrix and reads it again.
        r: rank of the factors, at most that of W.
        scaling: the factor s of the update.
        iterations: turns, at least 1; after one, W itself is to be quantised.
        generator: of the random start of the decomposition.
    """
    A, B = W.new_zeros(r, W.shape[1]), W.new_zeros(W.shape[0], r)
    for _ in range(iterations):
        target = W - scaling * (B @ A)
        A, B = leading_factors(W - rounded(target), r, scaling, generator)
    return target, A, B
