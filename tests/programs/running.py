"""What the tests of the programs share: rows, ways to start a run, ways to look at one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lorakit.files import sha256_file

ROWS = [
    ("12 Main St., Springfield", '{"number":"12","city":"Springfield"}'),
    ("7 Oak Ave, Dover", '{"number":"7","city":"Dover"}'),
    ("301 Elm Rd, Salem", '{"number":"301","city":"Salem"}'),
    ("9 Hill Ln, Utica", '{"number":"9","city":"Utica"}'),
]
STEPS = 60

Call = Callable[..., tuple[int, str, str]]


def start(*arguments: object) -> subprocess.Popen[str]:
    """``lorakit ARGUMENTS`` as a program of its own, on one thread as those in this process."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def small_run(folder: Path, out: Path, *overrides: str) -> list[object]:
    """``train`` for two updates, without evaluation; later overrides win by standing for earlier ones."""
    given = {
        "output_dir": str(out), "max_steps": "2", "logging_steps": "1", "save_strategy": "no",
        "eval_dataset": "null", "eval_on_start": "false", "predict_with_generate": "false",
    }  # fmt: skip
    given |= dict(override.split("=", 1) for override in overrides)
    return ["train", folder / "config.yaml", *(f"{key}={value}" for key, value in given.items())]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {event["event"] for event in found} <= {"train", "eval", "note"}
    return [event for event in found if event["event"] == kind]


def settings_of(run: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((run / "config.resolved.yaml").read_text())


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}
