"""What of a run changes from update to update besides tensors, and the random states."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.checkpoint.state import State
from lorakit.training.scale import LossScale


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: updates done (or passed over); with the seed this fixes which rows come next.
        splits: into how many parts each micro-batch is divided since memory ran short.
        rate_factor: what the schedule's rate is multiplied with since a roll-back.
        refused: updates that were not finite, so far.
        tokens: trained on, all ranks.
        seconds: of training, over all starts of the run.
        losses, grad_norm, new_tokens: of the updates since the last log line.
        since: when that was, in `seconds`.
        evaluated: the step of the last evaluation.
        best, best_step, waited: the best value of the watched metric, when it was measured, evaluations since.
        ended: why the run is over before its last step, if it is.
        scale: of float16's loss.
    """

    step: int = 0
    splits: int = 1
    rate_factor: float = 1.0
    refused: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0
    new_tokens: int = 0
    since: float = 0.0
    evaluated: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    ended: str | None = None
    scale: LossScale | None = None

    def see(self, loss: float, grad_norm: float, tokens: int) -> None:
        """Count one update."""
        self.losses.append(loss)
        self.grad_norm = grad_norm
        self.new_tokens += tokens
        self.tokens += tokens

    def log_entry(self, steps: int, per_epoch: int) -> dict[str, Any]:
        """Means over the updates since the last entry, which ends here."""
        entry = {
            "step": self.step,
            "steps": steps,
            "epoch": round(self.step / per_epoch, 4),
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": self.new_tokens / max(self.seconds - self.since, 1e-9),
            "seconds": self.seconds,
        }
        self.losses, self.new_tokens, self.since = [], 0, self.seconds
        return entry

    def to_json(self) -> dict[str, Any]:
        """As values that JSON keeps exactly."""
        return asdict(self)

    def load(self, values: Mapping[str, Any]) -> None:
        """Become what `to_json` returned."""
        for each in fields(self):
            setattr(self, each.name, values[each.name])
        self.scale = LossScale(**values["scale"]) if values["scale"] else None


def seed_everything(seed: int) -> None:
    """Start every generator that training may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_state() -> State:
    """Every generator that training may draw from: torch's (each device's), numpy's and Python's."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "cpu": torch.get_rng_state(),
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    values = {"python": [version, gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}
    return State(tensors, values)


def restore_random_state(state: State) -> None:
    """Put every generator back; those of devices that are not here are left out."""
    tensors, values = state.tensors, state.values
    torch.set_rng_state(tensors["cpu"])
    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    name, *rest = values["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)


def allocator_state(values: Mapping[str, Any]) -> State:
    """AdaLoRA's allocation as named tensors and plain values."""
    state = State(values={"settled": values["settled"]})
    for part in ("sensitivity", "uncertainty", "kept"):
        state.add(part, State(dict(values[part])))
    return state


def allocator_values(state: State) -> dict[str, Any]:
    """What `RankAllocator.load_state_dict` takes, undoing `allocator_state`."""
    parts: dict[str, dict[str, Tensor]] = {
        part: state.part(part).tensors for part in ("sensitivity", "uncertainty", "kept")
    }
    return {**parts, "settled": state.values["settled"]}
