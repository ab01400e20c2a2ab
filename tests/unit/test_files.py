"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit import hardware
from lorakit.errors import StorageError
from lorakit.files import sha256_file, staged_folder, write_json, write_text, write_with


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
            if path.name.startswith(".tmp-"):
                raise OSError(28, "No space left on device")
            return replace(path, to)

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(StorageError, match="No space left on device"), staged_folder(target):
            pass
        assert (names(tmp_path), names(target)) == (["adapter"], ["old"])

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError), staged_folder(tmp_path / "file" / "adapter"):
            raise AssertionError("the block must not start")


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
