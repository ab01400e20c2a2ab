"""``lorakit --help`` answers in less time than a person notices."""

from __future__ import annotations

import subprocess
import sys
import time

BUDGET_SECONDS = 0.3
RUNS = 5


def test_help_is_fast() -> None:
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "lorakit", "--help"], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
        assert "train" in result.stdout
    # The fastest run: what the program costs, without what else the machine was doing.
    assert min(seconds) < BUDGET_SECONDS
