"""The learning rate as a pure function of the step: a linear warm-up, then the course that ``kind`` names.

    rate(step) = peak · (s + (1 − s) · step / warmup)   while step < warmup, s the start factor
               = peak · course(step)                    after that

Names, settings and formulas are those of ``transformers.get_scheduler``; the start factor is that of
``torch.optim.lr_scheduler.LinearLR``. Nothing is remembered from step to step: a run that resumes needs the
step's number alone. No torch here, so that a configuration can be checked without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorakit.errors import UsageError
from lorakit.optim.settings import Setting, check, choice, count, number


@dataclass(frozen=True)
class Schedule:
    """The rates of a run.

    Attributes:
        kind: a name of `KINDS`.
        peak: the highest rate.
        steps: updates of the run; one that goes on longer keeps the rate at which the course ends.
        warmup: updates in which the rate rises; ``constant`` has no warm-up.
        start_factor: share of ``peak`` that the warm-up starts from.
        settings: of this kind, see `KINDS`.

    Raises:
        UsageError: an unknown kind, or settings that it does not have or cannot use.
    """

    kind: str
    peak: float
    steps: int
    warmup: int = 0
    start_factor: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_schedule(self.kind, self.settings, self.peak)
        if self.settings.get("num_decay_steps", 0) > self.steps - self.warmup:
            raise UsageError(
                f"lr_scheduler_kwargs: num_decay_steps is {self.settings['num_decay_steps']}, but after the "
                f"warm-up there are {self.steps - self.warmup} updates",
                remedy="lower num_decay_steps or the warm-up, or train longer",
            )

    def rate(self, step: int) -> float:
        """The rate of update ``step`` (from 0)."""
        if step < self.warmup and self.kind != "constant":
            # Its decay is mixed with a lowest rate, and so is its warm-up.
            start = self.start_factor or self.settings.get("min_lr_ratio", 0.0)
            return self.peak * _mix(step / self.warmup, start)
        return self.peak * KINDS[self.kind].course(self, step)

    def done(self, step: int) -> float:
        """The share of the course that lies behind, in [0, 1]."""
        return min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)


def check_schedule(kind: str, settings: Mapping[str, Any], peak: float) -> None:
    """Refuse a kind or settings that cannot be used with the highest rate ``peak``.

    Raises:
        UsageError: naming the key of the configuration.
    """
    if kind not in KINDS:
        raise UsageError(f"lr_scheduler_type: there is no {kind}", remedy=f"there are {', '.join(KINDS)}")
    check("lr_scheduler_kwargs", kind, settings, KINDS[kind].settings)
    if kind == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & settings.keys()) != 1:
        raise UsageError(f"lr_scheduler_kwargs: {kind} needs one of min_lr and min_lr_rate")
    if kind == "warmup_stable_decay" and "num_decay_steps" not in settings:
        raise UsageError(f"lr_scheduler_kwargs: {kind} needs num_decay_steps")
    for name in {"lr_end", "min_lr"} & settings.keys():
        if settings[name] > peak:
            raise UsageError(
                f"lr_scheduler_kwargs: {name} {settings[name]:g} is above learning_rate {peak:g}",
                remedy=f"lower {name}, or raise learning_rate",
            )


def warmup_steps(steps: int, *, ratio: float, count: int | None) -> int:
    """Updates spent warming up: ``count`` if given, else ⌈ratio · steps⌉; never more than ``steps``."""
    return min(count, steps) if count is not None else math.ceil(ratio * steps)


def _mix(share: float, floor: float) -> float:
    """From ``floor`` at 0 to 1 at 1."""
    return floor + (1.0 - floor) * share


def _wave(turns: float) -> float:
    """1 at no turn, 0 at half a turn."""
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * turns))


def _cosine(run: Schedule, step: int) -> float:
    return _wave(run.settings.get("num_cycles", 0.5) * run.done(step))


def _restarts(run: Schedule, step: int) -> float:
    done = run.done(step)
    return 0.0 if done >= 1.0 else _wave(0.5 * (run.settings.get("num_cycles", 1) * done % 1.0))


def _cosine_to_floor(run: Schedule, step: int) -> float:
    given = run.settings
    return _mix(_cosine(run, step), given["min_lr"] / run.peak if "min_lr" in given else given["min_lr_rate"])


def _polynomial(run: Schedule, step: int) -> float:
    end = min(run.settings.get("lr_end", 1e-7) / run.peak, 1.0)
    return _mix((1.0 - run.done(step)) ** run.settings.get("power", 1.0), end)


def _inverse_sqrt(run: Schedule, step: int) -> float:
    scale = run.settings.get("timescale") or run.warmup or 10_000
    return 1.0 / math.sqrt(1.0 + (step - run.warmup) / scale)


_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: _wave(0.5 * share),
    "1-sqrt": lambda share: 1.0 - math.sqrt(share),
}


def _stable_then_decay(run: Schedule, step: int) -> float:
    length = run.settings["num_decay_steps"]
    share = min(max(1.0 - (run.steps - step) / length, 0.0), 1.0)
    return _mix(_FALLS[run.settings.get("decay_type", "cosine")](share), run.settings.get("min_lr_ratio", 0.0))


class Kind(NamedTuple):
    """The course after the warm-up, as a factor on the peak, and its settings."""

    course: Callable[[Schedule, int], float]
    settings: Mapping[str, Setting] = {}


_POSITIVE = number("a number above 0", lambda v: v > 0)
_RATE = number("a number from 0", lambda v: v >= 0)
_SHARE = number("a number from 0 to 1", lambda v: 0 <= v <= 1)

KINDS: dict[str, Kind] = {
    "linear": Kind(lambda run, step: 1.0 - run.done(step)),
    "cosine": Kind(_cosine, {"num_cycles": _POSITIVE}),
    "cosine_with_restarts": Kind(_restarts, {"num_cycles": count()}),
    "cosine_with_min_lr": Kind(
        _cosine_to_floor, {"min_lr": _RATE, "min_lr_rate": _SHARE, "num_cycles": _POSITIVE}
    ),
    "polynomial": Kind(_polynomial, {"power": _POSITIVE, "lr_end": _RATE}),
    "constant": Kind(lambda run, step: 1.0),
    "constant_with_warmup": Kind(lambda run, step: 1.0),
    "inverse_sqrt": Kind(_inverse_sqrt, {"timescale": count()}),
    "warmup_stable_decay": Kind(
        _stable_then_decay,
        {"num_decay_steps": count(), "decay_type": choice(*_FALLS), "min_lr_ratio": _SHARE},
    ),
}
