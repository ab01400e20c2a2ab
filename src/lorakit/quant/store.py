"""Stores: how a frozen weight lives. An adapter reads and writes weights only through this."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn


class Store(Protocol):
    """The frozen weight of one module."""

    name: ClassVar[str]
    lossless: ClassVar[bool]  # whether write() keeps every bit of what it is given (up to the dtype)

    def read(self) -> Tensor:
        """The weight as a dense tensor, in the module's own layout."""
        ...

    def swap(self, weight: nn.Parameter) -> nn.Parameter:
        """Put another parameter in the weight's place and return the one that was there."""
        ...


class DenseStore:
    """A plain ``module.weight``."""

    name: ClassVar[str] = "dense"
    lossless: ClassVar[bool] = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def read(self) -> Tensor:
        """``module.weight`` itself, not a copy."""
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight

    def swap(self, weight: nn.Parameter) -> nn.Parameter:
        """Exchange the parameter object, so that the old one comes back bit for bit."""
        old = self._module.weight
        assert isinstance(old, nn.Parameter)
        self._module.weight = weight
        return old
