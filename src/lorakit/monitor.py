"""`monitor_memory`: how much memory a block of code takes, over time and at its highest point."""

from __future__ import annotations

import math
import threading
import time
from types import TracebackType
from typing import NamedTuple, Self

from lorakit import hardware
from lorakit.errors import UsageError


class MemorySample(NamedTuple):
    """Bytes at one moment: of this process in the machine's memory, and of torch on the GPU (0 without one)."""

    seconds: float  # since the block began
    resident: int
    gpu: int


class monitor_memory:  # noqa: N801 - used like a function: with monitor_memory() as memory
    """Sample memory within a ``with`` block, from a thread that sleeps in between.

    Args:
        interval: seconds between two samples.

    Attributes:
        timeline: the samples so far, in order; the first is taken on entry, the last on leaving.

    A short peak between two samples is not missed if it is the highest of the process's life: the system keeps
    that number. Not run on a GPU yet.

    Raises:
        UsageError: an interval that is none.
    """

    def __init__(self, interval: float = 0.05) -> None:
        if not (math.isfinite(interval) and interval > 0):
            raise UsageError(f"an interval of {interval} s is none", remedy="give a positive number of seconds")
        self.timeline: list[MemorySample] = []
        self._interval = interval
        self._done = threading.Event()
        self._before = self._highest = (0, 0)

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._done.clear()
        self.timeline.clear()
        self._before = self._highest = self._peaks()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="monitor_memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        self._highest = self._peaks()

    @property
    def peak(self) -> int:
        """Most bytes of this process in the machine's memory."""
        return self._peak(0, max(sample.resident for sample in self.timeline))

    @property
    def gpu_peak(self) -> int:
        """Most bytes of torch on the GPU; 0 without one."""
        return self._peak(1, max(sample.gpu for sample in self.timeline))

    @property
    def added(self) -> int:
        """Bytes by which the peak is above what was there on entry."""
        return self.peak - self.timeline[0].resident

    def _peak(self, which: int, seen: int) -> int:
        """What was seen, or a higher mark that the process reached within the block."""
        grown = self._highest[which] > self._before[which]
        return max(seen, self._highest[which]) if grown else seen

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        gpu = hardware.memory_used() if hardware.device() == "cuda" else 0
        self.timeline.append(MemorySample(time.perf_counter() - self._start, hardware.resident(), gpu))

    @staticmethod
    def _peaks() -> tuple[int, int]:
        gpu = hardware.memory_peak() if hardware.device() == "cuda" else 0
        return hardware.resident_peak(), gpu
