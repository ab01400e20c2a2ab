"""An optimizer's memory by parameter name, so that order, groups and the number of processes may change.

    <parameter>/<slot>      exp_avg, exp_avg_sq, step, …

Torch's own ``state_dict`` goes by position: the equally shaped adapters of a model in another order would take
each other's moments without a word. What an optimizer keeps of a parameter stands in one table here, so that a
saved state is checked before anything is changed. Rates and decays are no state: they are the configuration's,
which says whether they may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.checkpoint.state import State, check_match
from lorakit.errors import AdapterMismatchError, LorakitError

Slots = dict[str, Any]  # a tensor, or a Python number

# Worked out anew: the codebooks of bitsandbytes, and the size of the weights that Adafactor measures.
_DERIVED = {"qmap1", "qmap2", "RMS"}
_BLOCK = 256  # numbers that share a scale in the 8-bit moments of bitsandbytes


class _Moved(NamedTuple):
    """A parameter that an optimizer moves, and where the optimizer has it: numbers of group and place."""

    name: str
    parameter: nn.Parameter
    group: dict[str, Any]
    at: tuple[int, int]


def optimizer_state(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> State:
    """What ``optimizer`` remembers: its live tensors, to be copied by whoever wants to keep them.

    Args:
        optimizer: one that `build_optimizer` made.
        named: the model's parameters by name; more than the optimizer moves are welcome.
    """
    kind, moved = _kind(optimizer), list(_moved(optimizer, named))
    slots = {
        f"{each.name}/{slot}": value
        for each in moved
        for slot, value in optimizer.state.get(each.parameter, {}).items()
        if slot not in _DERIVED
    }
    tensors = {name: value.detach() for name, value in slots.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in slots.items() if name not in tensors}
    return State(tensors, {"kind": kind, "parameters": sorted(each.name for each in moved), "numbers": numbers})


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], state: State
) -> None:
    """Let ``optimizer`` remember what `optimizer_state` returned, bit for bit, whatever it remembers now.

    Raises:
        AdapterMismatchError: another optimizer, or other names, shapes or dtypes; nothing was changed.
    """
    kind, found = _kind(optimizer), state.values.get("kind")
    if found != kind:
        raise AdapterMismatchError(
            f"the saved state is that of {found}, this run's optimizer is {kind}",
            remedy="write the optim of the saved run; nothing was loaded",
        )
    saved = state.tensors | state.values["numbers"]
    begun = {name.rpartition("/")[0] for name in saved}  # the others never had a gradient
    moved = list(_moved(optimizer, named))
    expected = {each.name: _SLOTS[kind](optimizer, each) if each.name in begun else {} for each in moved}
    flat = {f"{name}/{slot}": value for name, slots in expected.items() for slot, value in slots.items()}
    check_match(
        dict.fromkeys(state.values["parameters"], "trained") | _described(saved),
        dict.fromkeys(expected, "trained") | _described(flat),
    )
    for each in moved:
        optimizer.state.pop(each.parameter, None)
        if expected[each.name]:
            slots = _begin(optimizer, each, expected[each.name])
            for slot in expected[each.name]:
                value = saved[f"{each.name}/{slot}"]
                slots[slot] = slots[slot].copy_(value) if isinstance(value, Tensor) else value


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """``torch.AdamW``, ``bitsandbytes.AdamW``: by name, for not all of these libraries are there."""
    made = type(optimizer)
    kind = f"{made.__module__.partition('.')[0]}.{made.__name__}"
    if kind not in _SLOTS:
        raise LorakitError(f"what {kind} remembers of a parameter is not known here")
    return kind


def _moved(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> Iterator[_Moved]:
    names = {id(p): name for name, p in named.items()}
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            yield _Moved(names[id(p)], p, group, (i, j))


def _described(slots: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        for name, value in slots.items()
    }


def _begin(optimizer: torch.optim.Optimizer, moved: _Moved, slots: Slots) -> Slots:
    """Let ``optimizer`` have places for ``slots``, where it would have made them itself."""
    p, group = moved.parameter, moved.group
    if "state1" in slots:  # bitsandbytes, which adds its codebooks and may page the rest
        optimizer.init_state(group, p, *moved.at)  # type: ignore[attr-defined]
    else:
        optimizer.state[p] = {slot: _place(slot, value, moved) for slot, value in slots.items()}
    return optimizer.state[p]


def _place(slot: str, value: Any, moved: _Moved) -> Any:
    p, group = moved.parameter, moved.group
    if not isinstance(value, Tensor):
        return value
    if slot == "step":  # torch reads it on the CPU, unless its kernel does
        return torch.empty((), dtype=value.dtype, device=p.device if group.get("fused") else "cpu")
    if value.shape == p.shape:
        return torch.empty_like(p, dtype=value.dtype)  # with the layout of p, distributed ones included
    return torch.empty(value.shape, dtype=value.dtype, device=p.device)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Shape and dtype alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _adamw(optimizer: torch.optim.Optimizer, moved: _Moved) -> Slots:
    p = moved.parameter
    moments = {slot: _tensor(p.shape, p.dtype) for slot in ("exp_avg", "exp_avg_sq")}
    return {"step": _tensor((), torch.float32), **moments}


def _sgd(optimizer: torch.optim.Optimizer, moved: _Moved) -> Slots:
    p = moved.parameter
    return {"momentum_buffer": _tensor(p.shape, p.dtype)} if moved.group["momentum"] else {}


def _adafactor(optimizer: torch.optim.Optimizer, moved: _Moved) -> Slots:
    p = moved.parameter
    dtype = torch.promote_types(p.dtype, torch.float32)
    if p.ndim < 2:
        return {"step": 0, "exp_avg_sq": _tensor(p.shape, dtype)}
    rows, columns = p.shape[:-1], (*p.shape[:-2], p.shape[-1])
    return {"step": 0, "exp_avg_sq_row": _tensor(rows, dtype), "exp_avg_sq_col": _tensor(columns, dtype)}


def _bitsandbytes(optimizer: Any, moved: _Moved) -> Slots:
    p, given = moved.parameter, optimizer.args
    if given.optim_bits == 32 or p.numel() < given.min_8bit_size:
        return {"step": 0} | {slot: _tensor(p.shape, torch.float32) for slot in ("state1", "state2")}
    scales = (-(-p.numel() // _BLOCK),)
    moments = {slot: _tensor(p.shape, torch.uint8) for slot in ("state1", "state2")}
    return {"step": 0} | moments | {slot: _tensor(scales, torch.float32) for slot in ("absmax1", "absmax2")}


_SLOTS: dict[str, Callable[[Any, _Moved], Slots]] = {
    "torch.AdamW": _adamw,
    "torch.SGD": _sgd,
    "transformers.Adafactor": _adafactor,
    "bitsandbytes.AdamW": _bitsandbytes,
}
