"""AdaLoRA (arXiv 2303.10512): W' = W + s · P Λ Q, singular values that training may remove.

P is ``lora_B`` [out, r], Q is ``lora_A`` [r, in] and Λ the diagonal ``lora_E`` [r, 1]. Which entries of Λ
stay is decided by `lorakit.lowrank.budget.RankAllocator`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lorakit.adapters.methods.lora import LoRA
from lorakit.adapters.methods.method import Adapter, Site
from lorakit.lowrank.inits import Origin


class AdaLoRA(LoRA):
    """y + s · P Λ Q dropout(x)."""

    name: ClassVar[str] = "adalora"
    additive: ClassVar[bool] = True

    def start(self, layer: Site, adapter: Adapter, origin: Origin) -> None:
        """P and Q normal with standard deviation 0.02, Λ zero."""
        for parameter in (adapter.lora_A, adapter.lora_B):
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=origin.generator))
        adapter.lora_E = nn.Parameter(torch.zeros(adapter.rank, 1, device=adapter.lora_A.device))

    def factors(self, adapter: Adapter) -> tuple[Tensor, Tensor]:
        """Λ Q and P."""
        A = adapter.lora_A
        return A * adapter.get_parameter("lora_E").view(-1, *(1 for _ in A.shape[1:])), adapter.lora_B
