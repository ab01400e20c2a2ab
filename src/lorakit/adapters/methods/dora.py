"""DoRA (arXiv 2402.09353): W' = m · (W + s B A) / ‖W + s B A‖, magnitude and direction trained apart.

The norm is taken per output unit, a row of the matrix [out, in], and is a constant in the backward pass (§4.3).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.adapters.methods.lora import LoRA
from lorakit.adapters.methods.method import Adapter, Site
from lorakit.lowrank.inits import Origin


class DoRA(LoRA):
    """y + (m/‖·‖ − 1) · (y − b) + m/‖·‖ · s B A dropout(x)."""

    name: ClassVar[str] = "dora"
    additive: ClassVar[bool] = False

    def start(self, layer: Site, adapter: Adapter, origin: Origin) -> None:
        """As LoRA, and m [out] is the norm of the weight, so that m/‖·‖ is exactly one."""
        super().start(layer, adapter, origin)
        magnitude = self._norm(layer, super().merged(layer, adapter, layer.dense_weight()))
        adapter.lora_magnitude_vector = nn.Parameter(magnitude)

    def add(self, layer: Site, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """Dropout acts on the update alone."""
        W = layer.dense_weight()
        ratio = self._magnitude(adapter) / self._norm(layer, super().merged(layer, adapter, W).detach())
        k, change = (layer.host.spread(v.to(y.dtype), y) for v in (ratio, ratio - 1))
        b = getattr(layer.base, "bias", None)  # embeddings have none
        plain = y - layer.host.spread(b, y) if isinstance(b, Tensor) else y
        return y + change * plain + k * self._update(layer, adapter, x, y.dtype)

    def merged(self, layer: Site, adapter: Adapter, W: Tensor) -> Tensor:
        """M · V/‖V‖ with V = W + s B A."""
        V = super().merged(layer, adapter, W)
        ratio = self._magnitude(adapter).to(W.dtype) / self._norm(layer, V)
        return layer.host.like_weight(ratio[:, None] * layer.host.matrix(V), W)

    def _magnitude(self, adapter: Adapter) -> nn.Parameter:
        return adapter.get_parameter("lora_magnitude_vector")

    def _norm(self, layer: Site, V: Tensor) -> Tensor:
        """[out]; a unit whose weights are all zero has nothing to scale."""
        norm: Tensor = torch.linalg.vector_norm(layer.host.matrix(V), dim=1)
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)
