"""The base in parts: every rank keeps a part of each transformer block's weights and gathers a block to use it.

Torch's FSDP2 (``fully_shard``) does that for the base, frozen or not: bfloat16, and the uint8 of quantised
weights, too, as a frozen tensor is only gathered. The adapters stay out of it. They are small and float32,
whatever the base is, so each rank has them whole and their gradients are added up as in `ddp`: any optimizer
works on them, and nothing of theirs is gathered in a pass. Not run on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lorakit import hardware
from lorakit.adapters.attach import carriers
from lorakit.checkpoint.state import State, check_same
from lorakit.errors import UsageError
from lorakit.parallel.ddp import start_alike, sum_gradients
from lorakit.parallel.strategy import Sharded, changing
from lorakit.parallel.world import World

# Each number that these move depends on its own gradient and moments alone, so that parts can be moved apart.
ELEMENTWISE = (torch.optim.AdamW, torch.optim.SGD)


class FullySharded(Sharded):
    """Many processes, each with a part of the base and all of the adapters.

    Args:
        model: on the CPU; block by block it moves to this rank's device.
        optimizer: of ``model``, not used yet; where the base trains, it gets the parts in exchange.
        world: all ranks.

    Raises:
        UsageError: the base trains, with an optimizer that needs whole tensors.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
        super().__init__(model, optimizer, world)
        adapters = [p for carrier in carriers(model).values() for p in carrier.adapters.parameters()]
        names = {id(p): name for name, p in model.named_parameters()}
        mesh = init_device_mesh(hardware.device(), (world.size,))
        for module in (*blocks(model), model):
            # Gathered weights are forgotten after each pass, the root's too: what is registered in the model
            # outside of a pass are the parts, always.
            fully_shard(module, mesh=mesh, ignored_params=set(adapters), reshard_after_forward=True)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # the sum over the ranks, not the mean
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale on the way
        model.to(hardware.device())  # adapters and what else FSDP left where it was
        parts = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [parts[names[id(p)]] for p in group["params"]]
        self._part_groups()
        start_alike(world, adapters)

    def admit(self, group: dict[str, Any]) -> None:
        """As there; the group has the parts."""
        super().admit(group)
        self._part_groups()

    def reduce(self) -> None:
        """Add up the gradients of what is whole; those of the parts came added up out of the backward pass."""
        sum_gradients(self.world, [p for p in self.trainable().values() if not isinstance(p, DTensor)])

    def collect(self) -> State:
        """Gathered one after the other; only rank 0 keeps them."""
        state = super().collect()
        for name, tensor in state.tensors.items():
            if isinstance(tensor, DTensor):
                whole = tensor.full_tensor()
                state.tensors[name] = whole.cpu() if self.world.first else whole.new_empty(0)
        return state

    def restore(self, state: State) -> None:
        """Every rank takes its parts out of the whole."""
        check_same(state.part("model").tensors, dict(changing(self.model)))
        parts = {name: p for name, p in self.model.named_parameters() if isinstance(p, DTensor)}
        mine = {name: _part(name, tensor, parts) for name, tensor in state.tensors.items()}
        super().restore(State(mine, state.values))

    def _gradients(self) -> dict[str, Tensor]:
        return {n: g.to_local() if isinstance(g, DTensor) else g for n, g in super()._gradients().items()}

    def _counts(self, name: str) -> bool:
        return self.world.first or isinstance(self.model.get_parameter(name), DTensor)

    def _part_groups(self) -> None:
        """Give parts groups of their own: torch's kernels take no mixture with whole tensors."""
        for group in list(self.optimizer.param_groups):
            parts = [p for p in group["params"] if isinstance(p, DTensor)]
            if parts and not isinstance(self.optimizer, ELEMENTWISE):
                raise UsageError(
                    f"the base trains in parts, and {type(self.optimizer).__name__} needs whole tensors",
                    remedy="optim: adamw_torch (or sgd); adapters alone train with any optimizer",
                )
            if 0 < len(parts) < len(group["params"]):
                group["params"] = [p for p in group["params"] if not isinstance(p, DTensor)]
                self.optimizer.add_param_group({**group, "params": parts})


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks: the members of the outermost lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def _part(name: str, tensor: Tensor, parts: Mapping[str, DTensor]) -> Tensor:
    """What this rank keeps of ``model/<parameter>`` or ``optimizer/<parameter>/<slot>``: all or a part."""
    kind, _, rest = name.partition("/")
    part = parts.get(rest if kind == "model" else rest.rpartition("/")[0])
    if part is None or tensor.shape != part.shape:
        return tensor
    # Every rank has the whole, so nothing is sent (src_data_rank=None).
    return distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements, src_data_rank=None)
