"""What a method must be able to do, and the tensors it trains on one layer."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.hosts import Host
from lorakit.adapters.spec import LoRAConfig


class Adapter(nn.Module):
    """One adapter's tensors on one layer: A goes down to rank r, B goes up. Float32, whatever the base is."""

    def __init__(
        self,
        method: Method,
        config: LoRAConfig,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.method = method
        self.config = config
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(torch.empty(shapes[0], dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shapes[1], dtype=torch.float32, device=device))

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Method(Protocol):
    """How an adapter changes its layer. `merged` is the one source for merging, export and diagnostics."""

    name: ClassVar[str]
    fusable: ClassVar[bool]  # y + s · up(down(x)) and nothing else: fused kernels may compute it

    def add(self, host: Host, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with the adapter, from its input x and the output y so far."""
        ...

    def merged(self, host: Host, adapter: Adapter, W: Tensor) -> Tensor:
        """The weight that gives the same output without an adapter, in float32."""
        ...
