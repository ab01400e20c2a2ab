"""Several processes, one stream: in order, bounded, and honest about a worker that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lorakit.data.pool import chunks, cores, in_order
from lorakit.errors import DataError, MemoryLimitError

linux = pytest.mark.skipif(sys.platform != "linux", reason="works alone elsewhere")


def children() -> list[psutil.Process]:
    return psutil.Process().children()


def slow_sum(part: list[int]) -> tuple[int, int]:
    time.sleep(0.002 * (part[0] % 3))
    return sum(part), os.getpid()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 101])
def test_results_come_in_order(workers: int, count: int) -> None:
    got = list(in_order(slow_sum, chunks(range(count), 5), workers))
    assert [total for total, _ in got] == [sum(range(s, min(s + 5, count))) for s in range(0, count, 5)]
    assert not children()
    if count > 100 and workers > 1 and sys.platform == "linux":
        assert len({process for _, process in got}) == workers
        assert os.getpid() not in {process for _, process in got}
    else:
        assert {process for _, process in got} <= {os.getpid()}


@linux
def test_the_stream_is_read_no_further_than_needed() -> None:
    read = 0

    def rows() -> Iterator[int]:
        nonlocal read
        for number in range(10_000):
            read = number
            yield number

    for seen, (_, _) in enumerate(in_order(slow_sum, chunks(rows(), 10), workers=2)):
        assert read <= 10 * (seen + 2 * (4 + 1) + 4)
    assert read == 9_999


@linux
def test_an_error_of_a_worker_arrives_whole() -> None:
    def work(part: list[int]) -> int:
        if 57 in part:
            raise DataError("a bad row", place="rows.jsonl:57", remedy="mend it")
        return 0

    with pytest.raises(DataError) as caught:
        list(in_order(work, chunks(range(100), 5), workers=2))
    assert caught.value.render() == DataError("a bad row", place="rows.jsonl:57", remedy="mend it").render()
    assert not children()


@linux
def test_a_worker_that_is_killed_is_named_with_its_rows() -> None:
    def work(part: list[int]) -> int:
        if 57 in part:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(MemoryLimitError, match="ended with code -9") as caught:
        list(in_order(work, chunks(range(100), 5), workers=2))
    assert caught.value.place == "rows 56 to 60"
    assert not children()


@linux
def test_leaving_early_leaves_no_process() -> None:
    results = in_order(slow_sum, chunks(range(1000), 5), workers=2)
    next(results)
    assert len(children()) == 2
    results.close()  # type: ignore[attr-defined]
    assert not children()


@linux
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import os, time\n"
        "from lorakit.data.pool import chunks, in_order\n"
        "def work(part):\n"
        "    time.sleep(0.05)\n"
        "    return os.getpid()\n"
        "for process in in_order(work, chunks(range(10**6), 5), workers=2):\n"
        "    print(process, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = {int(parent.stdout.readline()) for _ in range(6)}
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(worker) and not _is_dead(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_dead(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_cores() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
