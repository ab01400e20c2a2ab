"""Initialisers of A. B starts at zero, so that step 0 is the base model bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor


def kaiming(A: Tensor, generator: Generator | None) -> None:
    """Uniform in ±1/√in: He's rule with a = √5, as ``nn.Linear`` and PEFT start."""
    bound = 1 / math.sqrt(A[0].numel())
    A.uniform_(-bound, bound, generator=generator)


def gaussian(A: Tensor, generator: Generator | None) -> None:
    """Normal with standard deviation 1/r."""
    A.normal_(0.0, 1.0 / A.shape[0], generator=generator)


INITIALISERS: dict[str, Callable[[Tensor, Generator | None], None]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
}


@torch.no_grad()
def initialise(name: str, A: Tensor, generator: Generator | None = None) -> None:
    """Fill A in place by the initialiser called ``name``."""
    INITIALISERS[name](A, generator)
