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
from lorakit.ops.linear import lora_linear
from lorakit.quant.store import DenseStore, Store


def _keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A hook that changes nothing."""


class AdapterLayer(Carrier):
    """A frozen layer whose weight the adapters change."""

    def __init__(self, base: nn.Module, host: Host) -> None:
        super().__init__(base)
        self.host = host
        self.store: Store = DenseStore(base)
        # nn.TransformerEncoderLayer reads `weight` past forward in evaluation, unless its layers have hooks.
        self.register_forward_pre_hook(_keep)

    @torch.no_grad()
    def make_adapter(self, path: str, config: LoRAConfig, generator: torch.Generator | None) -> Adapter:
        """The tensors of one more adapter, started; not yet part of the layer."""
        device = self.store.read().device
        shapes = self.host.shapes(self.base, config.rank_at(path))
        adapter = Adapter(METHODS[config.method], config, config.scaling_at(path), shapes, device)
        adapter.method.start(self, adapter, generator)
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
        """Base and update in one `lora_linear` where that is all there is to do."""
        only = self.adapter(names[0])
        if len(names) == 1 and self._fused(only):
            A, B = only.method.factors(only)
            return lora_linear(x, self.host.matrix(self.store.read()), self.base.bias, A, B, only.scaling)  # type: ignore[arg-type]
        return super().run_all(names, x, *args, **kwargs)

    def run(self, names: tuple[str, ...], x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each adapter adds its update."""
        for name in names:
            adapter = self.adapter(name)
            y = adapter.method.add(self, adapter, x, y)
        return y

    def _fused(self, adapter: Adapter) -> bool:
        """A plain update on a linear layer, without dropout or hooks on the base."""
        return (
            self.host.linear
            and adapter.method.additive
            and not (adapter.dropout and self.training)
            and not self.base._forward_hooks
            and not self.base._forward_pre_hooks
        )

    def dense_weight(self) -> Tensor:
        """The base's weight as numbers to calculate with: detached, in float32 or better."""
        W = self.store.read().detach()
        return W if W.dtype.itemsize >= 4 else W.float()

    def merged_weight(self, names: tuple[str, ...] | None = None) -> Tensor:
        """The dense weight with the updates of ``names`` (the route's if not given), in float32 or better."""
        W = self.dense_weight()
        for name in self.present(self.route.names) if names is None else names:
            adapter = self.adapter(name)
            W = adapter.method.merged(self, adapter, W)
        return W

    @torch.no_grad()
    def _put_merged(self, names: tuple[str, ...]) -> nn.Parameter:
        """The merged weight, rounded to the base's dtype."""
        weight = self.merged_weight(names).to(self.store.read().dtype)
        return self.store.swap(nn.Parameter(weight.contiguous(), requires_grad=False))

    def _put_back(self, original: nn.Parameter) -> None:
        self.store.swap(original)
