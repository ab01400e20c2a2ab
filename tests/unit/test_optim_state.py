"""An optimizer's state: saved in the middle and restored, the rest of the run is the same bit for bit."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit import add_lora_to_model
from lorakit.checkpoint.state import State, check_same
from lorakit.errors import AdapterMismatchError, LorakitError
from lorakit.optim.build import build_optimizer, set_rate
from lorakit.optim.spec import OptimizerSpec
from lorakit.optim.state import optimizer_state, restore_optimizer

UPDATES = 20
SPECS = [
    OptimizerSpec("adamw_torch", 1e-2, weight_decay=0.1),
    OptimizerSpec("sgd", 1e-2, args={"momentum": 0.9}),
    OptimizerSpec("sgd", 1e-2),
    OptimizerSpec("adafactor", 1e-2),
    OptimizerSpec("adamw_8bit", 1e-2),
    OptimizerSpec("paged_adamw_8bit", 1e-2),
    OptimizerSpec("paged_adamw_32bit", 1e-2),
]
IDS = [f"{spec.name}{'-momentum' if spec.args else ''}" for spec in SPECS]
ORDERS = [("wide", "square", "out"), ("out", "square", "wide")]


class Net(nn.Module):
    """Two equally shaped layers, which may be mistaken for each other, in any order of registration."""

    def __init__(self, order: Sequence[str] = ORDERS[0], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shapes = {"wide": (66, 66), "square": (66, 66), "out": (66, 3)}
        for name in order:
            self.add_module(name, nn.Linear(*shapes[name], dtype=dtype))
        self.idle = nn.Parameter(torch.zeros(4, dtype=dtype))  # trains, but no gradient ever comes

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in ORDERS[0]:
            y = self.get_submodule(name)(y).tanh()
        return y


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: range, seed: int) -> None:
    """Each update's batch and rate are those of its number."""
    dtype = next(model.parameters()).dtype
    for update in updates:
        generator = torch.Generator().manual_seed(seed + update)
        x, y = (torch.randn(8, n, generator=generator).to(dtype) for n in (66, 3))
        set_rate(optimizer, 1e-2 / (1 + update))
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def through_files(state: State, folder: Path) -> State:
    """As a checkpoint keeps it."""
    save_file(state.tensors, folder / "state.safetensors")
    return State(load_file(folder / "state.safetensors"), json.loads(json.dumps(state.values)))


def twin(model: nn.Module, spec: OptimizerSpec, order: Sequence[str]) -> tuple[Net, torch.optim.Optimizer]:
    """Another model with the same weights by name."""
    other = Net(order, next(model.parameters()).dtype)
    other.load_state_dict(model.state_dict())
    return other, build_optimizer(other, spec)


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("order", ORDERS, ids=["same", "reversed"])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_run_goes_on_bit_for_bit(
    spec: OptimizerSpec, order: Sequence[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    seed, cut = random.randrange(10**6), random.randrange(1, UPDATES)
    model = Net(dtype=dtype)
    optimizer = build_optimizer(model, spec)
    train(model, optimizer, range(cut), seed)
    saved = through_files(optimizer_state(optimizer, named(model)), tmp_path)
    kept = copy.deepcopy(saved)
    other, restored = twin(model, spec, order)
    restore_optimizer(restored, named(other), saved)
    assert equal(optimizer_state(restored, named(other)).tensors, saved.tensors)
    for update in range(cut, UPDATES):
        train(model, optimizer, range(update, update + 1), seed)
        train(other, restored, range(update, update + 1), seed)
        assert equal(weights(model), weights(other)), (seed, cut, update)
    last, same = optimizer_state(optimizer, named(model)), optimizer_state(restored, named(other))
    assert equal(last.tensors, same.tensors) and last.values == same.values
    assert equal(saved.tensors, kept.tensors)  # what was restored from is still what it was


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_a_run_goes_back_in_place(spec: OptimizerSpec) -> None:
    """Restoring over a state that went on, and over one to a fresh start."""
    model = Net()
    optimizer = build_optimizer(model, spec)
    fresh, first = copy.deepcopy(optimizer_state(optimizer, named(model))), weights(model)
    for start in (0, 7):
        middle, at = copy.deepcopy(optimizer_state(optimizer, named(model))), weights(model)
        train(model, optimizer, range(start, 12), 5)
        once = weights(model)
        restore_optimizer(optimizer, named(model), middle)
        model.load_state_dict(at)
        train(model, optimizer, range(start, 12), 5)
        assert equal(weights(model), once)
        restore_optimizer(optimizer, named(model), fresh)
        model.load_state_dict(first)
        assert not optimizer_state(optimizer, named(model)).tensors
        train(model, optimizer, range(7), 5)


def test_what_is_kept_of_each_optimizer() -> None:
    slots = {}
    for spec, key in zip(SPECS, IDS, strict=True):
        model = Net()
        optimizer = build_optimizer(model, spec)
        train(model, optimizer, range(1), 0)
        state = optimizer_state(optimizer, named(model))
        slots[key] = {
            n.partition("/")[2]: (t.dtype, tuple(t.shape)) for n, t in state.tensors.items() if "wide.w" in n
        }
        assert state.values["parameters"] == sorted(named(model))
        numbers = {"wide.weight/step": 1} if key.startswith(("adaf", "paged", "adamw_8")) else {}
        assert {n: v for n, v in state.values["numbers"].items() if "wide.w" in n} == numbers
    full, byte = (torch.float32, (66, 66)), (torch.uint8, (66, 66))
    eight = {
        "state1": byte,
        "state2": byte,
        "absmax1": (torch.float32, (18,)),
        "absmax2": (torch.float32, (18,)),
    }
    assert slots == {
        "adamw_torch": {"step": (torch.float32, ()), "exp_avg": full, "exp_avg_sq": full},
        "sgd-momentum": {"momentum_buffer": full},
        "sgd": {},
        "adafactor": {"exp_avg_sq_row": (torch.float32, (66,)), "exp_avg_sq_col": (torch.float32, (66,))},
        "adamw_8bit": eight,
        "paged_adamw_8bit": eight,
        "paged_adamw_32bit": {"state1": full, "state2": full},
    }


def test_other_groups_are_no_matter() -> None:
    """LoRA+ sorts the parameters anew, and a second stage adds some."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    add_lora_to_model(model, r=2, seed=0)
    one = build_optimizer(model, OptimizerSpec("adamw_torch", 1e-2))
    for _ in range(3):
        model(torch.randn(4, 6)).pow(2).sum().backward()
        one.step()
    two = build_optimizer(model, OptimizerSpec("adamw_torch", 1e-2, ratio=16.0))
    state = optimizer_state(one, named(model))
    restore_optimizer(two, named(model), state)
    assert equal(optimizer_state(two, named(model)).tensors, state.tensors)
    assert len(state.values["parameters"]) == 4 and len(state.tensors) == 12


def _drop(state: State) -> None:
    del state.tensors["wide.weight/exp_avg"]


def _rename(state: State) -> None:
    state.tensors["tall.weight/exp_avg"] = state.tensors.pop("wide.weight/exp_avg")


def _reshape(state: State) -> None:
    state.tensors["out.weight/exp_avg"] = state.tensors["out.weight/exp_avg"].T.contiguous()


def _halve(state: State) -> None:
    state.tensors["out.weight/exp_avg"] = state.tensors["out.weight/exp_avg"].half()


def _freeze(state: State) -> None:
    state.values["parameters"].remove("idle")


def _number(state: State) -> None:
    state.values["numbers"]["wide.weight/step"] = 3
    del state.tensors["wide.weight/step"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, r"in 1 places:\n  wide.weight/exp_avg: expected torch.float32 \[66, 66\], found none\n"),
        (_rename, r"in 2 places:(.|\n)*tall.weight/exp_avg: expected none, found torch.float32 \[66, 66\]"),
        (_reshape, r"out.weight/exp_avg: expected torch.float32 \[3, 66\], found torch.float32 \[66, 3\]"),
        (_halve, r"expected torch.float32 \[3, 66\], found torch.float16 \[3, 66\]"),
        (_freeze, r"in 1 places:\n  idle: expected trained, found none"),
        (_number, r"wide.weight/step: expected torch.float32 \[\], found int"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil: Any, message: str) -> None:
    model = Net()
    optimizer = build_optimizer(model, SPECS[0])
    train(model, optimizer, range(3), 0)
    state = copy.deepcopy(optimizer_state(optimizer, named(model)))
    spoil(state)
    train(model, optimizer, range(3, 6), 0)
    before = copy.deepcopy(optimizer_state(optimizer, named(model)))
    with pytest.raises(AdapterMismatchError, match=message):
        restore_optimizer(optimizer, named(model), state)
    after = optimizer_state(optimizer, named(model))
    assert equal(before.tensors, after.tensors) and before.values == after.values


@pytest.mark.parametrize(
    ("saved", "used", "message"),
    [
        (0, 1, r"that of torch.AdamW, this run's optimizer is torch.SGD"),
        (4, 0, r"that of bitsandbytes.AdamW, this run's optimizer is torch.AdamW"),
        (4, 6, r"expected none, found torch.float32 \[18\]"),
        (1, 2, r"wide.weight/momentum_buffer: expected none"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(saved: int, used: int, message: str) -> None:
    model = Net()
    optimizer = build_optimizer(model, SPECS[saved])
    train(model, optimizer, range(2), 0)
    other = build_optimizer(model, SPECS[used])
    with pytest.raises(AdapterMismatchError, match=message):
        restore_optimizer(other, named(model), optimizer_state(optimizer, named(model)))
    assert not other.state


def test_8_and_paged_8_bit_are_one_state() -> None:
    model = Net()
    optimizer = build_optimizer(model, SPECS[4])
    train(model, optimizer, range(2), 0)
    other = build_optimizer(model, SPECS[5])
    restore_optimizer(other, named(model), optimizer_state(optimizer, named(model)))
    assert equal(optimizer_state(other, named(model)).tensors, optimizer_state(optimizer, named(model)).tensors)


def test_a_strange_optimizer_and_an_empty_state() -> None:
    model = Net()
    with pytest.raises(LorakitError, match=r"what torch.RMSprop remembers"):
        optimizer_state(torch.optim.RMSprop(model.parameters()), named(model))
    with pytest.raises(AdapterMismatchError, match="that of None"):
        restore_optimizer(build_optimizer(model, SPECS[0]), named(model), State())


def test_check_same() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    check_same(tensors, {name: t.half() for name, t in tensors.items()})  # of any dtype
    with pytest.raises(AdapterMismatchError, match=r"a: expected \[2, 3\], found \[3, 2\]"):
        check_same(tensors | {"a": torch.zeros(3, 2)}, tensors)
    many = {f"x{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(AdapterMismatchError, match=r"in 20 places(.|\n)*x11: (.|\n)*… and 8 more"):
        check_same(tensors | many, tensors)
