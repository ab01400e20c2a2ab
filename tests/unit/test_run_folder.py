"""A run directory mixes nothing and loses nothing, and belongs to one run; its metrics outlive a kill."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from lorakit.checkpoint.lock import Holder
from lorakit.errors import ConflictError, StorageError
from lorakit.log import MetricsFile, read_metrics
from lorakit.training.folder import RunFolder

CONFIG = "seed: 42  # default\n"


def start(path: Path, *, overwrite: bool = False) -> RunFolder:
    """As every run does."""
    folder = RunFolder(path)
    folder.begin(CONFIG, overwrite=overwrite)
    return folder


def contents(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


class TestRunFolder:
    def test_a_new_folder_holds_the_configuration(self, tmp_path: Path) -> None:
        folder = start(tmp_path / "runs" / "a b é")
        assert contents(folder.path) == {"config.resolved.yaml": CONFIG}
        assert folder.checkpoint(20).name == "checkpoint-20"

    @pytest.fixture
    def used(self, tmp_path: Path) -> Path:
        for name in ("metrics.jsonl", "run.json", "report.html", "config.resolved.yaml", "notes.txt"):
            (tmp_path / name).write_text(name)
        for name in ("adapter", "checkpoint-5", "aside-checkpoint-7", "my-data"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        return tmp_path

    def test_the_results_of_another_run_stay(self, used: Path) -> None:
        before = contents(used)
        with pytest.raises(ConflictError, match="the results of another run are in") as caught:
            start(used)
        assert caught.value.exit_code == 8
        assert "overwrite_output_dir: true" in str(caught.value.remedy)
        assert contents(used) == before

    def test_overwriting_starts_late_and_keeps_what_no_run_wrote(self, used: Path) -> None:
        before = contents(used)
        RunFolder(used).check(overwrite=True)
        assert contents(used) == before
        start(used, overwrite=True)
        assert contents(used) == {
            "config.resolved.yaml": CONFIG,
            "notes.txt": "notes.txt",
            "my-data/file": "my-data",
        }

    def test_a_folder_of_other_files_is_free(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        start(tmp_path)
        assert contents(tmp_path) == {"config.resolved.yaml": CONFIG, "notes.txt": "mine"}

    def test_checking_leaves_nothing_behind(self, tmp_path: Path) -> None:
        RunFolder(tmp_path / "new").check(overwrite=False)
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("below", ["file", "file/run"])
    def test_a_file_in_the_way(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(StorageError) as caught:
            start(tmp_path / below, overwrite=True)
        assert str(tmp_path / below) in caught.value.message
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("name", ["a b", "é ♞", "new\nline", "-x", "$HOME;rm", "checkpoint-1"])
    def test_any_name(self, tmp_path: Path, name: str) -> None:
        folder = RunFolder(tmp_path / name)
        with folder.lock():
            folder.begin(CONFIG, overwrite=False)
        assert contents(tmp_path) == {f"{name}/config.resolved.yaml": CONFIG}

    def test_links(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "disk")
        with RunFolder(tmp_path / "run").lock():
            start(tmp_path / "run")
        assert contents(tmp_path / "disk") == {"config.resolved.yaml": CONFIG}
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        with pytest.raises(StorageError, match="cannot use output_dir"):
            start(tmp_path / "loop")
        with pytest.raises(StorageError, match="cannot use output_dir"), RunFolder(tmp_path / "loop").lock():
            pass

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="File name too long"):
            start(tmp_path / ("x" * 300))


# Takes the lock of the run folder given, says so, and does what it is told.
PROGRAM = """
import os, sys, time
from pathlib import Path
from lorakit.checkpoint.lock import only_one

with only_one(Path(sys.argv[1]) / "run.lock"):
    print("held", flush=True)
    exec(sys.argv[2])
"""


@contextmanager
def holder(run: Path, then: str = "time.sleep(60)") -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock of ``run`` when the block begins."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(run), then],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class TestLock:
    def test_it_is_gone_afterwards(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "runs" / "one")
        for _ in range(2):
            with folder.lock():
                assert json.loads((folder.path / "run.lock").read_text())["pid"] == os.getpid()
            assert contents(tmp_path) == {}

    def test_a_second_run_is_told_who_has_it(self, tmp_path: Path) -> None:
        with holder(tmp_path) as process:
            with pytest.raises(ConflictError) as caught, RunFolder(tmp_path).lock():
                raise AssertionError("two at once")
            assert caught.value.exit_code == 8
            who = f"process {process.pid} on {socket.gethostname()}, since 2"
            assert caught.value.message.startswith(f"another run is writing to {tmp_path}: {who}")
            assert "choose another output_dir" in str(caught.value.remedy)
            process.kill()
            process.wait()
            with RunFolder(tmp_path).lock():
                pass

    def test_a_second_run_of_this_process(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        with folder.lock():
            for _ in range(2):
                with pytest.raises(ConflictError, match=f"process {os.getpid()} on"), folder.lock():
                    pass

    def test_the_lock_of_a_killed_run_is_taken_over(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with holder(tmp_path) as process:
            process.kill()
            process.wait()
        (tmp_path / ".lorakit-new-01234567-checkpoint-3").mkdir()
        caplog.set_level(logging.INFO, "lorakit")
        logging.getLogger("lorakit").propagate = True
        with RunFolder(tmp_path).lock():
            assert set(contents(tmp_path)) == {"run.lock"}
        assert f"the last run here ended without a word (process {process.pid} on" in caplog.text

    def test_somebody_elses_lock_is_left_alone(self, tmp_path: Path) -> None:
        with RunFolder(tmp_path).lock():
            (tmp_path / "run.lock").unlink()  # by a user who thinks that this run is over
            (tmp_path / "run.lock").write_text("another's")
        assert contents(tmp_path) == {"run.lock": "another's"}

    def test_a_child_does_not_keep_it(self, tmp_path: Path) -> None:
        then = "os.fork() or (Path(sys.argv[1], 'child').touch(), time.sleep(60)); os.kill(os.getpid(), 9)"
        with holder(tmp_path, then) as process:
            assert process.wait() == -signal.SIGKILL
            deadline = time.monotonic() + 60
            while not (tmp_path / "child").exists():
                assert time.monotonic() < deadline
            assert [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in (p.info["cmdline"] or [])]
            with RunFolder(tmp_path).lock():
                pass

    def test_a_child_that_ends_as_its_parent_would_takes_nothing_away(self, tmp_path: Path) -> None:
        then = "child = os.fork(); child or sys.exit(); os.wait(); print(1, flush=True); time.sleep(60)"
        with holder(tmp_path, then) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            with pytest.raises(ConflictError), RunFolder(tmp_path).lock():
                pass

    def test_many_take_turns(self, tmp_path: Path) -> None:
        program = """
import sys, time
from pathlib import Path
from lorakit.errors import ConflictError
from lorakit.checkpoint.lock import only_one

run, held = Path(sys.argv[1]), 0
while held < 20:
    try:
        with only_one(run / "run.lock"):
            with (run / "log").open("a") as log:
                for word in ("in", "out"):
                    log.write(word + "\\n")
                    log.flush()
            held += 1
    except ConflictError:
        pass
"""
        racers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(3)]
        assert [racer.wait(timeout=100) for racer in racers] == [0, 0, 0]
        assert (tmp_path / "log").read_text() == "in\nout\n" * 60

    @pytest.mark.parametrize("words", ["", "{", "[]", '{"pid": 1}', '{"pid": "x"}', "\0" * 5000])
    def test_what_the_file_says_does_not_matter(self, tmp_path: Path, words: str) -> None:
        (tmp_path / "run.lock").write_text(words)
        with RunFolder(tmp_path).lock():
            pass
        assert contents(tmp_path) == {}

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with (
            pytest.raises(StorageError, match="cannot use output_dir"),
            RunFolder(tmp_path / "file" / "x").lock(),
        ):
            pass
        (tmp_path / "run.lock").mkdir()
        with pytest.raises(StorageError, match="cannot use the lock"), RunFolder(tmp_path).lock():
            pass


class TestHolder:
    def test_who_is_gone(self) -> None:
        myself = Holder.myself()
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        gone = {"pid": child.pid}, {"born": myself.born - 100}, {"boot": "another"}
        assert not myself.gone
        assert not dataclasses.replace(myself, host="elsewhere", pid=child.pid).gone
        assert [dataclasses.replace(myself, **change).gone for change in gone] == [True] * 3


class TestMetricsFile:
    def test_events_come_back(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        with MetricsFile(path) as metrics:
            metrics.write("train", step=1, loss=0.1)
            assert read_metrics(path) == [{"event": "train", "step": 1, "loss": 0.1}]  # flushed at once
            metrics.write("note", text="a\u2028b\x85c\nd é", path="\udcff")
        with MetricsFile(path) as metrics:
            metrics.write("eval", step=2)
        assert [event["event"] for event in read_metrics(path)] == ["train", "note", "eval"]
        assert read_metrics(path)[1] == {"event": "note", "text": "a\u2028b\x85c\nd é", "path": "\udcff"}

    @pytest.mark.parametrize("cut", range(1, 12))
    def test_a_torn_last_line_is_left_out(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "metrics.jsonl"
        with MetricsFile(path) as metrics:
            metrics.write("train", step=1)
            metrics.write("note", text="éé")
        path.write_bytes(path.read_bytes()[:-1][:-cut])  # in the middle of a character, too
        assert read_metrics(path) == [{"event": "train", "step": 1}]

    @pytest.fixture
    def limit(self) -> Iterator[Callable[[int | None], None]]:
        """Sets how large a file may become, as a quota does; None for as before."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if most is None else most, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def test_what_a_full_disk_refuses_is_written_later(
        self, tmp_path: Path, limit: Callable[[int | None], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        logging.getLogger("lorakit").propagate = True
        path = tmp_path / "metrics.jsonl"
        with MetricsFile(path) as metrics:
            metrics.write("train", step=1)
            limit(path.stat().st_size + 10)  # in the middle of the next line
            for step in (2, 3, 4):
                metrics.write("train", step=step)
            assert [event["step"] for event in read_metrics(path)] == [1]
            with pytest.raises(StorageError, match="File too large"):
                metrics.settle()
            limit(None)
            metrics.write("train", step=5)
            assert [event["step"] for event in read_metrics(path)] == [1, 2, 3, 4, 5]
            assert metrics.settle() == path.stat().st_size
        assert caplog.text.count("ALARM: cannot write") == 1

    def test_what_is_never_written_is_an_error(
        self, tmp_path: Path, limit: Callable[[int | None], None]
    ) -> None:
        limit(5)
        with pytest.raises(StorageError, match="cannot write"), MetricsFile(tmp_path / "a") as metrics:
            metrics.write("train", step=1)
        with pytest.raises(KeyboardInterrupt), MetricsFile(tmp_path / "a") as metrics:
            metrics.write("train", step=1)
            raise KeyboardInterrupt
        limit(None)  # before the test runner writes its next line

    def test_nowhere(self) -> None:
        with MetricsFile(None) as metrics:
            metrics.write("train", step=1)
            assert metrics.settle() == 0

    def test_a_path_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="No such file or directory"):
            MetricsFile(tmp_path / "missing" / "metrics.jsonl")
