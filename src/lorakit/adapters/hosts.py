"""Hosts: what an adapter sits on. A host knows its module's shapes and how A and B act on its input.

Layout, everywhere in lorakit: A [r, in] goes down, B [out, r] goes up, ΔW = B A [out, in].
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import TargetError


class Host(Protocol):
    """One kind of base module."""

    name: ClassVar[str]

    def shapes(self, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B at rank r."""
        ...

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """h = A x."""
        ...

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """B h."""
        ...

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """B A, in the layout of the module's own weight."""
        ...


class LinearHost:
    """``nn.Linear``: weight [out, in], input [..., in]."""

    name: ClassVar[str] = "linear"

    def shapes(self, module: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A [r, in], B [out, r]."""
        assert isinstance(module, nn.Linear)
        return (r, module.in_features), (module.out_features, r)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """X [..., in] → [..., r]."""
        return F.linear(x, A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """H [..., r] → [..., out]."""
        return F.linear(h, B)

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """[out, in]."""
        return B @ A


# Matched by exact type: a subclass may compute something else in its forward pass (quantised layers do), or
# never be called at all (`nn.MultiheadAttention` reads its projections' weights directly), and an adapter on
# it would silently do nothing.
HOSTS: dict[type[nn.Module], Host] = {nn.Linear: LinearHost()}


def host_of(module: nn.Module, path: str) -> Host:
    """The host for ``module``; ``TargetError`` naming the supported kinds if there is none."""
    host = HOSTS.get(type(module))
    if host is None:
        kinds = ", ".join(kind.__name__ for kind in HOSTS)
        raise TargetError(
            f"a {type(module).__name__} cannot carry an adapter yet",
            place=f"module {path}",
            remedy=f"supported layers: {kinds}; leave this module out of the targets",
        )
    return host
