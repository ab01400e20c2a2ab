"""Whole training runs, killed or refused by the disk, and taken up again: as if nothing had happened.

One place a fault, spread over the run; benchmarks/kill_matrix.py takes all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import faulty_disk
import pytest
import training_matrix


@pytest.mark.skipif(
    faulty_disk.compiler() is None or sys.platform != "linux", reason="the faulty disk is built by a C compiler"
)
def test_runs_survive() -> None:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        process = subprocess.run(
            [sys.executable, Path(__file__).with_name("training_matrix.py"), folder, "1000"],
            env=training_matrix.environment(Path(folder)), capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["counts"] == dict.fromkeys(training_matrix.TRIED, 1)
