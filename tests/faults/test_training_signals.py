"""Signals at any time: the state is saved, the exit code tells, and going on loses nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from training_runs import at_pass, events, same, send, steps, write_rows

from lorakit.checkpoint.snapshot import read_snapshot
from lorakit.errors import (
    Interrupted,
)
from lorakit.training.recipe import train

pytestmark = pytest.mark.usefixtures("one_thread")


class TestSignals:
    def stopped(self, settings: dict[str, Any], signum: signal.Signals = signal.SIGTERM) -> Interrupted:
        with pytest.raises(Interrupted) as caught:
            train(settings)
        assert caught.value.exit_code == 128 + signum
        return caught.value

    def check_same_end(self, settings: dict[str, Any], run: Path, tmp_path: Path) -> None:
        """Going on ends where the uninterrupted run does."""
        train(settings, resume=True)
        train(settings | {"output_dir": str(tmp_path / "whole")})
        ends = [read_snapshot(folder / "checkpoint-6") for folder in (run, tmp_path / "whole")]
        assert same(ends[0].tensors, ends[1].tensors)
        measured = [
            [(e["step"], e["loss"]) for kind in ("train", "eval") for e in events(folder, kind)]
            for folder in (run, tmp_path / "whole")
        ]
        assert measured[0] == measured[1]

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_before_the_first_update(
        self, settings: dict[str, Any], run: Path, tmp_path: Path, signum: signal.Signals
    ) -> None:
        with at_pass(2, send(signum)):
            error = self.stopped(settings, signum)
        assert "update 0 is saved" in error.message
        self.check_same_end(settings, run, tmp_path)

    def test_in_an_evaluation(self, settings: dict[str, Any], run: Path, data: Path, tmp_path: Path) -> None:
        more = settings | {"eval_dataset": str(data), "eval_steps": 2, "per_device_eval_batch_size": 4}
        with at_pass(4, send(signal.SIGTERM), training=False):  # the first of the second evaluation
            error = self.stopped(more)
        assert "update 4 is saved" in error.message
        assert [event["step"] for event in events(run, "eval")] == [2]
        self.check_same_end(more, run, tmp_path)

    def test_in_generation(self, settings: dict[str, Any], run: Path, data: Path, tmp_path: Path) -> None:
        more = settings | {
            "eval_dataset": str(data), "predict_with_generate": True, "max_new_tokens": 3, "eval_steps": 4,
            "metric_for_best_model": "exact_match", "per_device_eval_batch_size": 4,
        }  # fmt: skip
        with at_pass(5, send(signal.SIGTERM), training=False):
            error = self.stopped(more)
        assert "update 4 is saved" in error.message
        assert events(run, "eval") == []
        self.check_same_end(more, run, tmp_path)

    def test_in_the_last_evaluation(
        self, settings: dict[str, Any], run: Path, data: Path, tmp_path: Path
    ) -> None:
        more = settings | {"eval_dataset": str(data)}
        with at_pass(1, send(signal.SIGTERM), training=False):
            error = self.stopped(more)
        assert "update 6 is saved" in error.message
        self.check_same_end(more, run, tmp_path)

    def test_in_the_evaluation_of_the_base(self, settings: dict[str, Any], run: Path, data: Path) -> None:
        with at_pass(1, send(signal.SIGTERM), training=False):
            error = self.stopped(settings | {"eval_dataset": str(data), "eval_on_start": True})
        assert "there is nothing to save" in error.message
        train(settings, resume=True)  # what is there is nobody's result

    def test_while_rows_are_encoded(
        self, settings: dict[str, Any], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After the first part: the rest is not waited for, and what was half done is not kept."""
        from lorakit.data import prepare, run_rows

        rows = [{"instruction": str(i), "output": str(i)} for i in range(5 * prepare._PART // 2)]
        write_rows(tmp_path / "many.jsonl", rows)
        more = settings | {"dataset": str(tmp_path / "many.jsonl"), "tokenized_path": str(tmp_path / "encoded")}
        advance, done = run_rows._Display.advance, []

        def after_the_first(display: Any, rows: int, tokens: int) -> None:
            done.append(rows)
            os.kill(os.getpid(), signal.SIGTERM)
            advance(display, rows, tokens)

        monkeypatch.setattr(run_rows._Display, "advance", after_the_first)
        error = self.stopped(more)
        assert "there is nothing to save" in error.message
        assert done[0] < len(rows)
        assert not list((tmp_path / "encoded").glob("*/manifest.json"))
        assert not run.exists() or not (run / "metrics.jsonl").exists()

    def test_a_second_one_leaves_at_once(self, settings: dict[str, Any], run: Path) -> None:
        def twice(ids: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        with at_pass(7, twice), pytest.raises(KeyboardInterrupt):
            train(settings)
        assert steps(run) == [2]  # nothing was saved for it
        train(settings, resume=True)
        assert steps(run) == [6, 4, 2]

    def test_sigusr1_saves_and_goes_on(self, settings: dict[str, Any], run: Path) -> None:
        with at_pass(6, send(signal.SIGUSR1)):  # of the third update
            train(settings | {"save_steps": 100})
        assert steps(run) == [6, 3]
