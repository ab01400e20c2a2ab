"""A small run's settings, for the tests that make it fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from training_runs import ROWS, settings_of, write_rows

from lorakit.training.recipe import RunResult, train

SingleThread = Callable[[], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows to train on."""
    rng = random.Random(8)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"instruction": f"{rng.randint(1, 99)} dog", "output": str(rng.random())} for _ in range(ROWS)]
    write_rows(path, rows)
    return path


@pytest.fixture
def settings(tiny_llama: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run of six updates."""
    return settings_of(tiny_llama, data, tmp_path / "run")


@pytest.fixture
def run(settings: dict[str, Any]) -> Path:
    """The run's folder."""
    return Path(settings["output_dir"])


@pytest.fixture(scope="session")
def finished(
    tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory, single_thread: SingleThread
) -> tuple[dict[str, Any], RunResult]:
    """The settings of a finished run with evaluations, and its result."""
    keys = settings_of(tiny_llama, data, tmp_path_factory.mktemp("finished") / "run")
    keys |= {"eval_dataset": str(data), "eval_on_start": True}
    with single_thread():  # as those who go on with it, or it would not be bit for bit
        return keys, train(keys)
