"""Trackers: what arrives at the real ones, what a resumed run does, and that none of them can stop a run."""

from __future__ import annotations

import importlib
import json
import logging
import math
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import UsageError
from lorakit.report import trackers
from lorakit.report.trackers import TrackedRun, check_trackers, open_trackers

ENTRY = {
    "step": 3,
    "steps": 9,
    "epoch": 0.5,
    "loss": 2.25,
    "learning_rate": 1e-4,
    "memory_gb": 1.5,
    "note": "x",
}
NAMES = {"train/epoch", "train/loss", "train/learning_rate", "train/memory_gb"}


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun(tmp_path, "first", {"lora_rank": 8, "dataset": ["a.jsonl"], "note": None})


def send(names: list[str], run: TrackedRun, *losses: tuple[int, float]) -> None:
    with open_trackers(names, run) as opened:
        for step, loss in losses:
            opened.log("train", ENTRY | {"step": step, "loss": loss})
        opened.log("eval", {"step": losses[-1][0], "loss": 7.0, "rows": 4})


class TestNames:
    def test_none_costs_nothing(self, run: TrackedRun) -> None:
        threads = threading.active_count()
        with open_trackers([], run) as opened:
            opened.log("train", ENTRY)
            assert threading.active_count() == threads
        assert not list(run.folder.iterdir())

    def test_nothing_is_imported_before_it_is_used(self) -> None:
        code = (
            "import sys; from lorakit.report.trackers import check_trackers\n"
            "check_trackers(['tensorboard'])\n"
            "print(sorted({'tensorboard', 'wandb', 'mlflow', 'torch'} & set(sys.modules)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == "[]\n"

    def test_unknown(self) -> None:
        with pytest.raises(
            UsageError, match=r"there is no tracker 'comet'\nknown are tensorboard, wandb, mlflow"
        ):
            check_trackers(["tensorboard", "comet"])

    def test_missing_packages_are_named_before_anything_starts(
        self, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.setattr(sys, "path_importer_cache", {})
        for name in ("wandb", "mlflow"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        threads = threading.active_count()
        message = r"wandb, mlflow is not installed\npip install wandb mlflow, or"
        with pytest.raises(UsageError, match=message), open_trackers(["wandb", "mlflow"], run):
            pass
        assert threading.active_count() == threads


class TestTensorBoard:
    def scalars(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    def test_gets_the_numbers(self, run: TrackedRun) -> None:
        send(["tensorboard"], run, (1, 2.5), (3, 2.25))
        found = self.scalars(run.folder / "tensorboard")
        assert found.keys() == NAMES | {"eval/loss", "eval/rows"}
        assert found["train/loss"] == [(1, 2.5), (3, 2.25)]
        assert found["eval/loss"] == [(3, 7.0)]

    def test_resumed_hides_what_lies_beyond_the_checkpoint(self, run: TrackedRun) -> None:
        run = replace(run, logging_dir=run.folder / "all")
        send(["tensorboard"], run, (1, 5.0), (2, 4.0), (3, 3.0))
        time.sleep(1.1)  # TensorBoard orders files by their second
        send(["tensorboard"], replace(run, done=2), (3, 3.5), (4, 2.5))
        found = self.scalars(run.folder / "all" / "first")
        assert found["train/loss"] == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.5)]
        time.sleep(1.1)
        send(["tensorboard"], run, (1, 6.0))  # another run in the place of the first
        assert self.scalars(run.folder / "all" / "first")["train/loss"] == [(1, 6.0)]


class TestWandb:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        yield
        self.end()

    def end(self) -> None:
        """What the end of a process does: the last records reach the disk."""
        importlib.import_module("wandb").teardown()

    def history(self, folder: Path) -> list[list[dict[str, Any]]]:
        """What each start of a run recorded, in order, read from its log file."""
        from wandb.proto.wandb_internal_pb2 import Record

        runs = []
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
            data, place, rows = path.read_bytes(), 7, []
            while place + 7 <= len(data):  # checksum, size, kind (1: whole); small files have one block only
                size, kind = struct.unpack_from("<HB", data, place + 4)
                assert kind == 1
                record = Record.FromString(data[place + 7 : place + 7 + size])
                items = record.history.item
                if items:
                    rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
                place += 7 + size
            runs.append(rows)
        return runs

    def test_gets_the_numbers_and_resumes_under_its_id(self, run: TrackedRun) -> None:
        send(["wandb"], run, (1, 2.5), (3, 2.25))
        first = run.recall("wandb")
        self.end()
        send(["wandb"], replace(run, done=3), (4, 2.0))
        self.end()
        assert run.recall("wandb") == first
        one, two = self.history(run.folder)
        assert [(row["_step"], row["train/loss"]) for row in one] == [(1, 2.5), (3, 2.25)]
        assert one[-1]["eval/loss"] == 7.0
        assert one[0].keys() >= NAMES
        assert [(row["_step"], row["train/loss"]) for row in two] == [(4, 2.0)]
        send(["wandb"], run, (1, 2.5))
        assert run.recall("wandb") != first


class TestMlflow:
    @pytest.fixture(autouse=True)
    def store(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield

    def test_gets_the_numbers_and_resumes_where_it_was(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        def points(name: str) -> list[tuple[int, float]]:
            history = client.get_metric_history(run.recall("mlflow"), name)
            return [(point.step, point.value) for point in history]

        client = MlflowClient()
        send(["mlflow"], run, (1, 2.5), (3, 2.25))
        found = client.get_run(run.recall("mlflow"))
        assert found.info.run_name == "first"
        assert found.info.status == "FINISHED"
        assert found.data.params == {"lora_rank": "8", "dataset": "['a.jsonl']", "note": "None"}
        assert found.data.metrics.keys() == NAMES | {"eval/loss", "eval/rows"}
        send(["mlflow"], replace(run, done=2), (3, 2.25), (4, 2.0))
        assert points("train/loss") == [(1, 2.5), (3, 2.25), (4, 2.0)]
        assert points("eval/loss") == [(3, 7.0), (4, 7.0)]
        with pytest.raises(ZeroDivisionError), open_trackers(["mlflow"], replace(run, done=4)) as opened:
            opened.log("train", ENTRY | {"step": 5})
            raise ZeroDivisionError
        assert client.get_run(run.recall("mlflow")).info.status == "FAILED"


class Ledger:
    """A tracker that writes down what it gets, and fails or hangs when it is told to."""

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.steps: list[int] = []
        self.closed: list[str] = []
        self.trouble: Exception | None = None
        self.hangs = threading.Event()
        self.hangs.set()

    def __call__(self, run: TrackedRun) -> Ledger:
        self.opened.append(run.done)
        if self.trouble:
            raise self.trouble
        return self

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.hangs.wait()
        if self.trouble:
            raise self.trouble
        self.steps.append(step)

    def close(self, status: str) -> None:
        self.closed.append(status)


class TestTrouble:
    @pytest.fixture
    def ledger(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
        ledger = Ledger()
        monkeypatch.setitem(trackers._OPENERS, "tensorboard", ledger)
        monkeypatch.setattr(trackers, "_PATIENCE", 0.3)
        yield ledger
        ledger.hangs.set()

    def settle(self, feed: Any) -> None:
        while feed._entries.qsize():
            time.sleep(0.01)
        time.sleep(0.05)

    @pytest.mark.parametrize(
        "trouble", [OSError("no space left"), KeyError("x"), Exception("Mlflow\nexception")]
    )
    def test_costs_one_warning_and_no_run(
        self, trouble: Exception, ledger: Ledger, run: TrackedRun, caplog: pytest.LogCaptureFixture
    ) -> None:
        ledger.trouble = trouble
        with caplog.at_level(logging.WARNING, "lorakit"), open_trackers(["tensorboard"], run) as opened:
            for step in range(50):
                opened.log("train", ENTRY | {"step": step})
        assert len(caplog.records) == 1
        told = " ".join(f"{type(trouble).__name__}: {trouble}".split())
        assert caplog.records[0].getMessage() == (
            f"warning: tensorboard fails, metrics.jsonl has what it misses: {told}"
        )
        assert ledger.opened == [0]  # the next attempt would be a minute later

    def test_is_over_when_the_tracker_is_back(
        self, ledger: Ledger, run: TrackedRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_trackers(["tensorboard"], run) as opened:
            opened.log("train", ENTRY | {"step": 1})
            (feed,) = opened._feeds
            self.settle(feed)
            ledger.trouble = OSError("down")
            opened.log("train", ENTRY | {"step": 2})
            self.settle(feed)
            ledger.trouble = None
            opened.log("train", ENTRY | {"step": 3})
            self.settle(feed)
            monkeypatch.setattr(trackers, "_PAUSE", 0.0)
            opened.log("train", ENTRY | {"step": 4})
        assert ledger.steps == [1, 4]
        assert ledger.opened == [0, 1]  # knows where it goes on
        assert ledger.closed == ["finished"]

    def test_hanging_neither_blocks_nor_fills_memory(
        self, ledger: Ledger, run: TrackedRun, caplog: pytest.LogCaptureFixture
    ) -> None:
        ledger.hangs.clear()
        start = time.monotonic()
        with caplog.at_level(logging.WARNING, "lorakit"), open_trackers(["tensorboard"], run) as opened:
            for step in range(3000):
                opened.log("train", ENTRY | {"step": step})
            assert opened._feeds[0]._entries.qsize() <= trackers._WAITING
        assert time.monotonic() - start < 5
        assert [record.getMessage() for record in caplog.records] == [
            "warning: tensorboard fails, metrics.jsonl has what it misses: it is too slow",
            "warning: tensorboard has not finished; what it lacks is in metrics.jsonl",
        ]

    def test_a_run_that_fails_is_marked_so(self, ledger: Ledger, run: TrackedRun) -> None:
        with pytest.raises(ZeroDivisionError), open_trackers(["tensorboard"], run) as opened:
            opened.log("train", ENTRY | {"loss": math.nan})
            raise ZeroDivisionError
        assert ledger.steps == [3]
        assert ledger.closed == ["failed"]

    def test_a_folder_that_cannot_be_written(self, run: TrackedRun, caplog: pytest.LogCaptureFixture) -> None:
        (run.folder / "tensorboard").write_text("a file")
        with caplog.at_level(logging.WARNING, "lorakit"):
            send(["tensorboard"], run, (1, 2.5))
        assert "warning: tensorboard fails, metrics.jsonl has what it misses: " in caplog.text
