"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit import hardware
from lorakit.errors import StorageError
from lorakit.files import (
    discard,
    fsync,
    low_space,
    sha256_file,
    staged_folder,
    tidy,
    write_json,
    write_text,
    write_with,
)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestFile:
    def test_text_and_json(self, tmp_path: Path) -> None:
        write_text(tmp_path / "new" / "a.txt", "é\r\n")
        assert (tmp_path / "new" / "a.txt").read_bytes() == "é\r\n".encode()
        write_json(tmp_path / "b.json", {"é": Path("x"), "n": [1, 0.5]})
        assert (tmp_path / "b.json").read_text() == '{\n  "é": "x",\n  "n": [\n    1,\n    0.5\n  ]\n}\n'
        assert names(tmp_path) == ["b.json", "new"]

    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
    def test_a_failing_writer_leaves_what_was_there(self, tmp_path: Path, failure: type[BaseException]) -> None:
        def write(aside: Path) -> None:
            aside.write_text("half")
            assert (tmp_path / "a.txt").read_text() == "before"
            raise failure

        write_text(tmp_path / "a.txt", "before")
        with pytest.raises(failure):
            write_with(tmp_path / "a.txt", write)
        assert (names(tmp_path), (tmp_path / "a.txt").read_text()) == (["a.txt"], "before")

    def test_a_refusal_of_the_disk_says_where(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError) as caught:
            write_text(tmp_path / "file" / "a.txt", "x")
        assert caught.value.message.startswith(f"cannot write {tmp_path}/file/a.txt: ")
        assert caught.value.exit_code == 6

    def test_the_mode_of_a_file_that_is_replaced_is_kept(self, tmp_path: Path, umask: None) -> None:
        write_text(tmp_path / "a", "1")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
        (tmp_path / "a").chmod(0o604)
        write_text(tmp_path / "a", "2")
        assert ((tmp_path / "a").stat().st_mode & 0o777, (tmp_path / "a").read_text()) == (0o604, "2")

    def test_a_file_system_that_cannot_flush(self) -> None:
        with pytest.raises(OSError, match="Invalid argument"), Path("/dev/null").open("rb") as stream:
            os.fsync(stream.fileno())
        fsync(Path("/dev/null"))

    def test_sha256(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        assert sha256_file(tmp_path / "a") == (
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
        )


class TestFolder:
    def test_it_appears_when_the_block_ends(self, tmp_path: Path, umask: None) -> None:
        target = tmp_path / "runs" / "adapter"
        with staged_folder(target) as stage:
            (stage / "a").write_text("1")
            (stage / "a").chmod(0o600)
            assert not target.exists()
        assert (target / "a").read_text() == "1"
        assert names(target.parent) == ["adapter"]
        assert (target.stat().st_mode & 0o777, (target / "a").stat().st_mode & 0o777) == (0o750, 0o640)

    def test_it_takes_the_place_of_the_old_one_as_a_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "adapter"
        for name in ("old", "new"):
            with staged_folder(target) as stage:
                (stage / name).touch()
        assert names(target) == ["new"]
        assert names(tmp_path) == ["adapter"]

    @pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
    def test_a_failing_block_leaves_what_was_there(self, tmp_path: Path, failure: type[BaseException]) -> None:
        target = tmp_path / "adapter"
        target.mkdir()
        (target / "old").touch()
        with pytest.raises(StorageError if failure is OSError else failure), staged_folder(target) as stage:
            (stage / "new").touch()
            raise failure
        assert (names(tmp_path), names(target)) == (["adapter"], ["old"])

    def test_a_failing_promotion_puts_the_old_one_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target, replace = tmp_path / "adapter", Path.replace
        target.mkdir()
        (target / "old").touch()

        def refuse(path: Path, to: Path) -> Path:
            if path.name.startswith(".lorakit-new-") and to == target:
                raise OSError(28, "No space left on device")
            return replace(path, to)

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(StorageError, match="No space left on device"), staged_folder(target):
            pass
        assert (names(tmp_path), names(target)) == (["adapter"], ["old"])

    def test_modes_of_what_is_replaced_are_kept(self, tmp_path: Path, umask: None) -> None:
        target = tmp_path / "adapter"
        for _ in range(2):
            with staged_folder(target) as stage:
                (stage / "below").mkdir()
                for name in ("a", "below/b", "c"):
                    (stage / name).touch(0o600)
            if target.stat().st_mode & 0o777 == 0o750:  # the first time
                target.chmod(0o711)
                (target / "below" / "b").chmod(0o604)
        modes = [path.stat().st_mode & 0o777 for path in (target, *(target / n for n in ("a", "below/b", "c")))]
        assert modes == [0o711, 0o640, 0o604, 0o640]

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError), staged_folder(tmp_path / "file" / "adapter"):
            raise AssertionError("the block must not start")


class TestLeftovers:
    @pytest.fixture
    def left(self, tmp_path: Path) -> Path:
        for name in (
            ".lorakit-new-01234567-adapter", ".lorakit-old-01234567-adapter", "adapter",
            ".lorakit-old-01234567-gone\nfile é",
            ".lorakit-old-0123456-short", ".old-results-20240101", ".lorakit-new-0123456X-mine",
        ):  # fmt: skip
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
        (tmp_path / ".lorakit-new-89abcdef-run.json").write_text("{")
        (tmp_path / ".lorakit-old-89abcdef-card.md").write_text("whole")
        return tmp_path

    def test_what_was_moved_aside_comes_back_and_the_rest_goes(self, left: Path) -> None:
        tidy(left)
        assert names(left) == [
            ".lorakit-new-0123456X-mine", ".lorakit-old-0123456-short", ".old-results-20240101",
            "adapter", "card.md", "gone\nfile é",
        ]  # fmt: skip
        assert (left / "adapter" / "file").read_text() == "adapter"
        assert (left / "gone\nfile é" / "file").read_text() == ".lorakit-old-01234567-gone\nfile é"
        assert (left / "card.md").read_text() == "whole"

    def test_one_name_alone(self, left: Path) -> None:
        before = set(names(left))
        tidy(left, "adapter")
        assert before - set(names(left)) == {".lorakit-new-01234567-adapter", ".lorakit-old-01234567-adapter"}

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "file").touch()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lorakit-new-01234567-a").symlink_to(tmp_path / "mine")
        tidy(tmp_path / "run")
        assert (names(tmp_path / "run"), names(tmp_path / "mine")) == ([], ["file"])

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="No such file"):
            tidy(tmp_path / "missing")
        with pytest.raises(StorageError, match="No such file"):
            discard(tmp_path / "missing")

    def test_discarding(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").touch()
        (tmp_path / "file").touch()
        discard(tmp_path / "folder")
        discard(tmp_path / "file")
        assert names(tmp_path) == []

    def test_what_is_aside_already_keeps_its_target(self, tmp_path: Path) -> None:
        long = "x" * 230  # with one prefix more it would be too long a name
        (tmp_path / f".lorakit-old-01234567-{long}").touch()
        (tmp_path / long).touch()
        tidy(tmp_path)
        assert names(tmp_path) == [long]


class TestSpace:
    def test_a_warning_says_how_much(self, tmp_path: Path) -> None:
        free = shutil.disk_usage(tmp_path).free
        assert low_space(tmp_path, free // 2) is None
        told = re.match(
            rf"([\d.]+) GB are left in {tmp_path}, and ([\d.]+) GB", str(low_space(tmp_path, 10 * free))
        )
        assert told is not None
        assert float(told[1]) == pytest.approx(free / 1e9, rel=0.05, abs=0.02)
        assert float(told[2]) == pytest.approx(free / 1e8, rel=0.05, abs=0.02)

    def test_a_folder_that_is_gone(self, tmp_path: Path) -> None:
        assert "No such file" in str(low_space(tmp_path / "gone", 1))


class TestMachine:
    def test_what_a_report_says(self) -> None:
        summary = hardware.summary()
        assert summary["device"] in {"cpu", "cuda"}
        assert summary["best_precision"] in {"bf16", "fp16", "fp32"}
        assert int(summary["cores"]) >= 1 and float(summary["memory_gb"]) > 0.1
        assert all(
            isinstance(summary[key], str) and summary[key] for key in ("processor", "platform", "python")
        )

    def test_the_best_precision_is_a_supported_one(self) -> None:
        assert hardware.supports("fp32")
        assert hardware.supports(hardware.best_precision())

    def test_memory_is_counted_in_bytes(self) -> None:
        import psutil

        resident = psutil.Process().memory_info().rss
        if hardware.device() == "cpu":
            assert hardware.memory_used() == pytest.approx(resident, rel=0.2)
            assert hardware.memory_peak() >= 0.8 * resident
