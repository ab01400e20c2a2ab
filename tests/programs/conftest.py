"""One finished run for all tests of the programs, in a folder as a user has it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import ROWS, STEPS, Call, start
from transformers import AutoModelForCausalLM

from lorakit.cli.main import main


@pytest.fixture
def lorakit(capsys: pytest.CaptureFixture[str]) -> Call:
    """``lorakit ARGUMENTS`` in this process: exit code, stdout, stderr; never a traceback."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets the next program read a text from standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture(scope="module", autouse=True)
def always_one_thread(one_thread: None) -> None:
    """Every program here runs a tiny model."""


@pytest.fixture(scope="session")
def model_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a sharper output: as it is, no choice of hidden states makes it sure of a token."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data *= 4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: rows and a configuration that learns them by heart."""
    folder = tmp_path_factory.mktemp("user's folder é")
    rows = [
        {"instruction": question, "output": answer, "system": "Address to JSON."} for question, answer in ROWS
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "config.yaml").write_text(
        f"""\
model_name_or_path: {model_folder}
dataset: train.jsonl
eval_dataset: train.jsonl
eval_on_start: true
predict_with_generate: true
max_new_tokens: 48
output_dir: runs/one
lora_rank: 16
learning_rate: 2.0e-2
lr_scheduler_type: linear
warmup_ratio: 0.1
max_steps: {STEPS}
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
logging_steps: 5
save_steps: 25
bf16: false
tokenized_path: encoded
"""
    )
    return folder


@pytest.fixture(scope="session")
def finished(folder: Path) -> tuple[int, str, str]:
    """The one whole run: exit code, stdout, stderr."""
    process = start("train", folder / "config.yaml")
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="session")
def run(folder: Path, finished: tuple[int, str, str]) -> Path:
    assert finished[0] == 0, finished[2]
    return folder / "runs" / "one"
