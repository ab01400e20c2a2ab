"""``lorakit bench``: real updates of a user's configuration, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Call


def test_updates_are_timed_and_nothing_is_written(folder: Path, lorakit: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    keys = ("output_dir=runs/never", "tokenized_path=")
    status, out, err = lorakit("bench", folder / "config.yaml", *keys, "--seconds", 0, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["updates"] >= 1
    assert found["tokens_per_second"] > 0
    assert found["share"] == pytest.approx(found["tokens_per_second"] / found["bound_tokens_per_second"])
    assert sum(found["parts"].values()) == pytest.approx(1)
    assert found["parts"]["frozen layers and adapters"] > 0
    assert found["advice"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_as_text(folder: Path, lorakit: Call) -> None:
    status, out, _ = lorakit("bench", folder / "config.yaml", "tokenized_path=", "--seconds", 0)
    assert status == 0
    assert "tokens a second" in out
    assert "- the largest part is " in out


def test_what_cannot_be_measured(folder: Path, lorakit: Call) -> None:
    status, _, err = lorakit("bench", folder / "config.yaml", "fsdp=full_shard")
    assert status == 2
    assert "one process" in err
