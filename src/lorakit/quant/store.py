"""Stores: how a frozen weight lives. An adapter reads and writes weights only through this."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

from torch import Tensor, nn

from lorakit.errors import ConflictError
from lorakit.quant.interop import BITSANDBYTES, view_of
from lorakit.quant.modules import QuantLinear

# Modules whose weight is quantised, by full type name.
QUANTIZED = ("lorakit.quant.modules.QuantLinear", *BITSANDBYTES)


class Store(Protocol):
    """The frozen weight of one module. `QuantLinear` is its own."""

    @property
    def name(self) -> str:
        """``dense``, or the quantised format's name."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether `write` keeps every bit of what it is given (up to the dtype)."""
        ...

    @property
    def fusable(self) -> bool:
        """Whether its product and an adapter's may be one: not where a library's own kernels multiply."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that `read` gives."""
        ...

    @property
    def bits_per_parameter(self) -> float:
        """Bits that one number takes, constants included."""
        ...

    def read(self) -> Tensor:
        """The weight as a dense tensor, in the module's own layout and in the dtype it computes in."""
        ...

    def write(self, W: Tensor) -> None:
        """Put another weight in this one's place, rounded as the store rounds."""
        ...


class DenseStore:
    """A plain ``module.weight``."""

    name: ClassVar[str] = "dense"
    lossless: ClassVar[bool] = True
    fusable: ClassVar[bool] = True

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.read().shape)

    @property
    def bits_per_parameter(self) -> float:
        """Those of the dtype."""
        return 8.0 * self.read().dtype.itemsize

    def read(self) -> Tensor:
        """``module.weight`` itself, not a copy."""
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight

    def write(self, W: Tensor) -> None:
        """A new parameter object: who keeps the old one can put it back bit for bit."""
        self._module.weight = nn.Parameter(W.to(self.read().dtype).contiguous(), requires_grad=False)


def store_of(module: nn.Module) -> Store:
    """The store of a module's weight: the module itself if it is lorakit's, else a view that copies nothing."""
    return quantized_store(module) or DenseStore(module)


def refuse_lossy(store: Store, place: str | None = None) -> None:
    """``ConflictError`` if an update merged into this weight would be rounded away."""
    if not store.lossless:
        raise ConflictError(
            f"the base is quantised ({store.name}): its steps are larger than what training changes, so that "
            "merging would lose the adapter's update and could not be undone",
            place=place,
            remedy="merge into a dense copy: lorakit merge --dequantize (--requantize says what it lost)",
        )


def quantized_store(module: nn.Module) -> Store | None:
    """The store of a module whose weight is in a few bits, if it is such a module."""
    return module if isinstance(module, QuantLinear) else view_of(module)


def quantized_weights(model: nn.Module) -> dict[int, int]:
    """How many numbers each parameter holds that keeps a quantised weight, by the id of the parameter."""
    stores = {id(m.weight): store for m in model.modules() if (store := quantized_store(m))}
    return {key: math.prod(store.shape) for key, store in stores.items()}
