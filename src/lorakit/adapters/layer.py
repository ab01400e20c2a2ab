"""`AdapterLayer`: the one wrapper in which Method × Host × Store meet.

    x ──┬── base (frozen, read through its store) ──────────► y ──► + ──► y'
        └── adapter "law":  dropout ─► A ─► B ─► × scaling ─────────┘

The base module stays the very object it was: detaching gives it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.hosts import Host
from lorakit.adapters.methods import METHODS, Adapter
from lorakit.adapters.routing import BASE, Route
from lorakit.adapters.spec import LoRAConfig
from lorakit.errors import ConflictError, UsageError
from lorakit.ops.linear import lora_linear
from lorakit.quant.store import DenseStore, Store


def _keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook that changes nothing."""


class AdapterLayer(nn.Module):
    """A frozen base module with any number of named adapters, of which the route's are active."""

    def __init__(self, base: nn.Module, host: Host) -> None:
        super().__init__()
        self.base = base
        self.host = host
        self.store: Store = DenseStore(base)
        self.adapters = nn.ModuleDict()
        self.route: Route = BASE
        self._unmerged: nn.Parameter | None = None
        # nn.TransformerEncoderLayer reads `weight` past forward in evaluation, unless its layers have hooks.
        self.register_forward_pre_hook(_keep)

    def add_adapter(self, name: str, config: LoRAConfig) -> Adapter:
        """Create the tensors of one more adapter (A not yet initialised, B zero)."""
        shapes = self.host.shapes(self.base, config.r)
        adapter = Adapter(METHODS["lora"], config, shapes, self.store.read().device)
        adapter.train(self.training)
        self.adapters[name] = adapter
        return adapter

    def remove_adapter(self, name: str) -> None:
        """Take the adapter ``name`` off, if it is here, and out of the route."""
        if name in self.adapters:
            del self.adapters[name]
            self.route = Route(tuple(other for other in self.route.names if other != name))

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``; ``UsageError`` listing the names there are."""
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UsageError(f"there is no adapter called {name!r}", remedy=f"attached adapters: {known}")
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the updates of the route's adapters; the base alone while merged."""
        if self.merged or not self.route.names:
            return self.base(x, *args, **kwargs)
        active = [self.adapter(name) for name in self.route.names]
        if self._fused(active):
            W, only = self.store.read(), active[0]
            return lora_linear(x, W, self.bias, only.lora_A, only.lora_B, only.scaling)
        y: Tensor = self.base(x, *args, **kwargs)
        for adapter in active:
            y = adapter.method.add(self.host, adapter, x, y)
        return y

    def _fused(self, active: list[Adapter]) -> bool:
        """Whether base and update are one `lora_linear`: a single plain adapter, without dropout or hooks."""
        adapter = active[0]
        return (
            len(active) == 1
            and self.host.name == "linear"
            and adapter.method.fusable
            and not (adapter.dropout and self.training)
            and not self.base._forward_hooks
            and not self.base._forward_pre_hooks
        )

    def merged_weight(self, names: tuple[str, ...] | None = None) -> Tensor:
        """The dense weight with the updates of ``names`` (the route's if not given), in float32 or better."""
        W = self.store.read().detach()
        W = W if W.dtype.itemsize >= 4 else W.float()
        for name in self.route.names if names is None else names:
            adapter = self.adapter(name)
            W = adapter.method.merged(self.host, adapter, W)
        return W

    @property
    def merged(self) -> bool:
        """Whether the base weight currently holds the updates."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self, names: tuple[str, ...] | None = None) -> None:
        """Put the merged weight, rounded to the base's dtype, in the base's place; keep the original."""
        if self.merged:
            raise ConflictError("the adapters are merged already", remedy="call unmerge_lora_weights() first")
        weight = self.merged_weight(names).to(self.store.read().dtype)
        self._unmerged = self.store.swap(nn.Parameter(weight, requires_grad=False))

    def unmerge(self) -> None:
        """Put the original parameter back: restored, never subtracted. Nothing to do if not merged."""
        if self._unmerged is not None:
            self.store.swap(self._unmerged)
            self._unmerged = None

    def fold(self) -> None:
        """Merge for good: the original weight is forgotten."""
        if not self.merged:
            self.merge()
        self._unmerged = None

    # Model code reads these of the module that it believes to have.
    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.store.read()

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        bias = self.base.bias
        return bias if isinstance(bias, Tensor) else None
