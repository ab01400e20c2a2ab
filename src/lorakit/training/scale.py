"""Loss scaling for float16: the loss is multiplied so that small gradients do not vanish (arXiv 1710.03740)."""

from __future__ import annotations

from dataclasses import dataclass

_LEAST = 2.0**-10


@dataclass
class LossScale:
    """A factor that halves when a gradient overflows and doubles after ``interval`` updates without that.

    An update that overflowed is done again with the lower factor: no batch is lost.
    """

    value: float = 2.0**16
    good: int = 0  # updates since it last changed
    interval: int = 2000
    tries: int = 0  # of the present update, that overflowed

    def grow(self) -> None:
        """An update went well."""
        self.good, self.tries = self.good + 1, 0
        if self.good == self.interval:
            self.value, self.good = 2 * self.value, 0

    def back_off(self) -> bool:
        """A gradient overflowed; whether there is a lower factor left to try.

        If there is none, the factor was not to blame, and is again what it was before the update.
        """
        self.tries, self.good = self.tries + 1, 0
        self.value /= 2
        if self.value >= _LEAST:
            return True
        self.value, self.tries = self.value * 2**self.tries, 0
        return False
