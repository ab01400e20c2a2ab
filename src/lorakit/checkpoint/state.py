"""Everything a run needs to continue, as one value: named tensors, and numbers and texts that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorakit.errors import AdapterMismatchError

_SHOWN = 12  # differences that a message lists


@dataclass
class State:
    """Tensors and plain values by flat names: ``optimizer/layers.0.q_proj.lora_A/exp_avg``, ``step``.

    The same for any number of processes, so that a run may continue on another number of them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, part: str, other: State) -> None:
        """Take in ``other`` with ``part/`` before its names."""
        self.tensors |= {f"{part}/{name}": tensor for name, tensor in other.tensors.items()}
        self.values[part] = other.values

    def part(self, part: str) -> State:
        """What `add` took in under this name; empty if it never did."""
        start = f"{part}/"
        return State(_below(self.tensors, start), self.values.get(part, {}))


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes than ``expected``.

    Raises:
        AdapterMismatchError: listing them.
    """
    check_match(*({name: str(list(t.shape)) for name, t in each.items()} for each in (found, expected)))


def check_match(found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Refuse entries of other names or descriptions than ``expected``.

    Raises:
        AdapterMismatchError: listing them.
    """
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    if names:
        shown = [f"  {n}: expected {expected.get(n, 'none')}, found {found.get(n, 'none')}" for n in names]
        text = "\n".join(shown[:_SHOWN]) + (
            f"\n  … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        )
        raise AdapterMismatchError(
            f"the saved state does not fit this run in {len(names)} places:\n{text}",
            remedy="continue with the model and the adapter settings of the saved run; nothing was loaded",
        )


def _below(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}
