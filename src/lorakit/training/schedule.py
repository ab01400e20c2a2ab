"""Learning-rate schedules: the factor on the peak rate at a given update, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

# Each takes the share of the decay that is done, in [0, 1].
_DECAY: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "constant_with_warmup": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "polynomial": lambda done: 1.0 - done,  # power 1, the Hugging Face default
}
_POLYNOMIAL_END = 1e-7  # the rate where Hugging Face's polynomial schedule ends


def warmup_steps(steps: int, *, ratio: float, count: int | None) -> int:
    """Updates spent warming up: ``count`` if given, else ⌈ratio · steps⌉."""
    return min(count, steps) if count is not None else math.ceil(ratio * steps)


def learning_rate(step: int, *, kind: str, peak: float, steps: int, warmup: int) -> float:
    """The rate of update ``step`` (from 0) out of ``steps``: a linear rise over ``warmup``, then the decay."""
    if step < warmup and kind != "constant":
        return peak * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    end = min(_POLYNOMIAL_END, peak) if kind == "polynomial" else 0.0
    return end + (peak - end) * _DECAY[kind](min(max(done, 0.0), 1.0))
