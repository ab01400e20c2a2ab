"""The optimizer, built on what is trainable (never on names)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorakit.adapters.attach import adapter_layers


def adamw(
    model: nn.Module,
    *,
    rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    ratio: float | None = None,
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101) over all that is trainable in ``model``; for ``ratio`` see `groups`."""
    return torch.optim.AdamW(
        groups(model, ratio), lr=rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
    )


def groups(model: nn.Module, ratio: float | None = None) -> list[dict[str, Any]]:
    """What is trainable, in groups that each say by what ``factor`` the learning rate is multiplied.

    With ``ratio`` the matrices B learn that many times faster than everything else (LoRA+, arXiv 2402.12354).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if ratio is None:
        return [{"params": trainable, "factor": 1.0}]
    layers = adapter_layers(model).values()
    faster = {id(layer.adapter(name).lora_B) for layer in layers for name in layer.adapters}
    return [
        {"params": [p for p in trainable if id(p) not in faster], "factor": 1.0},
        {"params": [p for p in trainable if id(p) in faster], "factor": ratio},
    ]
