"""Updates that are not finite, and memory that runs short, made real: nothing is lost, nothing is silent."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from training_runs import ROWS, at_pass, events, notes, steps, write_rows

from lorakit.checkpoint.snapshot import read_snapshot, snapshots
from lorakit.errors import (
    DivergedError,
    MemoryLimitError,
)
from lorakit.training.recipe import train

pytestmark = pytest.mark.usefixtures("one_thread")

Log = pytest.LogCaptureFixture


class TestNotFinite:
    @pytest.fixture
    def settings(self, settings: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
        """One row of twelve has a token for which the embedding layer answers with infinity."""
        rows = [{"instruction": f"{i} dog", "output": f"{i * i}"} for i in range(ROWS - 1)]
        write_rows(tmp_path / "rows.jsonl", [*rows, {"instruction": "a ~ b", "output": "c"}])
        token = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]["vocab"]["~"]

        def spoil(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
            if not isinstance(module, nn.Embedding):
                return output
            return output.masked_fill((given[0] == token)[..., None], math.inf)

        handle = register_module_forward_hook(spoil)
        yield settings | {
            "dataset": str(tmp_path / "rows.jsonl"), "tokenized_path": str(tmp_path / "encoded"),
        }  # fmt: skip
        handle.remove()

    def check_dump(self, run: Path, step: int) -> None:
        dump = json.loads((run / f"nonfinite-{step}.json").read_text())
        assert dump["step"] == step
        rows = [i for group in dump["rows"] for i in group]
        assert len(rows) == 4 and sorted(map(int, dump["texts"])) == sorted(rows)
        assert any("a ~ b" in text for text in dump["texts"].values())
        assert set(dump["norms"].values()) == {"nan"} and len(dump["norms"]) == 28

    def test_stop(self, settings: dict[str, Any], run: Path) -> None:
        with pytest.raises(DivergedError, match=r"loss nan and gradient norm nan at update [123]") as caught:
            train(settings)
        assert caught.value.exit_code == 5
        bad = int(caught.value.message.split("update ")[1].split(":")[0])
        assert steps(run)[0] == bad - 1  # as it was before
        self.check_dump(run, bad)
        assert not (run / "adapter").exists()
        for path in snapshots(run):
            assert all(
                torch.isfinite(t).all() for t in read_snapshot(path).tensors.values() if t.is_floating_point()
            )
        # And from there it goes on, if the policy allows.
        train(settings | {"on_nonfinite": "skip"}, resume=True)
        done = [event["step"] for event in events(run, "train")]
        assert bad not in done and len(done) == 4  # the row comes once an epoch

    def test_skip(self, settings: dict[str, Any], run: Path) -> None:
        train(settings | {"on_nonfinite": "skip"})
        done = [event["step"] for event in events(run, "train")]
        (first, second) = sorted(set(range(1, 7)) - set(done))
        assert notes(run) == [
            f"update {first} was not finite and is left out (1 so far)",
            f"update {second} was not finite and is left out (2 so far)",
        ]
        assert steps(run) == [6, 4, 2]
        self.check_dump(run, first)
        tensors = load_file(run / "adapter/adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())

    def test_only_so_often(self, settings: dict[str, Any]) -> None:
        with pytest.raises(DivergedError):
            train(settings | {"on_nonfinite": "skip", "max_nonfinite_updates": 1})

    def test_roll_back(self, settings: dict[str, Any], run: Path) -> None:
        """The row is never finite, so that going back does not help for ever."""
        with pytest.raises(DivergedError):
            train(
                settings | {"on_nonfinite": "rollback", "save_steps": 1, "max_nonfinite_updates": 2, "seed": 1}
            )
        told = notes(run)
        assert len(told) == 2
        bad = int(told[0].split()[1])
        assert bad > 1
        assert told == [
            f"update {bad} was not finite: back to update {bad - 1}, at {rate} times the rate"
            for rate in (0.5, 0.25)
        ]
        assert read_snapshot(snapshots(run)[0]).values["progress"]["rate_factor"] == 0.25

    def test_nothing_to_roll_back_to(self, settings: dict[str, Any], run: Path) -> None:
        with pytest.raises(DivergedError, match="no checkpoint to go back to"):
            train(settings | {"on_nonfinite": "rollback", "save_steps": 100})

    def test_weights_that_are_not_finite_are_never_saved(
        self, settings: dict[str, Any], run: Path, data: Path
    ) -> None:
        """A step that is too large makes the weights themselves infinite: the last good checkpoint stays."""
        wild = {"learning_rate": 1.0, "lora_alpha": 1e38, "dataset": str(data), "save_steps": 1}
        with pytest.raises(DivergedError) as caught:
            train(settings | wild)
        assert caught.value.exit_code == 5
        for path in snapshots(run):
            tensors = read_snapshot(path).tensors.values()
            assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())


def ask_for_too_much(most: int) -> Callable[[torch.Tensor], None]:
    """Really ask torch's allocator for a petabyte if a pass has more than ``most`` tokens."""

    def ask(ids: torch.Tensor) -> None:
        if ids.numel() > most:
            torch.empty(2**50)

    return ask


LIMITED = """
import json, resource, sys
import torch
from lorakit.training.recipe import train

torch.set_num_threads(1)
keys = json.loads(sys.argv[1])
train(keys | {"max_steps": 1, "output_dir": keys["output_dir"] + "-first", "per_device_train_batch_size": 1})
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
size = int(status["VmSize"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 32_000_000, resource.RLIM_INFINITY))
train(keys)
"""


class TestMemory:
    def losses(self, settings: dict[str, Any], most: int, training: bool = True) -> list[float]:
        with at_pass(0, ask_for_too_much(most), training=training):
            train(settings)
        return [event["loss"] for event in events(Path(settings["output_dir"]), "train")]

    def test_micro_batches_are_divided_and_nothing_else_changes(
        self, settings: dict[str, Any], run: Path, tmp_path: Path
    ) -> None:
        large = settings | {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
        expected = self.losses(large | {"output_dir": str(tmp_path / "free")}, most=10**9)
        assert self.losses(large, most=120) == pytest.approx(expected, rel=1e-5)
        (note,) = set(notes(run))
        assert note.startswith("out of memory: micro-batches are divided by 2 from now on")
        assert read_snapshot(run / "checkpoint-2").values["progress"]["splits"] == 2

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the size of a process from /proc")
    def test_a_process_that_gets_no_more_memory(
        self, settings: dict[str, Any], run: Path, tmp_path: Path
    ) -> None:
        """The system's own limit on the address space, in a process of its own."""
        write_rows(
            tmp_path / "long.jsonl", [{"instruction": "a dog " * 60, "output": "12 Main St. " * 20}] * 96
        )
        keys = settings | {
            "dataset": str(tmp_path / "long.jsonl"), "tokenized_path": str(tmp_path / "encoded"),
            "max_steps": 2, "per_device_train_batch_size": 96, "gradient_accumulation_steps": 1,
            "max_grad_norm": 1e6, "pass_tokens": 10**6,
        }  # fmt: skip
        command = [sys.executable, "-c", LIMITED, json.dumps(keys)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
        assert done.returncode == 0, done.stderr
        assert read_snapshot(run / "checkpoint-2").values["progress"]["splits"] > 1
        expected = self.losses(keys | {"output_dir": str(tmp_path / "free")}, most=10**9)
        assert [event["loss"] for event in events(run, "train")] == pytest.approx(expected, rel=1e-4)

    def test_a_row_that_does_not_fit(self, settings: dict[str, Any], run: Path) -> None:
        with pytest.raises(MemoryLimitError, match="not enough memory for a single row") as caught:
            self.losses(settings, most=10)
        assert caught.value.exit_code == 7
        assert not (run / "adapter").exists()

    def test_in_an_evaluation_and_in_generation(
        self, settings: dict[str, Any], run: Path, data: Path, caplog: Log, tmp_path: Path
    ) -> None:
        held_out = {"eval_dataset": str(data), "predict_with_generate": True, "max_new_tokens": 2}
        more = settings | held_out | {"max_steps": 1, "per_device_eval_batch_size": 12}
        free = train(more | {"output_dir": str(tmp_path / "free")}).after
        with at_pass(0, ask_for_too_much(100), training=False), caplog.at_level("INFO", logger="lorakit"):
            tight = train(more).after
        assert free is not None and tight is not None
        assert tight.loss == pytest.approx(free.loss, rel=1e-6)
        assert tight.answers == free.answers
        assert "out of memory: evaluating 6 rows at once from here on" in caplog.text
        with at_pass(0, ask_for_too_much(5), training=False), pytest.raises(MemoryLimitError) as caught:
            train(more | {"output_dir": str(tmp_path / "tighter")})
        assert caught.value.exit_code == 7
