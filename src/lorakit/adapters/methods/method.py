"""What a method must be able to do, and the tensors it trains on one layer."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.hosts import Host
from lorakit.adapters.spec import LoRAConfig
from lorakit.lowrank.inits import Origin


class Site(Protocol):
    """Where an adapter sits, as its method sees it: the frozen module, what it is, and its weight."""

    base: nn.Module
    host: Host

    def dense_weight(self) -> Tensor:
        """The base's weight as numbers to calculate with: detached, in float32 or better."""
        ...


class Adapter(nn.Module):
    """One adapter's tensors on one layer: A goes down to rank r, B goes up. Float32, whatever the base is.

    A method may add parameters of its own (DoRA's magnitude, AdaLoRA's E). ``anchor_A`` and ``anchor_B`` are
    the frozen start of PiSSA and OLoRA, else None.
    """

    anchor_A: Tensor | None
    anchor_B: Tensor | None

    def __init__(
        self,
        method: Method,
        config: LoRAConfig,
        scaling: float,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.method = method
        self.config = config
        self.scaling = scaling
        self.dropout = config.lora_dropout
        self.lora_A = nn.Parameter(torch.zeros(shapes[0], device=device), requires_grad=not config.lora_fa)
        self.lora_B = nn.Parameter(torch.zeros(shapes[1], device=device))
        self.register_buffer("anchor_A", None)
        self.register_buffer("anchor_B", None)

    @property
    def rank(self) -> int:
        """R of this layer."""
        return self.lora_A.shape[0]

    def set_anchor(self, A: Tensor, B: Tensor) -> None:
        """Subtract s·B A from the update from now on."""
        self.anchor_A, self.anchor_B = A.detach().clone(), B.detach().clone()

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training may change."""
        return [p for p in self.parameters() if not (self.config.lora_fa and p is self.lora_A)]

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        return f"{self.method.name}, r={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Method(Protocol):
    """How an adapter changes its layer. `merged` is the one source for merging, export and diagnostics."""

    name: ClassVar[str]
    additive: ClassVar[bool]  # y + s · up(down(x)) and nothing else: it can be fused, summed and combined

    def start(self, layer: Site, adapter: Adapter, origin: Origin) -> None:
        """Fill the adapter's tensors; the layer's function stays the base's."""
        ...

    def factors(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """A and B with update s · B A, whatever the method trains."""
        ...

    def add(self, layer: Site, adapter: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output with the adapter, from its input x and the output y so far."""
        ...

    def merged(self, layer: Site, adapter: Adapter, W: Tensor) -> Tensor:
        """The weight that gives the same output without an adapter; W is in float32 or better."""
        ...
