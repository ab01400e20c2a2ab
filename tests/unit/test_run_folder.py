"""A run directory mixes nothing and loses nothing; its metrics outlive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

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
        for name in ("adapter", "checkpoint-5", "my-data"):
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

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="File name too long"):
            start(tmp_path / ("x" * 300))


class TestMetricsFile:
    def test_events_come_back(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        with MetricsFile(path) as metrics:
            metrics.write("train", step=1, loss=0.1)
            assert read_metrics(path) == [{"event": "train", "step": 1, "loss": 0.1}]  # flushed at once
            metrics.write("note", text="a\u2028b\x85c\nd é")
        with MetricsFile(path) as metrics:
            metrics.write("eval", step=2)
        assert [event["event"] for event in read_metrics(path)] == ["train", "note", "eval"]
        assert read_metrics(path)[1]["text"] == "a\u2028b\x85c\nd é"

    @pytest.mark.parametrize("cut", range(1, 12))
    def test_a_torn_last_line_is_left_out(self, tmp_path: Path, cut: int) -> None:
        path = tmp_path / "metrics.jsonl"
        with MetricsFile(path) as metrics:
            metrics.write("train", step=1)
            metrics.write("note", text="éé")
        path.write_bytes(path.read_bytes()[:-1][:-cut])  # in the middle of a character, too
        assert read_metrics(path) == [{"event": "train", "step": 1}]

    def test_a_path_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="No such file or directory"):
            MetricsFile(tmp_path / "missing" / "metrics.jsonl")
