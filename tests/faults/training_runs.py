"""What the tests of runs that fail share: settings, what a run left, and a way to act in the middle of one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lorakit.checkpoint.snapshot import snapshots
from lorakit.checkpoint.state import State

ROWS = 12


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(model: Path, data: Path, out: Path) -> dict[str, Any]:
    """Three updates an epoch, six in all."""
    return {
        "model_name_or_path": str(model), "dataset": str(data), "tokenized_path": str(data.parent / "encoded"),
        "output_dir": str(out), "bf16": False, "lora_rank": 4, "learning_rate": 0.01, "max_steps": 6,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "pass_tokens": 0,
        "logging_steps": 1, "save_steps": 2, "plot_loss": False, "preprocessing_num_workers": 1,
    }  # fmt: skip


def steps(run: Path) -> list[int]:
    """Of the checkpoints, newest first."""
    return [int(path.name.removeprefix("checkpoint-")) for path in snapshots(run)]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def notes(run: Path) -> list[str]:
    return [event["text"] for event in events(run, "note")]


def weights(state: State) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.tensors.items() if name.startswith("model/")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@contextlib.contextmanager
def at_pass(number: int, act: Callable[[torch.Tensor], object], *, training: bool = True) -> Iterator[None]:
    """``act`` on the token ids of a pass by its number (0: of every one), of those that train or do not."""
    count = 0

    def note(module: nn.Module, given: Any) -> None:
        nonlocal count
        trial = not training and torch.is_grad_enabled()  # of the run's preparation
        if isinstance(module, nn.Embedding) and module.training == training and not trial:
            count += 1
            if number in (0, count):
                act(given[0])

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def send(signum: signal.Signals) -> Callable[[object], None]:
    return lambda ids: os.kill(os.getpid(), signum)
