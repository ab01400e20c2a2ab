"""Encoded rows on disk: what was put in comes out, anything else that changed makes them anew, once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorakit.data.cache import Cached, cached, describe_files, describe_tokenizer
from lorakit.data.encode import Row
from lorakit.data.store import StoredRows, lengths_of, rows_fingerprint, to_batch
from lorakit.errors import DataError, StorageError
from lorakit.ops.loss import IGNORE


def random_rows(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = tuple(rng.randrange(200_000) for _ in range(rng.randint(1, 30)))
        rows.append(Row(ids, tuple(i if rng.random() < 0.5 else IGNORE for i in ids)))
    return rows


ROWS = random_rows(25)


class Builder:
    """Makes ROWS in pieces and counts how often it is asked to."""

    def __init__(self, rows: list[Row] = ROWS, piece: int = 10) -> None:
        self.rows, self.piece, self.calls = rows, piece, 0

    def __call__(self, write: Callable[[Any], None]) -> Mapping[str, Any]:
        self.calls += 1
        for start in range(0, len(self.rows), self.piece):
            write(to_batch(self.rows[start : start + self.piece]))
        return {"rows": len(self.rows), "system": "Ω\ud83d"}


def the_folder(cache: Path) -> Path:
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    return folder


class TestStore:
    @pytest.fixture
    def stored(self, tmp_path: Path) -> StoredRows:
        return cached({}, Builder(), folder=tmp_path).rows

    def test_rows_come_back(self, stored: StoredRows) -> None:
        assert list(stored) == ROWS
        assert len(stored) == 25
        assert [stored[i] for i in (0, 9, 10, 24, -1, -25)] == [ROWS[i] for i in (0, 9, 10, 24, -1, -25)]
        assert stored[8:13] == ROWS[8:13]
        assert stored[::-7] == ROWS[::-7]
        assert stored[20:99] == ROWS[20:]
        for outside in (25, -26):
            with pytest.raises(IndexError):
                stored[outside]

    def test_the_fingerprint_is_that_of_the_rows_however_they_are_kept(self, stored: StoredRows) -> None:
        known = rows_fingerprint(ROWS)
        assert rows_fingerprint(stored) == known
        others = [Row(row.ids, (IGNORE, *row.labels[1:])) for row in ROWS]
        moved = [Row(ROWS[0].ids + ROWS[1].ids[:1], ROWS[0].labels + ROWS[1].labels[:1])]
        moved += [Row(ROWS[1].ids[1:], ROWS[1].labels[1:]), *ROWS[2:]]
        assert len({known, *map(rows_fingerprint, (others, moved, ROWS[::-1], ROWS[1:]))}) == 5

    def test_lengths_are_known_without_reading(self, stored: StoredRows) -> None:
        assert lengths_of(stored) == lengths_of(ROWS) == [len(row.ids) for row in ROWS]
        assert all(type(length) is int for length in lengths_of(stored))

    def test_datasets_reads_the_file(self, tmp_path: Path) -> None:
        from datasets import Dataset

        cached({}, Builder(), folder=tmp_path)
        found = Dataset.from_file(str(the_folder(tmp_path) / "rows.arrow"))
        assert found.column_names == ["ids", "trained"]
        assert [tuple(row["ids"]) for row in found] == [row.ids for row in ROWS]
        assert [row["trained"] for row in found] == [[i != IGNORE for i in row.labels] for row in ROWS]


class TestCache:
    def test_made_once(self, tmp_path: Path) -> None:
        build = Builder()
        first = cached({"cutoff_len": 8}, build, folder=tmp_path)
        again = cached({"cutoff_len": 8}, build, folder=tmp_path)
        assert (first.fresh, again.fresh, build.calls) == (True, False, 1)
        assert list(first.rows) == list(again.rows) == ROWS
        assert first.facts == again.facts == {"rows": 25, "system": "Ω\ud83d"}

    def test_another_setting_is_another_entry(self, tmp_path: Path) -> None:
        build = Builder()
        for parts in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1, 2]}, {"a": [2, 1]}, {"a": None}):
            assert cached(parts, build, folder=tmp_path).fresh
        assert build.calls == 7
        assert not cached({"a": 1}, build, folder=tmp_path).fresh

    def test_overwriting_makes_them_anew(self, tmp_path: Path) -> None:
        before = cached({}, Builder(), folder=tmp_path).rows
        fewer = Builder(ROWS[:5])
        assert list(cached({}, fewer, folder=tmp_path, overwrite=True).rows) == ROWS[:5]
        assert list(before) == ROWS  # who has the old file open keeps it
        assert list(cached({}, fewer, folder=tmp_path).rows) == ROWS[:5]
        assert fewer.calls == 1

    def test_the_folder_by_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
        cached({}, Builder())
        assert (the_folder(tmp_path / "data") / "rows.arrow").is_file()

    @pytest.mark.parametrize(
        "damage", ["cut", "flip", "gone", "no manifest", "torn manifest", "other manifest"]
    )
    def test_damage_is_noticed_and_mended(
        self, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cached({}, Builder(), folder=tmp_path)
        rows, manifest = (the_folder(tmp_path) / name for name in ("rows.arrow", "manifest.json"))
        content = rows.read_bytes()
        if damage == "cut":
            rows.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            middle = len(content) // 2
            rows.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        elif damage == "gone":
            rows.unlink()
        elif damage == "no manifest":
            manifest.unlink()
        elif damage == "torn manifest":
            manifest.write_text(manifest.read_text()[:-20])
        else:
            manifest.write_text("[]")
        build = Builder()
        found = cached({}, build, folder=tmp_path)
        assert (found.fresh, build.calls) == (True, 1)
        assert list(found.rows) == ROWS
        assert "encoding them again" in caplog.text
        caplog.clear()
        assert not cached({}, build, folder=tmp_path).fresh
        assert not caplog.text

    def test_what_nobody_uses_for_a_month_goes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
        for name in "abc":
            cached({"name": name}, Builder())
        month = time.time() - 31 * 24 * 3600
        for entry in (tmp_path / "data").iterdir():
            os.utime(entry, (month, month))
        assert not cached({"name": "a"}, Builder()).fresh  # which is a use
        cached({"name": "new"}, Builder())
        assert [cached({"name": name}, Builder()).fresh for name in ("a", "b", "new")] == [False, True, False]

    def test_a_build_that_fails_leaves_nothing(self, tmp_path: Path) -> None:
        def fail(write: Callable[[Any], None]) -> Mapping[str, Any]:
            write(to_batch(ROWS))
            raise DataError("a bad row")

        with pytest.raises(DataError, match="a bad row"):
            cached({}, fail, folder=tmp_path)
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
        assert cached({}, Builder(), folder=tmp_path).fresh

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="cannot use the cache"):
            cached({}, Builder(), folder=tmp_path / "file")

    PROGRAM = (
        "import sys, time, pathlib\n"
        "from lorakit.data.cache import cached\n"
        "from lorakit.data.encode import Row\n"
        "from lorakit.data.store import to_batch\n"
        "folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])\n"
        "def build(write):\n"
        "    write(to_batch([Row((1, 2), (1, 2))]))\n"
        "    print('building', flush=True)\n"
        "    time.sleep(seconds)\n"
        "    return {}\n"
        "print('ready', flush=True)\n"
        "found = cached({}, build, folder=folder)\n"
        "print(found.fresh, len(found.rows))\n"
    )

    def start(self, folder: Path, seconds: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
        )

    def test_two_processes_share_one_build(self, tmp_path: Path) -> None:
        running = [self.start(tmp_path, 1.0) for _ in range(2)]
        told = [process.communicate(timeout=60)[0].split("\n") for process in running]
        assert sorted("building" in lines for lines in told) == [False, True]
        assert sorted(lines[-2] for lines in told) == ["False 1", "True 1"]

    def test_a_builder_that_is_killed_does_not_stop_the_next(self, tmp_path: Path) -> None:
        process = self.start(tmp_path, 60)
        assert process.stdout is not None
        while process.stdout.readline() != "building\n":
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        (left,) = tmp_path.glob(".lorakit-new-*")
        start = time.monotonic()
        assert cached({}, Builder(), folder=tmp_path).fresh
        assert time.monotonic() - start < 30
        assert not left.exists()


class TestFingerprint:
    @pytest.fixture
    def tokenizer(self, tiny_llama: Path) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(tiny_llama)

    def test_files_count_by_content(self, tmp_path: Path) -> None:
        path, copy = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        path.write_text("one\n")
        copy.write_text("one\n")
        before = describe_files([path])
        assert describe_files([copy]) == before
        copy.write_text("two\n")
        assert describe_files([copy]) != before
        assert describe_files([path, copy]) != describe_files([copy, path])

    def test_a_tokenizer_counts_with_its_template(
        self, tokenizer: PreTrainedTokenizerBase, tiny_llama: Path
    ) -> None:
        same = AutoTokenizer.from_pretrained(tiny_llama)
        before = describe_tokenizer(tokenizer)
        assert describe_tokenizer(same) == before
        same.chat_template += " "
        assert describe_tokenizer(same) != before
        tokenizer.add_tokens(["<new>"])
        assert describe_tokenizer(tokenizer) != before

    def test_encoding_a_text_changes_nothing(self, tokenizer: PreTrainedTokenizerBase) -> None:
        before = describe_tokenizer(tokenizer)
        tokenizer(["a", "b b"], padding=True, truncation=True, max_length=2)
        assert describe_tokenizer(tokenizer) == before

    def test_the_manifest_tells_what_the_rows_depend_on(self, tmp_path: Path) -> None:
        found: Cached = cached({"cutoff_len": 8}, Builder(), folder=tmp_path)
        manifest = json.loads((the_folder(tmp_path) / "manifest.json").read_text())
        assert manifest["parts"]["cutoff_len"] == 8
        assert "transformers" in manifest["parts"]["code"]
        assert manifest["facts"] == found.facts
