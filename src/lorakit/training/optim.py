"""The optimizer, built on what is trainable (never on names)."""

from __future__ import annotations

import torch
from torch import nn


def adamw(
    model: nn.Module, *, rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101) over every trainable parameter of ``model``."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trainable, lr=rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
    )
