"""`AdapterLayer`: the one wrapper in which Method × Host × Store meet.

x ──┬── base (frozen, read through its store) ──────────► y ──► + ──► y'
    └── adapter "law":  dropout ─► A ─► B ─► × scaling ─────────┘
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.carrier import Carrier
from lorakit.adapters.hosts import Host
from lorakit.adapters.methods import METHODS, Adapter
from lorakit.adapters.spec import LoRAConfig
from lorakit.errors import UsageError
from lorakit.lowrank.inits import Origin
from lorakit.ops.linear import dropout_fits
from lorakit.ops.projections import Projection, projections
from lorakit.quant.modules import keep
from lorakit.quant.store import DenseStore, Store, refuse_lossy, store_of


class AdapterLayer(Carrier):
    """A frozen layer whose weight the adapters change."""

    def __init__(self, base: nn.Module, host: Host) -> None:
        super().__init__(base)
        self.host = host
        self.register_forward_pre_hook(keep)

    @property
    def store(self) -> Store:
        """How the base's weight lives: dense or quantised."""
        return store_of(self.base)

    @torch.no_grad()
    def make_adapter(self, path: str, config: LoRAConfig, origin: Origin) -> Adapter:
        """The tensors of one more adapter, started; not yet part of the layer."""
        device = self.base.get_parameter("weight").device
        shapes = self.host.shapes(self.base, config.rank_at(path))
        adapter = Adapter(METHODS[config.method], config, config.scaling_at(path), shapes, device)
        adapter.method.start(self, adapter, origin)
        for A in (adapter.lora_A, adapter.anchor_A):
            if A is not None:
                self.host.silence(self.base, A)
        return adapter.train(self.training)

    def adapter(self, name: str) -> Adapter:
        """The adapter called ``name``; ``UsageError`` listing the names there are."""
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UsageError(f"there is no adapter called {name!r}", remedy=f"attached adapters: {known}")
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    def trainable(self) -> list[nn.Parameter]:
        """The tensors of all adapters, but the frozen A of LoRA-FA."""
        return [p for name in self.adapters for p in self.adapter(name).trainable()]

    def run_all(self, names: tuple[str, ...], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base and update in one product where that is all there is to do."""
        found = self.projection(names)
        if found is None or (found[1] and not dropout_fits(x)):
            return super().run_all(names, x, *args, **kwargs)
        return projections(x, found[:1], found[1])[0]

    def projection(self, names: tuple[str, ...]) -> tuple[Projection, float] | None:
        """What base and update compute, and dropout's probability, if it is a linear layer's plain LoRA."""
        only, store = self.adapter(names[0]), self.store
        hooks = (*self.base._forward_hooks.values(), *self.base._forward_pre_hooks.values())
        hooked = any(hook is not keep for hook in hooks)
        if hooked or len(names) > 1 or not (self.host.linear and store.fusable and only.method.additive):
            return None
        A, B = only.method.factors(only)
        W = self.host.matrix(store.read()) if isinstance(store, DenseStore) else store
        dropout = only.dropout if self.training else 0.0
        return Projection(W, self.base.bias, A, B, only.scaling), dropout  # type: ignore[arg-type]

    def run(self, names: tuple[str, ...], x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each adapter adds its update."""
        for adapter in map(self.adapter, names):
            y = adapter.method.add(self, adapter, x, y)
        return y

    def dense_weight(self) -> Tensor:
        """The base's weight as numbers to calculate with: detached, in float32 or better."""
        W = self.store.read().detach()
        return W if W.dtype.itemsize >= 4 else W.float()

    def merged_weight(self, names: tuple[str, ...] | None = None) -> Tensor:
        """The dense weight with the updates of ``names`` (the route's if not given), in float32 or better."""
        W = self.dense_weight()
        for adapter in map(self.adapter, self.present(self.route.names) if names is None else names):
            W = adapter.method.merged(self, adapter, W)
        return W

    @torch.no_grad()
    def _put_merged(self, names: tuple[str, ...]) -> nn.Parameter:
        """The merged weight, rounded to the base's dtype."""
        original = self.base.get_parameter("weight")
        if names:
            refuse_lossy(self.store)
            self.store.write(self.merged_weight(names))
        return original

    def _put_back(self, original: nn.Parameter) -> None:
        self.base.weight = original
