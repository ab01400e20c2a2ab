"""Going on where a run was cut gives the run that was not, bit for bit: the whole matrix.

{fp32, bf16} × {accumulation, packing, dropout, AdaLoRA, 8-bit optimizer, early stopping} × {after a checkpoint,
in the middle of an accumulation, at the edge of an epoch}; two ranks are in test_resume_ranks.py. Compared with
the uninterrupted run: every tensor of the last checkpoint (weights, optimizer, generators, rank allocator), the
adapter's file, the metrics, and the tokens of every batch that was still to come.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lorakit import hardware
from lorakit.checkpoint.snapshot import read_snapshot, snapshots
from lorakit.checkpoint.state import State
from lorakit.errors import Interrupted
from lorakit.training.recipe import train

ROWS = 11
STEPS = 8  # three an epoch, of which the last is smaller
BOUNDARY, EDGE = 4, 6  # checkpoints: within the second epoch, and at its end
CUT = 5  # the update that a signal interrupts
CLOCK = {"seconds", "data_seconds", "tokens_per_second", "memory_gb"}

METHODS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1, "max_grad_norm": 0.1},
    "packing": {"packing": True, "cutoff_len": 96, "per_device_train_batch_size": 1},
    "dropout": {"lora_dropout": 0.3, "gradient_checkpointing": True},
    "adalora": {"use_adalora": True, "adalora_target_r": 2, "lora_dropout": 0.1},
    # Below 4096 numbers a tensor's moments stay in 32 bits.
    "adamw_8bit": {"optim": "adamw_8bit", "lora_rank": 64, "lora_target": "q_proj,o_proj"},
    # No answer is ever right, so that the first evaluation stays the best.
    "early stopping": {
        "eval_steps": 1, "early_stopping_steps": 6, "load_best_model_at_end": True, "max_new_tokens": 2,
        "predict_with_generate": True, "metric_for_best_model": "exact_match",
    },
}  # fmt: skip
CASES = [(precision, method) for precision in ("fp32", "bf16") for method in METHODS]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {"instruction": f"{rng.randint(1, 99)} " + "dog " * rng.randint(0, 6), "output": str(rng.random())}
        for _ in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_name("other.jsonl").write_text(json.dumps({"instruction": "?", "output": "&" * 9}))
    return path


@contextlib.contextmanager
def watched(stop_after: int | None = None) -> Iterator[list[Tensor]]:
    """The token ids of every training pass; after so many of them the process gets a SIGTERM."""
    seen: list[Tensor] = []

    def note(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.Embedding) and module.training and torch.is_grad_enabled():
            seen.append(given[0].clone())
            if len(seen) == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class Whole:
    """A run that nothing interrupted."""

    folder: Path
    keys: dict[str, Any]
    passes: list[Tensor]
    last: int  # the update that it ended with


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def whole(
    request: pytest.FixtureRequest, tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    precision, method = request.param
    if not hardware.supports(precision):
        pytest.skip(f"no {precision} arithmetic here")
    folder, keys = tmp_path_factory.mktemp("runs"), keys_of(tiny_llama, data, precision) | METHODS[method]
    if method == "early stopping":
        keys["eval_dataset"] = str(data.with_name("other.jsonl"))
    with watched() as passes:
        train(keys | {"output_dir": str(folder / "whole")})
    last = last_state(folder / "whole").values["progress"]["step"]
    return Whole(folder / "whole", keys, passes[1:], last)  # without the one that tries the largest batch


def keys_of(model: Path, data: Path, precision: str) -> dict[str, Any]:
    """Settings that all runs share."""
    return {
        "model_name_or_path": str(model), "dataset": str(data), "tokenized_path": str(data.parent / "enc"),
        "bf16": precision == "bf16", "lora_rank": 4, "learning_rate": 0.01, "warmup_steps": 2,
        "warmup_start_factor": 0.1, "max_steps": STEPS, "per_device_train_batch_size": 2, "pass_tokens": 0,
        "gradient_accumulation_steps": 2, "logging_steps": 3, "save_steps": 2, "plot_loss": False,
        "preprocessing_num_workers": 1,
    }  # fmt: skip


def killed_after(step: int, whole: Path, run: Path) -> Path:
    """Beyond ``step`` there are metrics, and checkpoints that a power failure damaged."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    (run / "run.json").unlink()
    for later in snapshots(run):
        if later.name > f"checkpoint-{step}":
            os.truncate(later / "state.safetensors", 1000)
    return run


def last_state(run: Path) -> State:
    return read_snapshot(snapshots(run)[0])


def metrics(run: Path) -> list[dict[str, Any]]:
    """All that was measured, but for what a clock or the machine says, and notes."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in event.items() if k not in CLOCK} for event in events if event["event"] != "note"]


def check_same(run: Path, whole: Whole, passes: list[Tensor]) -> None:
    """``run`` ended as the uninterrupted one did; ``passes`` are its since it went on."""
    found, expected = last_state(run), last_state(whole.folder)
    assert found.tensors.keys() == expected.tensors.keys()
    assert {"model", "optimizer", "rng0"} <= {name.split("/")[0] for name in found.tensors}
    assert [n for n, tensor in expected.tensors.items() if not torch.equal(tensor, found.tensors[n])] == []
    ours, theirs = ({**state.values["progress"], "seconds": 0, "since": 0} for state in (found, expected))
    assert ours == theirs
    assert metrics(run) == metrics(whole.folder)
    adapters = [(folder / "adapter/adapter_model.safetensors").read_bytes() for folder in (run, whole.folder)]
    assert adapters[0] == adapters[1]
    assert 0 < len(passes) < len(whole.passes)
    following = whole.passes[-len(passes) :]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(passes, following, strict=True))


def test_the_runs_are_what_they_claim(whole: Whole) -> None:
    state, optim = last_state(whole.folder), whole.keys.get("optim")
    moments = {tensor.dtype for name, tensor in state.tensors.items() if name.startswith("optimizer/")}
    assert (torch.uint8 in moments) == (optim == "adamw_8bit")
    assert any(name.startswith("budget/") for name in state.tensors) == ("use_adalora" in whole.keys)
    assert whole.last == (7 if "early_stopping_steps" in whole.keys else STEPS)


@pytest.mark.parametrize("step", [BOUNDARY, EDGE])
def test_killed_after_a_checkpoint(whole: Whole, tmp_path: Path, step: int) -> None:
    run = killed_after(step, whole.folder, tmp_path / "run")
    with watched() as passes:
        train(whole.keys | {"output_dir": str(run)}, resume=True)
    check_same(run, whole, passes[1:])


def test_stopped_in_the_middle_of_an_accumulation(whole: Whole, tmp_path: Path) -> None:
    run = tmp_path / "run"
    of_update = [int(n) for n in passes_of_updates(whole)]
    before = sum(of_update[: CUT - 1])
    assert of_update[CUT - 1] > 1
    with watched(stop_after=1 + before + 1) as first, pytest.raises(Interrupted) as caught:
        train(whole.keys | {"output_dir": str(run)})
    assert caught.value.exit_code == 143
    assert len(first) == 1 + before + 1
    assert snapshots(run)[0].name == f"checkpoint-{CUT - 1}"
    with watched() as second:
        train(whole.keys | {"output_dir": str(run)}, resume=True)
    assert len(second) - 1 == len(whole.passes) - before
    check_same(run, whole, second[1:])


def passes_of_updates(whole: Whole) -> list[int]:
    """How many passes each update of the uninterrupted run had."""
    size, accumulation = (
        whole.keys[key] for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if "packing" in whole.keys:
        micro = len(whole.passes) * 3 // STEPS
        assert len(whole.passes) == STEPS // 3 * micro + min(STEPS % 3 * accumulation, micro)
    else:
        micro = -(-ROWS // size)
    epoch = [min(accumulation, micro - start) for start in range(0, micro, accumulation)]
    return (epoch * STEPS)[: whole.last]
