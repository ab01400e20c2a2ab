"""LoRA in two small modules, to learn from and to build models with; `add_lora_to_model` adapts ready ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.adapters.spec import LoRAConfig
from lorakit.ops.linear import lora_linear


class LoRALayer(nn.Module):
    """The update s · B A of one linear layer, with A [rank, in] random and B [out, rank] zero.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 8, alpha: float = 16) -> None:
        super().__init__()
        self.rank, self.alpha, self.scaling = rank, alpha, LoRAConfig(rank, alpha).scaling
        self.lora_A = nn.Parameter(0.02 * torch.randn(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, x: Tensor, base_weight: Tensor, base_bias: Tensor | None = None) -> Tensor:
        """Base and update: x [..., in], base_weight [out, in], base_bias [out] → [..., out]."""
        return lora_linear(x, base_weight, base_bias, self.lora_A, self.lora_B, self.scaling)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update as a matrix [out, in]."""
        return self.scaling * self.lora_B.to(dtype) @ self.lora_A.to(dtype)


class LinearWithLoRA(nn.Module):
    """A frozen ``nn.Linear`` (``base_layer``) with its `LoRALayer` (``lora``)."""

    def __init__(
        self, in_features: int, out_features: int, rank: int = 8, alpha: float = 16, bias: bool = True
    ) -> None:
        super().__init__()
        self.base_layer = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
        self.lora = LoRALayer(in_features, out_features, rank, alpha)

    @classmethod
    def wrap(cls, layer: nn.Linear, rank: int = 8, alpha: float = 16) -> LinearWithLoRA:
        """Adapt a layer that exists; it is frozen and becomes ``base_layer``, the very object."""
        wrapped = cls(layer.in_features, layer.out_features, rank, alpha, bias=layer.bias is not None)
        wrapped.base_layer = layer.requires_grad_(False)
        return wrapped.to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """X [..., in] → [..., out]."""
        y: Tensor = self.lora(x, self.base_layer.weight, self.base_layer.bias)
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        base = self.base_layer
        plain = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None).to(base.weight)
        plain.load_state_dict(base.state_dict())
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        plain.weight.copy_(base.weight.to(dtype) + self.lora.delta(dtype))
        return plain
