"""Going on: from which checkpoint, with which settings, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import at_pass, events, notes, same, steps
from transformers import AutoModelForCausalLM

from lorakit.checkpoint.snapshot import read_snapshot, snapshots
from lorakit.cli.main import main
from lorakit.errors import (
    ConflictError,
    DamagedError,
    ModelError,
    UsageError,
)
from lorakit.training.folder import RunFolder
from lorakit.training.recipe import RunResult, train

pytestmark = pytest.mark.usefixtures("one_thread")

Log = pytest.LogCaptureFixture


@pytest.fixture
def again(finished: tuple[dict[str, Any], RunResult], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A copy of the finished run, in another place."""
    keys, result = finished
    shutil.copytree(result.folder, tmp_path / "copy")
    return keys | {"output_dir": str(tmp_path / "copy")}, tmp_path / "copy"


def unfinished(run: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of ``step``."""
    shutil.rmtree(run / "adapter")
    (run / "run.json").unlink()
    for path in snapshots(run):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)


class TestResume:
    def test_settings_that_lead_elsewhere_are_refused_in_a_table(
        self, again: tuple[dict[str, Any], Path]
    ) -> None:
        keys, run = again
        unfinished(run, 4)
        before = sorted(run.rglob("*"))
        changed = keys | {"learning_rate": 0.02, "lora_rank": 8, "seed": 1, "logging_steps": 2}
        with pytest.raises(UsageError) as caught:
            train(changed, resume=True)
        assert caught.value.exit_code == 2
        table = caught.value.message.splitlines()[1:]
        assert [line.split() for line in table] == [
            ["lora_rank", "4", "→", "8"], ["lora_alpha", "8.0", "→", "16.0"],
            ["learning_rate", "0.01", "→", "0.02"], ["seed", "42", "→", "1"],
        ]  # fmt: skip
        assert "--allow-change learning_rate" in str(caught.value.remedy)
        assert sorted(run.rglob("*")) == before

    def test_unless_they_are_allowed_by_name(self, again: tuple[dict[str, Any], Path]) -> None:
        keys, run = again
        unfinished(run, 4)
        train(
            keys | {"learning_rate": 0.02, "max_steps": 8},
            resume=True,
            allow_changes=["learning_rate", "max_steps"],
        )
        assert steps(run) == [8, 6, 4, 2]
        rates = [event["learning_rate"] for event in events(run, "train")]
        assert rates[4:] == pytest.approx([0.02 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(4, 8)])
        (note,) = notes(run)
        assert "on another course than before, for learning_rate, max_steps changed" in note

    def test_a_name_that_is_no_key(self, again: tuple[dict[str, Any], Path]) -> None:
        keys, _ = again
        with pytest.raises(UsageError, match="no key is called `learning_rte`"):
            train(keys, resume=True, allow_changes=["learning_rte"])

    @pytest.mark.parametrize("change", ["data", "base"])
    def test_data_and_base_are_compared_by_content(
        self, again: tuple[dict[str, Any], Path], change: str, data: Path, tiny_llama: Path, tmp_path: Path
    ) -> None:
        keys, run = again
        unfinished(run, 4)
        name = {"data": "dataset", "base": "model_name_or_path"}[change]
        keys |= {name: str(tmp_path / "other")}
        if change == "data":
            (tmp_path / "other").mkdir()
            (tmp_path / "other" / "rows.jsonl").write_text(data.read_text().replace("dog", "cat", 1))
        else:
            model = AutoModelForCausalLM.from_pretrained(tiny_llama)
            shutil.copytree(tiny_llama, tmp_path / "other")
            model.model.norm.weight.data[0] += 1e-3
            model.save_pretrained(tmp_path / "other")
        with pytest.raises(ModelError, match=f"made with another {change} .compared by content") as caught:
            train(keys, resume=True)
        assert caught.value.exit_code == 4
        assert f"--allow-change {name}" in str(caught.value.remedy)
        train(keys, resume=True, allow_changes=[name])
        assert f"on another course than before, for {name} changed" in notes(run)[0]

    def test_the_same_data_and_base_elsewhere_are_the_same(
        self, again: tuple[dict[str, Any], Path], data: Path, tiny_llama: Path, tmp_path: Path, finished: Any
    ) -> None:
        keys, run = again
        unfinished(run, 4)
        shutil.copytree(tiny_llama, tmp_path / "moved")
        shutil.copy(data, tmp_path / "moved.jsonl")
        train(
            keys | {"model_name_or_path": str(tmp_path / "moved"), "dataset": str(tmp_path / "moved.jsonl")},
            resume=True,
        )
        assert "R0, bit for bit" in notes(run)[0]
        ends = [read_snapshot(folder / "checkpoint-6") for folder in (run, finished[1].folder)]
        assert same(ends[0].tensors, ends[1].tensors)

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
    def test_a_damaged_checkpoint_is_passed_over_with_a_loud_note(
        self, again: tuple[dict[str, Any], Path], damage: str, caplog: Log, finished: Any
    ) -> None:
        keys, run = again
        unfinished(run, 6)
        tensors = run / "checkpoint-6" / "state.safetensors"
        content = bytearray(tensors.read_bytes())
        if damage == "missing":
            tensors.unlink()
        else:
            content[len(content) // 2] ^= 4
            tensors.write_bytes(content[: -7 if damage == "truncated" else None])
        with pytest.raises(DamagedError) as caught:
            train(keys, resume=run / "checkpoint-6")
        assert caught.value.exit_code == 4
        assert "--resume auto" in str(caught.value.remedy)
        train(keys, resume=True)
        assert "WARNING: checkpoint-6 cannot be used: state.safetensors" in caplog.text
        ends = [read_snapshot(folder / "checkpoint-6") for folder in (run, finished[1].folder)]
        assert same(ends[0].tensors, ends[1].tensors)

    def test_none_is_good(self, again: tuple[dict[str, Any], Path]) -> None:
        keys, run = again
        unfinished(run, 6)
        for path in snapshots(run):
            os.truncate(path / "state.json", 10)
        with pytest.raises(ModelError, match="none of the checkpoints can be used"):
            train(keys, resume=True)

    def test_nothing_to_resume(self, settings: dict[str, Any], run: Path, caplog: Log, tmp_path: Path) -> None:
        with caplog.at_level("INFO", logger="lorakit"):
            train(settings | {"max_steps": 2}, resume=True)
        assert f"nothing to resume in {run}: starting from the beginning" in caplog.text
        assert steps(run) == [2]
        with pytest.raises(ModelError, match="no such checkpoint") as caught:
            train(settings | {"output_dir": str(tmp_path / "other")}, resume=run / "checkpoint-99")
        assert caught.value.exit_code == 4
        assert not (tmp_path / "other").exists() or not any((tmp_path / "other").iterdir())

    def test_a_finished_run_is_an_answer(
        self, again: tuple[dict[str, Any], Path], finished: Any, caplog: Log
    ) -> None:
        keys, run = again
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
        with at_pass(0, lambda ids: pytest.fail("a pass")), caplog.at_level("INFO", logger="lorakit"):
            result = train(keys, resume=True)
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
        assert "the run is finished already, after 6 updates: nothing to do" in caplog.text
        expected = finished[1]
        assert (result.folder, result.adapter, result.report) == (run, run / "adapter", run / "report.html")
        assert result.before is not None and result.after is not None
        assert (result.before.scores(), result.after.scores()) == (
            expected.before.scores(),
            expected.after.scores(),
        )

    def test_a_finished_run_may_go_on_or_back(self, again: tuple[dict[str, Any], Path]) -> None:
        keys, run = again
        train(keys | {"max_steps": 7}, resume=True, allow_changes=["max_steps"])
        assert steps(run)[0] == 7
        train(keys | {"max_steps": 7}, resume=run / "checkpoint-4", allow_changes=["max_steps"])
        assert [event["step"] for event in events(run, "train")] == [1, 2, 3, 4, 5, 6, 7]

    def test_an_earlier_checkpoint_sets_the_later_history_aside(
        self, again: tuple[dict[str, Any], Path], finished: Any
    ) -> None:
        keys, run = again
        train(keys, resume=run / "checkpoint-2")
        assert steps(run) == [6, 4, 2]
        assert {path.name for path in run.glob("aside-*")} == {"aside-checkpoint-4", "aside-checkpoint-6"}
        assert same(
            read_snapshot(run / "checkpoint-6").tensors, read_snapshot(run / "aside-checkpoint-6").tensors
        )
        later = [json.loads(line) for line in (run / "metrics.superseded.jsonl").read_text().splitlines()]
        assert [event["step"] for event in later if event["event"] == "train"] == [3, 4, 5, 6]
        assert [event["step"] for event in events(run, "train")] == [1, 2, 3, 4, 5, 6]

    def test_a_run_may_go_on_in_another_folder(
        self, again: tuple[dict[str, Any], Path], finished: Any, tmp_path: Path
    ) -> None:
        keys, run = again
        train(keys | {"output_dir": str(tmp_path / "new")}, resume=run / "checkpoint-4")
        assert steps(tmp_path / "new") == [6]
        assert steps(run) == [6, 4, 2]
        ends = [read_snapshot(folder / "checkpoint-6") for folder in (tmp_path / "new", run)]
        assert same(ends[0].tensors, ends[1].tensors)

    def test_the_key_means_the_same(self, again: tuple[dict[str, Any], Path]) -> None:
        keys, run = again
        unfinished(run, 4)
        train(keys | {"resume_from_checkpoint": True})
        assert "going on after update 4" in notes(run)[0]

    def test_two_runs_in_one_folder(self, settings: dict[str, Any], run: Path) -> None:
        with RunFolder(run).lock(), pytest.raises(ConflictError, match="another run is writing to") as caught:
            train(settings)
        assert caught.value.exit_code == 8
        assert f"process {os.getpid()} on " in caught.value.message
        train(settings | {"max_steps": 1})

    def test_the_command_line(
        self, again: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        keys, run = again
        unfinished(run, 4)
        config = str(run.with_name("config.json"))
        Path(config).write_text(json.dumps(keys))  # JSON is YAML
        assert main(["train", config, "learning_rate=0.5", "--resume", "auto"]) == 2
        assert "learning_rate  0.01 → 0.5" in capsys.readouterr().err
        assert main(["train", config, "--resume", str(run / "checkpoint-77")]) == 4
        assert (
            main(["train", config, "learning_rate=0.02", "--resume", "auto", "--allow-change", "learning_rate"])
            == 0
        )
        assert main(["train", config]) == 8
        capsys.readouterr()
        assert (
            main(
                [
                    "train",
                    config,
                    "learning_rate=0.02",
                    "--resume",
                    "auto",
                    "--allow-change",
                    "learning_rate",
                    "--json",
                ]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["adapter"] == str(run / "adapter")
