"""A loss curve in numbers. Pure functions of the logged points; no point needs to be a single update.

A schedule that sinks to zero makes every curve flat in the end. Whether a run had finished learning is judged
in the time of its own schedule, therefore: t = Σ rate up to a point / Σ rate of all, from 0 to 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

_WINDOW = 3  # points on either side that a spike is compared with


@dataclass(frozen=True)
class Curve:
    """The finite points of a training: update, mean loss, learning rate. At least four of them."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    rates: tuple[float, ...]

    @property
    def start(self) -> float:
        """Mean loss of the first tenth."""
        return statistics.fmean(self.losses[: self._tenth])

    @property
    def end(self) -> float:
        """Mean loss of the last tenth."""
        return statistics.fmean(self.losses[-self._tenth :])

    @property
    def lowest(self) -> float:
        """The lowest mean of three neighbours."""
        return min(self.smooth)

    @property
    def drop(self) -> float:
        """Share of the loss that was learned away: 0.9 from 2.0 to 0.2; negative if it rose."""
        return 1 - self.end / self.start if self.start > 0 else 0.0

    @property
    def smooth(self) -> tuple[float, ...]:
        """Means of three neighbours."""
        return tuple(statistics.fmean(self.losses[i : i + 3]) for i in range(len(self.losses) - 2))

    @property
    def noise(self) -> float:
        """Standard deviation of a point around its curve, from second differences, unmoved by single points."""
        trios = zip(self.losses, self.losses[1:], self.losses[2:], strict=False)
        bends = [abs(a - 2 * b + c) for a, b, c in trios]
        return 1.4826 * statistics.median(bends) / math.sqrt(6)

    @property
    def trend(self) -> tuple[float, float]:
        """Change of the loss over the run by a straight line, and the standard error of that."""
        n, x, y = len(self.losses), self.steps, self.losses
        middle, mean = statistics.fmean(x), statistics.fmean(y)
        spread = sum((step - middle) ** 2 for step in x)
        slope = sum((step - middle) * (loss - mean) for step, loss in zip(x, y, strict=True)) / spread
        rest = sum((loss - mean - slope * (s - middle)) ** 2 for s, loss in zip(x, y, strict=True))
        error = math.sqrt(rest / max(n - 2, 1) / spread)
        length = x[-1] - x[0]
        return slope * length, error * length

    @property
    def unfinished(self) -> float:
        """Fall of the loss in the second half of the schedule's time over that in the first.

        1 for a loss that falls in proportion to the rate, 0 for one that has come to rest.
        """
        first = self._between(lambda t: t <= 0.1)
        half = self._between(lambda t: 0.4 <= t <= 0.6)
        last = self._between(lambda t: t >= 0.9)
        early, late = first - half, half - last
        return late / early if early > 0 else 0.0

    def _between(self, wanted: Callable[[float], bool]) -> float:
        """Mean loss of the points whose time is wanted; of the nearest to it if there is none."""
        gaps = [b - a for a, b in zip((0, *self.steps), self.steps, strict=False)]
        times = list(accumulate(rate * gap for rate, gap in zip(self.rates, gaps, strict=True)))
        total = times[-1]
        if total <= 0:
            times, total = list(map(float, self.steps)), float(self.steps[-1])
        chosen = [loss for t, loss in zip(times, self.losses, strict=True) if wanted(t / total)]
        if chosen:
            return statistics.fmean(chosen)
        goal = 0.0 if wanted(0.0) else 1.0 if wanted(1.0) else 0.5
        return min(zip(times, self.losses, strict=True), key=lambda pair: abs(pair[0] / total - goal))[1]

    def spikes(self) -> list[int]:
        """Updates whose loss stands far above that of the points around, and falls back."""
        found = []
        for i in range(1, len(self.losses) - 1):
            before, after = self.losses[max(0, i - _WINDOW) : i], self.losses[i + 1 : i + 1 + _WINDOW]
            level = max(statistics.median(before), statistics.median(after))  # a steep fall is no spike
            if self.losses[i] - level > max(0.5 * level, 6 * self.noise, 0.2):
                found.append(self.steps[i])
        return found

    @property
    def roughness(self) -> float:
        """Noise of the second half over its mean loss."""
        losses = self.losses[len(self.losses) // 2 :]
        return self.noise / statistics.fmean(losses)

    @property
    def _tenth(self) -> int:
        return max(1, round(len(self.losses) / 10))


def curve_of(
    steps: Sequence[int], losses: Sequence[float | None], rates: Sequence[float | None]
) -> Curve | None:
    """The curve of the finite points; None if they are fewer than four."""
    points = [
        (step, loss, rate or 0.0)
        for step, loss, rate in zip(steps, losses, rates, strict=True)
        if loss is not None and math.isfinite(loss)
    ]
    return Curve(*zip(*points, strict=True)) if len(points) >= 4 else None
