"""How one update's gradient comes about and moves the weights: the seam between the step and many processes.

The step calls, on every rank alike: `backward` for each micro-batch, `reduce` once, `norm`, then `step` or
`discard`. This class is the whole of it for one process, and what the others refine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import carriers
from lorakit.checkpoint.state import State, check_same
from lorakit.optim.state import optimizer_state, restore_optimizer
from lorakit.parallel.world import World


class Strategy:
    """One process with the whole model.

    Attributes:
        model: the model as the caller knows it, adapters and all.
        forward: what a forward pass goes through; the model itself unless something wraps it.
        recovers: whether an update may be abandoned in the middle of a pass on one rank alone (out of memory).
    """

    recovers = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.model = model
        self.forward: nn.Module = model
        self.optimizer = optimizer
        self.world = world

    def trainable(self) -> dict[str, nn.Parameter]:
        """What the optimizer moves, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def admit(self, group: dict[str, Any]) -> None:
        """Let the optimizer move more parameters, too (a second stage): a group as torch takes it."""
        self.optimizer.add_param_group(group)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``, this rank's share of the update's; ``last`` of the update's passes."""
        loss.backward()

    def reduce(self) -> None:
        """Make the gradient the sum over all ranks."""

    def norms(self) -> dict[str, float]:
        """The 2-norm of the update's gradient, of each trainable tensor."""
        return {name: float(gradient.norm()) for name, gradient in self._gradients().items()}

    def norm(self) -> float:
        """The 2-norm of the update's whole gradient."""
        return float(torch.nn.utils.get_total_norm(list(self._gradients().values())))

    def scale(self, factor: float) -> None:
        """Multiply the gradient."""
        for gradient in self._gradients().values():
            gradient.mul_(factor)

    def step(self) -> None:
        """Move the weights along the gradient, which stays there until `discard`."""
        self.optimizer.step()

    def discard(self) -> None:
        """Throw the gradient away."""
        self.optimizer.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block `model` holds whole adapters on rank 0; entered by every rank alike."""
        yield

    def collect(self) -> State:
        """Adapters, all else that trains, and the optimizer, whole: on rank 0 (elsewhere it may be empty)."""
        state = State()
        tensors = {name: p.detach() for name, p in changing(self.model)}
        state.add("model", State(tensors))
        state.add("optimizer", optimizer_state(self.optimizer, dict(self.model.named_parameters())))
        return state

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Continue from what `collect` returned; called by every rank with the same whole state.

        Raises:
            AdapterMismatchError: other names or shapes; nothing was changed.
        """
        tensors = state.part("model").tensors
        check_same(tensors, dict(changing(self.model)))
        restore_optimizer(self.optimizer, dict(self.model.named_parameters()), state.part("optimizer"))
        for name, parameter in changing(self.model):
            parameter.copy_(tensors[name])

    def _gradients(self) -> dict[str, Tensor]:
        """What this rank holds of the gradient: changing it in place changes the update."""
        return {name: p.grad for name, p in self.trainable().items() if p.grad is not None}


class Sharded(Strategy):
    """Many processes, each with a part of what trains. A pass is a conversation, so that none can be redone."""

    recovers = False

    def norms(self) -> dict[str, float]:
        """The parts' squares are added up in float64."""
        parts = self._gradients()
        squares = torch.zeros(len(self.trainable()), dtype=torch.float64)
        for i, name in enumerate(self.trainable()):
            if name in parts and self._counts(name):
                squares[i] = torch.linalg.vector_norm(parts[name].detach()).double() ** 2
        self.world.add(squares)
        return dict(zip(self.trainable(), squares.sqrt().tolist(), strict=True))

    def norm(self) -> float:
        """From the norms of the tensors."""
        return math.sqrt(sum(norm**2 for norm in self.norms().values()))

    def _counts(self, name: str) -> bool:
        """Whether this rank's part of a gradient is its alone, or else this rank answers for all."""
        return True


def changing(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What a checkpoint keeps: all of the adapters, and everything else that trains."""
    adapters = {id(p) for carrier in carriers(model).values() for p in carrier.adapters.parameters()}
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad or id(p) in adapters)
