"""Which strategy a run uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World, need_group

Kind = Literal["none", "ddp", "fsdp", "deepspeed"]


def make_strategy(
    kind: Kind,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    deepspeed: Mapping[str, Any] | None = None,
) -> Strategy:
    """The strategy called ``kind`` for a fresh optimizer; ``deepspeed`` has the filled-in settings of that one.

    The model's adapters are attached, and what trains is chosen. With fsdp and deepspeed it may be on the CPU.
    """
    if kind in ("fsdp", "deepspeed"):
        need_group()
    match kind:
        case "none":
            return Strategy(model, optimizer, world)
        case "ddp":
            from lorakit.parallel.ddp import Replicated

            return Replicated(model, optimizer, world)
        case "fsdp":
            from lorakit.parallel.fsdp import FullySharded

            return FullySharded(model, optimizer, world)
        case "deepspeed":
            from lorakit.parallel.zero import Zero

            assert deepspeed is not None
            return Zero(model, optimizer, world, deepspeed)
