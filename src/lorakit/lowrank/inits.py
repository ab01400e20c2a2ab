"""Initialisers: how A and B start. But for LoftQ, step 0 computes the base model's function.

Most draw A at random and leave B at zero. PiSSA and OLoRA start from the weight's own leading part B₀A₀; the
update is then s (B A − B₀A₀), zero at the start, with the frozen B₀, A₀ kept beside as the *anchor*. The papers
subtract s·B₀A₀ from the frozen weight instead, which is the same function and the same gradients; here the base
stays untouched, so that it can be shared, quantised, and given back bit for bit. LoftQ starts the adapter of a
quantised base at what the quantisation has lost, so that step 0 is nearer to the dense model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorakit.errors import UsageError
from lorakit.lowrank.loftq import halves, leading_factors


@dataclass(frozen=True)
class Origin:
    """What a start draws on: random numbers, and the weight [out, in] as it was before it was quantised."""

    generator: Generator | None = None
    dense: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Start:
    """What an initialiser works on: A [r, in] and B [out, r] to fill, the frozen weight W [out, in].

    ``fan_in`` is the number of inputs that one entry of A x sums over, ``scaling`` the factor of the update.
    """

    A: Tensor
    B: Tensor
    W: Callable[[], Tensor]
    fan_in: int
    scaling: float
    origin: Origin

    @property
    def generator(self) -> Generator | None:
        """Of the random numbers."""
        return self.origin.generator


@dataclass(frozen=True)
class Initialiser:
    """One row of the table. ``anchored``: the start is subtracted from the update, as in PiSSA."""

    name: str
    fill: Callable[[Start], None]
    anchored: bool = False
    whole: bool = False  # works on the whole matrix: not for convolutions with groups
    leading: bool = False  # the leading part of a matrix: not of more rank than that has


def kaiming(start: Start) -> None:
    """A uniform in ±1/√in: He's rule with a = √5, as ``nn.Linear`` and PEFT start."""
    bound = 1 / math.sqrt(start.fan_in)
    start.A.uniform_(-bound, bound, generator=start.generator)


def gaussian(start: Start) -> None:
    """A normal with standard deviation 1/r (arXiv 2106.09685, §4.1: a random Gaussian)."""
    start.A.normal_(0.0, 1.0 / start.A.shape[0], generator=start.generator)


def normal(start: Start) -> None:
    """A normal with standard deviation 0.02, as transformers start their weights."""
    start.A.normal_(0.0, 0.02, generator=start.generator)


def scaled_normal(start: Start) -> None:
    """A normal with standard deviation 1/√r."""
    start.A.normal_(0.0, 1.0 / math.sqrt(start.A.shape[0]), generator=start.generator)


def orthogonal(start: Start) -> None:
    """A and B random with B A = 0: their rows come from the odd and the even half of one orthogonal matrix."""
    (r, features), out = start.A.shape, start.B.shape[0]
    draw = lambda *shape: torch.randn(*shape, generator=start.generator)  # noqa: E731
    Q, _ = torch.linalg.qr(draw(r, r))
    start.A.copy_((draw(features, r // 2) @ Q[0::2] / 10.0).T)
    start.B.copy_(draw(out, r // 2) @ Q[1::2] / 10.0)


def pissa(start: Start, iterations: int | None = None) -> None:
    """A = √S Vᵀ and B = U √S of the r leading singular triplets of W/s (arXiv 2404.02948).

    With ``iterations`` by randomised subspace iteration, else exactly.
    """
    r, W = start.A.shape[0], start.W()
    if iterations is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        A, B = halves(U[:, :r], S[:r], Vh[:r], start.scaling)
    else:
        A, B = leading_factors(W, r, start.scaling, start.generator, iterations)
    start.A.copy_(A)
    start.B.copy_(B)


def olora(start: Start) -> None:
    """B = the first r columns of Q and A = the first r rows of R, where W = Q R (arXiv 2406.01775)."""
    r = start.A.shape[0]
    Q, R = torch.linalg.qr(start.W())
    start.A.copy_(R[:r])
    start.B.copy_(Q[:, :r])


def loftq(start: Start) -> None:
    """s·B A is what quantising W has lost, as far as rank r goes (arXiv 2310.08659, one turn)."""
    if start.origin.dense is None:
        raise UsageError(
            "the start loftq needs the weights as they were before they were quantised",
            remedy="give dense_weight=, a function from a module's path to its dense weight [out, in]",
        )
    Q, W = start.W(), start.origin.dense()
    if W.shape != Q.shape:
        raise UsageError(f"the dense weight is {tuple(W.shape)}, the layer's {tuple(Q.shape)}: [out, in]")
    lost = W.to(Q) - Q
    if not lost.any():
        raise UsageError(
            "the start loftq has nothing to take back", remedy="quantise the model, or use another start"
        )
    A, B = leading_factors(lost, start.A.shape[0], start.scaling, start.generator)
    start.A.copy_(A)
    start.B.copy_(B)


INITIALISERS: dict[str, Initialiser] = {
    row.name: row
    for row in (
        Initialiser("kaiming", kaiming),
        Initialiser("gaussian", gaussian),
        Initialiser("normal", normal),
        Initialiser("scaled_normal", scaled_normal),
        Initialiser("orthogonal", orthogonal, whole=True),
        Initialiser("pissa", pissa, anchored=True, whole=True, leading=True),
        Initialiser("olora", olora, anchored=True, whole=True, leading=True),
        Initialiser("loftq", loftq, whole=True, leading=True),
    )
}


def find_initialiser(name: str) -> Initialiser:
    """The row called ``name``; ``pissa_niter_4`` is PiSSA by four subspace iterations."""
    if isinstance(name, str) and (fast := re.fullmatch(r"pissa_niter_(\d{1,3})", name)):
        count = int(fast[1])
        return Initialiser(name, lambda start: pissa(start, count), anchored=True, whole=True, leading=True)
    if not isinstance(name, str) or name not in INITIALISERS:
        known = ", ".join(INITIALISERS)
        raise UsageError(f"unknown initialiser {name!r:.80}", remedy=f"choose one of {known}, pissa_niter_4")
    return INITIALISERS[name]
