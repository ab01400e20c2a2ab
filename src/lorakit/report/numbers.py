"""Numbers as people read them: with a dash for what is missing, as durations, smoothed, and compared."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import NamedTuple

from lorakit.report.record import EvalPoint

DASH = "\N{EN DASH}"  # stands where a value is missing
_MEASURES = (  # (name, value, format, +1 if more is better)
    ("Exact match", attrgetter("exact_match"), ".1%", 1),
    ("Field F1", attrgetter("field_f1"), ".3f", 1),
    ("Loss", attrgetter("loss"), ".3f", -1),
    ("Perplexity", attrgetter("perplexity"), ",.2f", -1),
)


class Measure(NamedTuple):
    """One measured quantity before and after training, in words."""

    name: str
    before: str
    after: str
    change: str
    better: bool


def number(value: float | None, spec: str = ",") -> str:
    """A number as text; a dash where it is missing or not finite."""
    return DASH if value is None or not math.isfinite(value) else format(value, spec)


def duration(seconds: float | None) -> str:
    """Seconds as ``42s``, ``2m10s`` or ``3h05m``; a dash where unknown."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def blend(average: float | None, value: float) -> float:
    """The exponential moving average after one more value; one that is not finite leaves it as it is."""
    if average is None or not math.isfinite(average):
        return value
    return 0.8 * average + 0.2 * value if math.isfinite(value) else average


def dimensions(shape: tuple[int, ...]) -> str:
    """A shape as ``576 x 1536``, with the sign of multiplication."""
    return " \N{MULTIPLICATION SIGN} ".join(map(str, shape))


def measures(before: EvalPoint | None, after: EvalPoint | None) -> list[Measure]:
    """What was measured before or after training; quantities that were never measured are left out."""
    found = []
    for name, value, spec, direction in _MEASURES:
        old = value(before) if before else None
        new = value(after) if after else None
        if old is None and new is None:
            continue
        change = math.nan if old is None or new is None else new - old
        words = f"{100 * change:+.1f} points" if spec.endswith("%") else f"{change:+{spec}}"
        found.append(
            Measure(
                name=name,
                before=number(old, spec),
                after=number(new, spec),
                change=words if math.isfinite(change) else DASH,
                better=change * direction > 0,
            )
        )
    return found
