"""LoRA (arXiv 2106.09685): W' = W + s · B A, with W frozen."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from lorakit.adapters.hosts import Host
from lorakit.adapters.methods.method import Adapter


class LoRA:
    """y + s · B A dropout(x)."""

    name: ClassVar[str] = "lora"
    fusable: ClassVar[bool] = True

    def add(self, host: Host, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """A and B are cast to x's dtype: the products run at the base's precision."""
        x = F.dropout(x, adapter.dropout, adapter.training)
        h = host.down(x, adapter.lora_A.to(x.dtype))
        return y + adapter.scaling * host.up(h, adapter.lora_B.to(x.dtype))

    def merged(self, host: Host, adapter: Adapter, W: Tensor) -> Tensor:
        """W + s · B A."""
        delta = host.delta(adapter.lora_A.to(W.dtype), adapter.lora_B.to(W.dtype))
        return W + adapter.scaling * delta
