"""Switches that trade time for memory, or a slow start for speed: each for one model, with an undo.

What is computed stays the same: on a CPU bit for bit, dropout included; compiled, up to rounding, and dropout
draws other numbers. The paths for a GPU, which move tensors to the CPU's memory, were never run on one: only
what they are made of is tested.

There is no switch for autocast. A frozen base computes in its own dtype, and `ops.linear` casts the small
adapters to it. A float32 base under autocast would be cast anew in every pass, as autocast remembers trainable
tensors only, and the copies would be kept for the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorakit.errors import ModelError, UsageError
from lorakit.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Forward = Callable[..., Any]
_EXCERPT = 200  # characters of what a compiler says


def blocks(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The blocks that a transformers model repeats, in its order of modules; those inside another are left out.

    Raises:
        ModelError: it has none.
    """
    found: dict[str, GradientCheckpointingLayer] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[path] = module
    if not found:
        raise ModelError(
            f"no repeated blocks are known of {type(model).__name__}",
            remedy="leave out gradient_checkpointing and torch_compile",
        )
    return list(found.values())


@contextlib.contextmanager
def switched(
    model: PreTrainedModel, *, recompute_every: int | None = None, offload: bool = False, compiled: bool = False
) -> Iterator[None]:
    """Within the block, the model's blocks run in training as the switches say; in evaluation as ever.

    The model must be called with ``use_cache=False``: recomputing a block would write to the cache once more.

    Args:
        model: from transformers.
        recompute_every: of every so many blocks, the first keeps its input alone and computes the rest again
            for the backward pass, with the same random numbers: 1 for all blocks, None for none.
        offload: keep these inputs in pinned CPU memory; without effect on a CPU, which the log says.
        compiled: one region a block, for all of which a few compiled functions serve. Sizes are left open, and
            attention in packed batches is left out, so that other lengths or layouts do not compile anew.

    Raises:
        ModelError: no blocks are known of this model.
        UsageError: nothing can be compiled here.
    """
    if compiled:
        _check_compiler(model.device)
    if offload and model.device.type == "cpu":
        logger.info("offload_activations: the model is on a CPU, where activations are already")
        offload = False
    with contextlib.ExitStack() as undo:
        for number, block in enumerate(blocks(model) if compiled or recompute_every else []):
            forward = plain = block.forward
            if compiled:
                forward = torch.compile(forward, dynamic=True)
            # Recomputation goes around: a region that contains it would not be compiled.
            if recompute_every and number % recompute_every == 0:
                forward = functools.partial(_recompute_from_cpu if offload else _recompute, forward)
            # `forward`, not `__call__`, so that what a sharded module does around it is done once.
            undo.enter_context(_with(block, "forward", _in_training(block, forward, plain)))
        yield


@contextlib.contextmanager
def offloaded_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within the block, the optimizer's state waits in pinned CPU memory between updates.

    It is brought back for the update, when the activations are gone: the highest point of a step is lower by
    the size of the state. Without effect on a CPU, which the log says.
    """
    if all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"]):
        logger.info("offload_optimizer: the parameters are on a CPU, where the optimizer's state is already")
        yield
        return
    shelf = _Shelf()
    before = optimizer.register_step_pre_hook(lambda *_: shelf.bring_back())
    after = optimizer.register_step_post_hook(lambda changed, *_: shelf.put_away(changed))
    try:
        yield
    finally:
        before.remove()
        after.remove()
        shelf.bring_back()


class _Shelf:
    """Where the large tensors of an optimizer's state are meanwhile."""

    def __init__(self) -> None:
        self._away: list[tuple[dict[str, Any], str, torch.device]] = []

    def put_away(self, optimizer: torch.optim.Optimizer) -> None:
        for slots in optimizer.state.values():
            for name, value in slots.items():
                if isinstance(value, Tensor) and value.dim() > 0:  # counters are read on the CPU as they are
                    aside = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                    slots[name] = aside.copy_(value)
                    self._away.append((slots, name, value.device))

    def bring_back(self) -> None:
        for slots, name, device in self._away:
            slots[name] = slots[name].to(device, non_blocking=True)
        self._away.clear()


def _in_training(block: nn.Module, forward: Forward, plain: Forward) -> Forward:
    """Merged weights, with which evaluation runs, would be compiled anew each time."""
    return lambda *args, **kwargs: (forward if block.training else plain)(*args, **kwargs)


def _recompute(forward: Forward, *inputs: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *inputs, use_reentrant=False, **kwargs)


def _recompute_from_cpu(forward: Forward, *inputs: Any, **kwargs: Any) -> Any:
    # Saved under these hooks are the inputs alone: inside, `checkpoint` has hooks of its own.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return _recompute(forward, *inputs, **kwargs)


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(_one_more)(torch.zeros(2, device=device))
    except RuntimeError as error:  # of torch._dynamo or of torch._inductor: all are of this kind
        raise UsageError(
            f"torch_compile does not work here: {' '.join(str(error).split())[:_EXCERPT]}",
            remedy="install a C++ compiler (CPU) or triton (GPU), or leave torch_compile out",
        ) from error


def _one_more(x: Tensor) -> Tensor:
    return x + 1


@contextlib.contextmanager
def _with(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Within the block, this one module has another value of an attribute."""
    own = vars(module)
    before = {name: own[name]} if name in own else {}
    setattr(module, name, value)
    try:
        yield
    finally:
        del own[name]
        own.update(before)
