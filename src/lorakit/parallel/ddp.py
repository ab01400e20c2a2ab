"""Every rank has the whole model; what trains starts alike and moves by the sum of the ranks' gradients.

The sum is taken once, after the update's last pass, in a few flat buckets; torch's wrapper would send each
gradient during the backward pass. decisions/0013 says why, and what that costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lorakit.parallel.strategy import Strategy, changing
from lorakit.parallel.world import World

BUCKET = 2**24  # numbers sent at once: 64 MiB in float32


class Replicated(Strategy):
    """Many processes, each with the whole model."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        super().__init__(model, optimizer, world)
        start_alike(world, (p for _, p in changing(model)))

    def admit(self, group: dict[str, Any]) -> None:
        """As there; the new parameters start alike, too."""
        start_alike(self.world, group["params"])
        super().admit(group)

    def reduce(self) -> None:
        """Add up the gradients, bucket by bucket."""
        sum_gradients(self.world, list(self.trainable().values()))


@torch.no_grad()
def start_alike(world: World, parameters: Iterable[nn.Parameter]) -> None:
    """Give every rank the first one's numbers."""
    for parameter in parameters:
        world.copy(parameter.data)


@torch.no_grad()
def sum_gradients(world: World, parameters: list[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the ranks, added up in float32 or better.

    Ranks may differ in which parameters have a gradient (experts that no token reached): a missing one counts
    as zero, and what has none anywhere keeps none, as in one process. So a flag goes with every tensor.
    """
    for bucket in _buckets(parameters):
        dtype = torch.promote_types(bucket[0].dtype, torch.float32)
        flags = torch.tensor([p.grad is not None for p in bucket], dtype=dtype, device=bucket[0].device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([flags, *(part.reshape(-1).to(dtype) for part in parts)])
        world.add(flat)
        present, *sums = flat.split([len(bucket), *(p.numel() for p in bucket)])
        for p, total, known in zip(bucket, sums, present.tolist(), strict=True):
            p.grad = total.view(p.shape).to(p.dtype) if known else None


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of one dtype and device, of up to `BUCKET` numbers (or a single larger tensor)."""
    bucket: list[nn.Parameter] = []
    room = BUCKET
    for p in sorted(parameters, key=lambda p: (str(p.dtype), str(p.device))):
        alike = not bucket or (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and p.numel() <= room):
            yield bucket
            bucket, room = [], BUCKET
        bucket.append(p)
        room -= p.numel()
    if bucket:
        yield bucket
