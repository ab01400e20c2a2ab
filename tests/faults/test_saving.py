"""Kills, power cuts and failing disks at every change that saving makes: nothing is lost or half there.

The faults are real: a library between the program and the kernel returns the errors and sends the signals, see
faulty_disk.c. The long form, with every fault at every change, is benchmarks/kill_matrix.py.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faulty_disk
import pytest
import saving_matrix
import torch

from lorakit.checkpoint.snapshot import newest_good, read_snapshot, write_snapshot
from lorakit.checkpoint.state import State
from lorakit.errors import StorageError

EVERY = 20  # of the changes that are not SIGKILL's
HERE = Path(__file__).parent

needs_compiler = pytest.mark.skipif(
    faulty_disk.compiler() is None or sys.platform != "linux", reason="the faulty disk is built by a C compiler"
)


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A folder in memory, if there is one: every fsync counts, but need not take its time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def disk(work: Path) -> dict[str, str]:
    """The environment of programs whose disk can fail."""
    return faulty_disk.environment(work)


@needs_compiler
class TestMatrix:
    @pytest.fixture(scope="class")
    def result(self, work: Path, disk: dict[str, str]) -> dict[str, Any]:
        process = subprocess.run(
            [sys.executable, HERE / "saving_matrix.py", work / "matrix", str(EVERY)],
            env=disk, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        found: dict[str, Any] = json.loads(process.stdout)
        return found

    def test_nothing_is_lost(self, result: dict[str, Any]) -> None:
        assert result["wrong"] == []

    def test_enough_was_tried(self, result: dict[str, Any]) -> None:
        counts: dict[str, dict[str, int]] = result["counts"]
        assert counts.keys() == saving_matrix.SCENARIOS.keys()
        assert sum(count["SIGKILL"] for count in counts.values()) >= 220
        tried = {kind for count in counts.values() for kind in count}
        assert tried == saving_matrix.KILLS.keys() | saving_matrix.ERRORS.keys()

    def test_careless_writers_are_caught(self, result: dict[str, Any]) -> None:
        assert all(result["caught"].values()), result["caught"]


# Takes the lock of a folder where the file system has no locks, and says how that went.
LOCK = """
import errno, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import faulty_disk
from lorakit.errors import ConflictError
from lorakit.checkpoint.lock import only_one

faulty_disk.arm(Path(sys.argv[2]), faulty_disk.Fault("fail on", faulty_disk.LOCK, 1, errno.ENOLCK))
try:
    with only_one(Path(sys.argv[2]) / "run.lock"):
        print("held", flush=True)
        sys.stdin.readline()
except ConflictError as error:
    print(error)
"""


@needs_compiler
class TestWithoutLocks:
    """The pid file decides where `flock` is not there."""

    @pytest.fixture
    def start(self, disk: dict[str, str], tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
        started = []

        def start() -> subprocess.Popen[str]:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                [sys.executable, "-c", LOCK, str(HERE), str(tmp_path)],
                env=disk, stdin=pipe, stdout=pipe, text=True,
            )  # fmt: skip
            started.append(process)
            return process

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def test_one_at_a_time(self, start: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
        first = start()
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        told = start().communicate()[0]
        assert told.startswith(f"another run is writing to {tmp_path}: process {first.pid} on ")
        assert f"if you know that it is over, remove {tmp_path}/run.lock" in told
        first.communicate("end\n")
        assert start().communicate("end\n")[0] == "held\n"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("change", [{}, {"boot": "before the last restart"}])
    def test_of_a_run_that_was_killed(
        self, start: Callable[[], subprocess.Popen[str]], tmp_path: Path, change: dict[str, str]
    ) -> None:
        first = start()
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        lock = tmp_path / "run.lock"
        lock.write_text(json.dumps({**json.loads(lock.read_text()), **change}))
        if not change:
            first.kill()
            first.wait()
        assert start().communicate("end\n")[0] == "held\n"


@pytest.mark.parametrize("most", [0, 100, 5_000, 40_000])
def test_no_file_may_grow(tmp_path: Path, most: int) -> None:
    """As a quota does; without the library."""
    before = saving_matrix.state(1)
    write_snapshot(tmp_path / "checkpoint-1", before, lambda stage: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        for target in ("checkpoint-1", "checkpoint-2"):
            with pytest.raises(StorageError, match=r"cannot write .*File too large") as caught:
                write_snapshot(tmp_path / target, State({"model/a": torch.zeros(100, 100)}), lambda stage: None)
            assert caught.value.exit_code == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    found, damage = newest_good(tmp_path)
    assert (found, damage) == (tmp_path / "checkpoint-1", [])
    assert torch.equal(
        read_snapshot(tmp_path / "checkpoint-1").tensors["model/layer.lora_A"],
        before.tensors["model/layer.lora_A"],
    )
