"""What a loss curve tells while it is drawn: a loss that does not move, and one that runs away."""

from __future__ import annotations

from collections.abc import Iterator

_FLAT_AFTER = 20  # updates
_FLAT_WITHIN = 1e-4  # relative
_SMOOTHING = 0.9
_AWAY = 2.0  # times the lowest smoothed loss
_AWAY_FROM = 0.5  # nats: below this, ratios of small losses mean nothing


class Watch:
    """Sees each loss of this start of the run; warns of each symptom once."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._mean: float | None = None
        self._lowest = float("inf")
        self._warned = False

    def see(self, step: int, loss: float) -> Iterator[str]:
        """Warnings about the update ``step``."""
        if len(self._first) < _FLAT_AFTER:
            self._first.append(loss)
            if len(self._first) == _FLAT_AFTER and self._flat():
                yield (
                    f"warning: the loss has not moved in the first {_FLAT_AFTER} updates ({loss:.4g}): "
                    "is the learning rate tiny, or does the data carry no loss? see `lorakit preview`"
                )
        self._mean = loss if self._mean is None else _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        self._lowest = min(self._lowest, self._mean)
        if not self._warned and self._mean > max(_AWAY * self._lowest, _AWAY_FROM):
            self._warned = True
            yield (
                f"warning: the loss is running away: {self._mean:.4g} on average at update {step}, "
                f"{self._lowest:.4g} at its lowest; lower learning_rate"
            )

    def _flat(self) -> bool:
        return max(self._first) - min(self._first) <= _FLAT_WITHIN * max(map(abs, self._first))
