"""DeepSpeed's ZeRO: stage 1 shards the optimizer's memory, 2 the gradient as well, 3 also the weights.

The optimizer stays the run's own; settings that would choose another are refused (`zero_config`). DeepSpeed
takes means over the ranks, so the loss is multiplied by their number; and its own accumulation, clipping, loss
scale and schedule are off. Trained weights and moments are in float32 parts, from which `collect` gathers the
one state that every strategy shares. Not run on GPUs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.checkpoint.state import State, check_same
from lorakit.errors import AdapterMismatchError, UsageError
from lorakit.optim.state import optimizer_state, restore_optimizer
from lorakit.parallel.fsdp import ELEMENTWISE
from lorakit.parallel.strategy import Sharded, changing
from lorakit.parallel.world import World

_BEFORE_FIRST_PASS = -1


class Zero(Sharded):
    """Many processes under a DeepSpeed engine.

    Args:
        model: on the CPU; the engine moves or shards it.
        optimizer: of ``model``, not used yet.
        world: all ranks.
        settings: of DeepSpeed, as `zero_config.fill` returns them.

    Raises:
        UsageError: DeepSpeed is not installed, or the optimizer needs whole tensors.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(model, optimizer, world)
        if not isinstance(optimizer, ELEMENTWISE):
            raise UsageError(
                f"DeepSpeed cuts tensors in parts, and {type(optimizer).__name__} needs them whole",
                remedy="optim: adamw_torch (or sgd)",
            )
        names = {id(p): name for name, p in model.named_parameters()}
        self._names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._deepspeed = _deepspeed()
        with contextlib.redirect_stdout(sys.stderr):  # it prints how its operators are built
            self._engine, *_ = self._deepspeed.initialize(
                model=model, optimizer=optimizer, config=dict(settings), dist_init_required=False
            )
        self.forward = self._engine
        self._zero = self._engine.optimizer
        self._weights_sharded = settings["zero_optimization"]["stage"] == 3

    def admit(self, group: dict[str, Any]) -> None:
        """Refused: the engine has laid out what it moves.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "a second stage cannot begin inside a run under DeepSpeed",
            remedy="use fsdp, or make the second stage a run of its own",
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The engine reduces the gradient on the way."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world.size)

    def scale(self, factor: float) -> None:
        """Part by part."""
        for name, gradient in self._gradients().items():
            if self._weights_sharded:
                self._deepspeed.utils.safe_set_local_grad(self.model.get_parameter(name), gradient * factor)
            else:
                gradient.mul_(factor)

    def step(self) -> None:
        """The gradient is gone afterwards."""
        self._engine.step()

    def discard(self) -> None:
        """As the engine does itself with a gradient that overflowed."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        if self._weights_sharded:
            if zero.offload_optimizer:
                zero.reset_cpu_buffers()
            else:
                zero.averaged_gradients = {}
            return
        zero.micro_step_id = _BEFORE_FIRST_PASS
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        else:
            for kept in (zero.averaged_gradients, zero.all_grad_tensors):
                kept.update(dict.fromkeys(kept))

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """The weights that a checkpoint keeps are whole on every rank."""
        with self._gathered(writer=None):
            yield

    @torch.no_grad()
    def collect(self) -> State:
        """Gathered one after the other; only rank 0 keeps them."""
        with self._gathered(writer=None):
            tensors = {name: p.detach().clone() for name, p in changing(self.model) if self.world.first}
        whole: dict[str, nn.Parameter] = {}
        memory: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        kept: dict[str, Tensor] = next(iter(self.optimizer.state.values()), {})  # the same slots for every part
        for name, p in self._moved():
            weight = self._deepspeed.utils.safe_get_full_fp32_param(p)
            slots = {slot: self._slot(p, slot, value) for slot, value in kept.items()}
            if self.world.first:
                tensors[name] = weight
                whole[name] = nn.Parameter(weight)
                memory[whole[name]] = slots
        if not self.world.first:
            return State()
        state = State()
        state.add("model", State(tensors))
        state.add("optimizer", optimizer_state(self._twin(whole, memory), whole))
        return state

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Every rank takes its parts out of the whole."""
        tensors = state.part("model").tensors
        check_same(tensors, self._shapes())
        whole = {name: nn.Parameter(tensors[name]) for name, _ in self._moved()}
        twin = self._twin(whole, defaultdict(dict))
        restore_optimizer(twin, whole, state.part("optimizer"))
        self._begin([twin.state[p] for p in whole.values()])
        with self._gathered(writer=0):
            for name, p in changing(self.model):
                p.copy_(tensors[name])
        for name, p in self._moved():
            self._put(p, tensors[name])
            for slot, value in twin.state[whole[name]].items():
                if slot != "step":
                    self._put(p, value, slot)

    def _gradients(self) -> dict[str, Tensor]:
        if self._weights_sharded:
            local = self._deepspeed.utils.safe_get_local_grad
            return {name: local(p) for name, p in self.trainable().items()}
        return {
            name: p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)
            for name, p in self._moved()
            if p._hp_mapping is not None  # else it lies in other ranks' parts
        }

    def _moved(self) -> Iterator[tuple[str, Any]]:
        """All that the optimizer moves, by name."""
        return ((name, self.model.get_parameter(name)) for names in self._names for name in names)

    def _twin(
        self, whole: Mapping[str, nn.Parameter], memory: defaultdict[Tensor, Any]
    ) -> torch.optim.Optimizer:
        """The optimizer as one process would have it: of whole parameters, with what it remembers of them."""
        twin = copy.copy(self.optimizer)
        twin.param_groups = [
            {**group, "params": [whole[name] for name in names if name in whole]}
            for group, names in zip(self.optimizer.param_groups, self._names, strict=True)
        ]
        twin.state = memory
        return twin

    def _slot(self, p: Any, slot: str, value: Tensor) -> Tensor:
        """What the optimizer remembers of a parameter, whole on every rank."""
        if slot == "step":
            return value.clone()
        if self._weights_sharded:
            return self._deepspeed.utils.safe_get_full_optimizer_state(p, slot)
        whole = torch.zeros(p.numel(), device=value.device)
        for mine, kept in self._places(p, whole, slot):
            mine.copy_(kept)
        self.world.add(whole)
        return whole.view(p.shape)

    def _places(self, p: Any, whole: Tensor, slot: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Where this rank's part of a parameter, if it has one, lies in a whole tensor and in its memory.

        DeepSpeed's own functions find that of the first parameter group only (stages 1 and 2, 0.19).
        """
        if place := p._hp_mapping:
            flat = self._zero.single_partition_of_fp32_groups[place.param_group_index]
            here, there = place.lp_fragment_address, place.hp_fragment_address
            kept = self.optimizer.state[flat][slot]
            yield whole.narrow(0, here.start, here.numel), kept.narrow(0, there.start, there.numel)

    def _begin(self, slots: list[dict[str, Any]]) -> None:
        """Let the optimizer have places for ``slots`` in its parts, or forget everything if there are none."""
        steps = {float(each["step"]) if "step" in each else None for each in slots}
        if len(steps) > 1:
            raise AdapterMismatchError(
                "the saved parameters were not all updated equally often, which DeepSpeed's parts cannot hold",
                remedy="go on under ddp or fsdp",
            )
        zero, sharded = self._zero, self._weights_sharded
        fused = self.optimizer.param_groups[0].get("fused")
        for flat in zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups:
            memory = self.optimizer.state[flat]
            for old in memory.values():
                old.zero_()
            for slot, value in slots[0].items():
                if slot == "step":
                    memory[slot] = value.detach().clone().to(flat.device if fused else "cpu")
                elif slot not in memory:
                    memory[slot] = torch.zeros_like(flat)

    def _put(self, p: Any, value: Tensor, slot: str | None = None) -> None:
        """Write this rank's part of a weight, or of what the optimizer remembers of it."""
        utils = self._deepspeed.utils
        if self._weights_sharded:
            size = p.ds_tensor.numel()  # the last rank's part is padded
            flat = F.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            part = flat.narrow(0, size * self.world.rank, size)
            if slot is None:
                utils.safe_set_local_fp32_param(p, part)
            else:
                utils.safe_set_local_optimizer_state(p, part, slot)
        elif slot is None:
            utils.safe_set_full_fp32_param(p, value)
        else:
            for mine, kept in self._places(p, value.flatten(), slot):
                kept.copy_(mine)

    def _gathered(self, *, writer: int | None) -> contextlib.AbstractContextManager[Any]:
        """Within the block the kept weights are whole; ``writer`` changes them for all."""
        kept = [p for _, p in changing(self.model)]
        gather = self._deepspeed.zero.GatheredParameters
        return gather(kept, modifier_rank=writer) if self._weights_sharded else contextlib.nullcontext()

    def _shapes(self) -> dict[str, Tensor]:
        with self._gathered(writer=None):
            return {name: torch.empty_like(p, device="meta") for name, p in changing(self.model)}


def _deepspeed() -> ModuleType:
    """DeepSpeed, saying only what matters."""
    try:
        module = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UsageError(
            f"deepspeed: it cannot be imported ({error})", remedy="pip install 'lorakit[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return module
