"""What fits into a limit: the largest batch, length and rank, what each lever is worth, a setup that fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorakit.errors import UsageError
from lorakit.modelinfo.facts import ModelFacts
from lorakit.planning.adapters import adapted
from lorakit.planning.memory import memory
from lorakit.planning.setup import Setup

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_LONGEST, _LARGEST_BATCH, _LARGEST_RANK = 131_072, 4096, 4096
_SHORTEST = 256


@dataclass(frozen=True)
class Lever:
    """One change: what it is, the configuration's line for it, bytes with it, and bytes it saves."""

    name: str
    line: str
    total: int
    saved: int


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        limit: bytes.
        total: bytes of the setup as it is.
        largest: batch, length and rank that fit, each with all else as it is; 0 if none does.
        levers: each change alone, by what it saves.
        ladder: changes made one on top of the other until it fits; empty if it fits as it is.
        setup: the setup with these changes; None if even they are not enough.
    """

    limit: int
    total: int
    largest: dict[str, int]
    levers: tuple[Lever, ...]
    ladder: tuple[Lever, ...]
    setup: Setup | None

    @property
    def fits(self) -> bool:
        """As it is."""
        return self.total <= self.limit


def parse_size(text: str) -> int:
    """``16GB`` (10⁹ bytes), ``16GiB`` (2³⁰), ``512 MB`` … in bytes.

    Raises:
        UsageError: it is none, or zero.
    """
    found = _SIZE.fullmatch(text.strip())
    if found:
        unit = 1024 if found[3] else 1000
        size = int(float(found[1]) * unit ** _POWERS[found[2].upper()])
        if size > 0:
            return size
    raise UsageError(f"{text!r:.60} is no size of memory", remedy="write it as 16GB or 16GiB")


def fit(facts: ModelFacts, setup: Setup, limit: int) -> Fit:
    """What of ``setup`` fits into ``limit`` bytes on each device."""
    total = memory(facts, setup).total
    longest = facts.context or _LONGEST
    largest_rank = min([_LARGEST_RANK, *(min(each.module.matrix) for each in adapted(facts, setup))])
    tries: dict[str, tuple[int, Callable[[int], Setup]]] = {
        "batch": (_LARGEST_BATCH, lambda n: replace(setup, batch=n)),
        "length": (longest, lambda n: replace(setup, length=n, row=min(setup.row, n) if setup.row else None)),
        "rank": (largest_rank, lambda n: replace(setup, rank=n)),
    }
    largest = {
        name: _largest(most, lambda n, change=change: memory(facts, change(n)).total <= limit)  # type: ignore[misc]
        for name, (most, change) in tries.items()
        if name != "rank" or setup.method != "full"
    }
    levers = sorted(_levers(facts, setup, total), key=lambda lever: -lever.saved)
    ladder, fitting = _ladder(facts, setup, limit) if total > limit else ((), setup)
    return Fit(limit, total, largest, tuple(levers), ladder, fitting)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that fits, 0 if 1 does not; memory only grows with it."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _changes(setup: Setup) -> list[tuple[str, str, Setup]]:
    """What can be changed to save memory, in the order in which it costs least: name, line, changed setup."""
    changes = []
    if not setup.checkpointing:
        text = "recompute activations (about a third more time)"
        changes.append((text, "gradient_checkpointing: true", replace(setup, checkpointing=True)))
    if setup.batch > 1:
        passes = setup.accumulation * setup.batch
        line = f"per_device_train_batch_size: 1, gradient_accumulation_steps: {passes}"
        changes.append(("one sequence at a time", line, replace(setup, batch=1, accumulation=passes)))
    if not setup.trains_base:
        for bits in (8, 4):
            if setup.bits > bits:
                line = f"quantization_bit: {bits}"
                changes.append((f"a base in {bits} bits (slower)", line, replace(setup, bits=bits)))
    if not setup.optimizer.endswith("8bit"):
        eight = replace(setup, optimizer="adamw_8bit")
        changes.append(("moments in 8 bits", "optim: adamw_8bit", eight))
    if setup.length >= 2 * _SHORTEST:
        half = setup.length // 2
        shorter = replace(setup, length=half, row=min(setup.row, half) if setup.row else None)
        changes.append(("half the length", f"cutoff_len: {half}", shorter))
    if setup.rank > 1 and setup.method != "full":
        half = setup.rank // 2
        text = "half the rank (a weak lever: adapters are small)"
        changes.append((text, f"lora_rank: {half}", replace(setup, rank=half)))
    return changes


def _levers(facts: ModelFacts, setup: Setup, total: int) -> list[Lever]:
    levers = []
    for name, line, changed in _changes(setup):
        after = memory(facts, changed).total
        levers.append(Lever(name, line, after, total - after))
    return levers


def _ladder(facts: ModelFacts, setup: Setup, limit: int) -> tuple[tuple[Lever, ...], Setup | None]:
    """Changes one after the other, first those that leave the result as it is, until it fits."""
    steps: list[Lever] = []
    now, total = setup, memory(facts, setup).total
    while total > limit:
        helpful = [
            (name, line, changed, after)
            for name, line, changed in _changes(now)
            if (after := memory(facts, changed).total) < total and not line.startswith(("lora_rank", "optim"))
        ]
        if not helpful:
            return tuple(steps), None
        name, line, now, after = helpful[0]
        steps.append(Lever(name, line, after, total - after))
        total = after
    return tuple(steps), now
