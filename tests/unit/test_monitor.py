"""`monitor_memory`: a block's memory over time and at its highest point."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from lorakit import hardware, monitor_memory
from lorakit.errors import UsageError

SIZE = 200_000_000


def test_what_a_block_takes_is_seen() -> None:
    with monitor_memory(interval=0.01) as memory:
        block = np.ones(SIZE, dtype=np.uint8)
        time.sleep(0.1)
        del block
    assert memory.added == pytest.approx(SIZE, rel=0.2)
    assert memory.peak <= hardware.resident_peak() + 1_000_000  # the system counts pages a little late
    assert memory.timeline[-1].resident < memory.peak - SIZE / 2  # it was given back
    assert memory.gpu_peak == 0 or hardware.device() == "cuda"


def test_a_new_highest_point_between_two_samples_is_not_missed() -> None:
    above = hardware.resident_peak() - hardware.resident() + SIZE
    with monitor_memory(interval=60.0) as memory:
        block = np.ones(above, dtype=np.uint8)
        del block
    assert len(memory.timeline) == 2
    assert memory.added == pytest.approx(above, rel=0.2)


def test_the_timeline_is_in_order_and_ends_with_the_block() -> None:
    with monitor_memory(interval=0.005) as memory:
        time.sleep(0.05)
        during = len(memory.timeline)
    assert during >= 2
    assert all(before.seconds < after.seconds for before, after in pairwise(memory.timeline))
    assert all(sample.resident > 0 for sample in memory.timeline)
    assert "monitor_memory" not in {thread.name for thread in threading.enumerate()}
    with memory:  # once more, from the start
        pass
    assert len(memory.timeline) >= 2 and memory.timeline[0].seconds < 0.05


def test_an_error_in_the_block_is_not_kept_back() -> None:
    with pytest.raises(KeyError), monitor_memory():
        raise KeyError
    assert "monitor_memory" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("interval", [0.0, -1.0, float("nan"), float("inf")])
def test_no_interval(interval: float) -> None:
    with pytest.raises(UsageError, match="an interval of"):
        monitor_memory(interval)
