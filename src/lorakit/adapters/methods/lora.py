"""LoRA (arXiv 2106.09685): W' = W + s · B A, with W frozen."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters.methods.method import Adapter, Site
from lorakit.lowrank.inits import Origin, Start, find_initialiser


class LoRA:
    """y + s · B A dropout(x)."""

    name: ClassVar[str] = "lora"
    additive: ClassVar[bool] = True

    def start(self, layer: Site, adapter: Adapter, origin: Origin) -> None:
        """By the adapter's initialiser; drawn on the CPU, so that every device starts alike."""
        initialiser = find_initialiser(adapter.config.init_lora_weights)
        A, B = torch.zeros(adapter.lora_A.shape), torch.zeros(adapter.lora_B.shape)
        W = lambda: layer.host.matrix(layer.dense_weight().float())  # noqa: E731
        fan_in = layer.host.fan_in(A)
        initialiser.fill(Start(A.flatten(1), B.flatten(1), W, fan_in, adapter.scaling, origin))
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(B)
        if initialiser.anchored:
            adapter.set_anchor(adapter.lora_A, adapter.lora_B)

    def factors(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """A and B; with an anchor [A; A₀] and [B, −B₀], of rank 2r."""
        if adapter.anchor_A is None or adapter.anchor_B is None:
            return adapter.lora_A, adapter.lora_B
        return torch.cat([adapter.lora_A, adapter.anchor_A]), torch.cat([adapter.lora_B, -adapter.anchor_B], 1)

    def add(self, layer: Site, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """A and B are cast to y's dtype: the products run at the base's precision."""
        return y + self._update(layer, adapter, x, y.dtype)

    def merged(self, layer: Site, adapter: Adapter, W: Tensor) -> Tensor:
        """W + s · B A."""
        A, B = (factor.to(W.dtype) for factor in self.factors(adapter))
        return W + adapter.scaling * layer.host.delta(A, B, W)

    def _update(self, layer: Site, adapter: Adapter, x: Tensor, dtype: torch.dtype) -> Tensor:
        """s · B A dropout(x)."""
        A, B = (factor.to(dtype) for factor in self.factors(adapter))
        if x.is_floating_point():  # token ids are not
            x = F.dropout(x, adapter.dropout, adapter.training)
        h = layer.host.down(layer.base, x, A)
        return adapter.scaling * layer.host.up(layer.base, h, B)
