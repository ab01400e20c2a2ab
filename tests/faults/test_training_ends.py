"""What a run leaves: its best, a second stage's model, an adapter to go on with."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import at_pass, events, notes, same, send, steps, weights
from transformers import AutoModelForCausalLM

from lorakit.adapters.attach import adapter_layers
from lorakit.checkpoint.peft_format import load_adapter
from lorakit.checkpoint.snapshot import read_snapshot
from lorakit.cli.main import main
from lorakit.errors import Interrupted, StorageError
from lorakit.training.recipe import train

pytestmark = pytest.mark.usefixtures("one_thread")


class TestBest:
    def keys(self, settings: dict[str, Any], data: Path) -> dict[str, Any]:
        """No answer is ever right: the first evaluation stays the best."""
        return settings | {
            "eval_dataset": str(data), "eval_steps": 1, "eval_delay": 2, "predict_with_generate": True,
            "max_new_tokens": 1, "metric_for_best_model": "exact_match", "load_best_model_at_end": True,
            "save_total_limit": 1, "save_steps": 1, "max_steps": 20, "early_stopping_steps": 3,
        }  # fmt: skip

    def test_it_is_kept_and_is_the_result(self, settings: dict[str, Any], run: Path, data: Path) -> None:
        result = train(self.keys(settings, data))
        assert steps(run) == [5, 2]  # the newest, and the best
        best = (run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
        assert (result.adapter / "adapter_model.safetensors").read_bytes() == best
        assert (run / "checkpoint-5" / "adapter_model.safetensors").read_bytes() != best
        assert "stopping at update 5: no better value for 3 evaluations, best at 2" in notes(run)

    def test_a_best_that_was_lost_costs_no_run(self, settings: dict[str, Any], run: Path, data: Path) -> None:
        def lose(ids: object) -> None:
            shutil.rmtree(run / "checkpoint-2", ignore_errors=True)

        with at_pass(9, lose):  # in the fifth update
            result = train(self.keys(settings, data))
        newest = (run / "checkpoint-5" / "adapter_model.safetensors").read_bytes()
        assert (result.adapter / "adapter_model.safetensors").read_bytes() == newest
        assert any(note.startswith("WARNING: the best checkpoint cannot be used") for note in notes(run))


class TestStages:
    def keys(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | {
            "unfreeze_after": 0.5, "unfreeze_learning_rate": 0.001, "save_steps": 1, "lora_dropout": 0.1,
            "lr_scheduler_type": "constant",
        }  # fmt: skip

    def test_the_base_trains_from_the_border_on(
        self, settings: dict[str, Any], run: Path, tiny_llama: Path
    ) -> None:
        result = train(self.keys(settings))
        assert notes(run) == ["second stage: the base trains, too, at 0.1 times the learning rate"]
        first, second, third = (read_snapshot(run / f"checkpoint-{step}") for step in (3, 4, 6))
        adapters = set(weights(first))
        assert all(".adapters." in name for name in adapters)
        base = {name: t for name, t in weights(second).items() if name not in adapters}
        start = dict(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).named_parameters())
        assert len(base) == len(start) > 10
        for name, tensor in base.items():
            plain = name.removeprefix("model/").replace(".base.", ".")
            moved = (tensor - start[plain]).abs().max()
            assert 0 < moved <= 0.0011, name  # one step of Adam at 0.001
            assert not torch.equal(tensor, third.tensors[name])

        assert result.adapter == run / "model"
        assert not (run / "adapter").exists()
        model, info = AutoModelForCausalLM.from_pretrained(
            run / "model", dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values())
        found, A_B = dict(model.named_parameters()), weights(third)
        for path in {n.split(".adapters.")[0] for n in A_B if ".adapters." in n}:
            A, B = (A_B[f"{path}.adapters.default.lora_{part}"] for part in "AB")
            merged = A_B[f"{path}.base.weight"] + 2.0 * B @ A
            torch.testing.assert_close(
                found[path.removeprefix("model/") + ".weight"], merged, rtol=1e-5, atol=1e-6
            )

    @pytest.mark.parametrize("step", [2, 3, 4])
    def test_going_on_across_the_border(
        self, settings: dict[str, Any], run: Path, tmp_path: Path, step: int
    ) -> None:
        keys = self.keys(settings)
        train(keys)
        other = tmp_path / "other"
        shutil.copytree(run, other)
        shutil.rmtree(other / "model")
        train(keys | {"output_dir": str(other)}, resume=other / f"checkpoint-{step}")
        ends = [read_snapshot(folder / "checkpoint-6") for folder in (run, other)]
        assert same(ends[0].tensors, ends[1].tensors)
        weights_ = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, other)]
        assert weights_[0] == weights_[1]

    def test_stopped_in_the_second_stage(self, settings: dict[str, Any], run: Path) -> None:
        with at_pass(11, send(signal.SIGTERM)), pytest.raises(Interrupted) as caught:
            train(self.keys(settings))
        assert caught.value.exit_code == 143
        assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
        train(self.keys(settings), resume=True)
        assert (run / "model" / "config.json").is_file()


class TestGoingOnWithAnAdapter:
    def test_a_new_run_starts_from_it(self, finished: Any, tmp_path: Path) -> None:
        keys, result = finished
        new = keys | {
            "output_dir": str(tmp_path / "run"),
            "adapter_name_or_path": str(result.adapter),
            "max_steps": 1,
        }
        second = train(new)
        first = events(result.folder, "train")
        ours = events(tmp_path / "run", "train")
        assert ours[0]["loss"] < first[0]["loss"]
        assert second.before is not None and result.after is not None
        assert second.before.loss == pytest.approx(result.after.loss, rel=1e-5)
        start = load_file(result.adapter / "adapter_model.safetensors")
        end = load_file(second.adapter / "adapter_model.safetensors")
        assert start.keys() == end.keys()
        assert 0 < max((end[name] - start[name]).abs().max() for name in start) < 0.011  # one step of Adam

    def test_a_checkpoint_is_an_adapter(
        self, finished: Any, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        checkpoint = finished[1].folder / "checkpoint-4"
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        load_adapter(model, checkpoint)
        state = weights(read_snapshot(checkpoint))
        found = {f"model/{name}": p for name, p in model.named_parameters() if ".adapters." in name}
        assert len(adapter_layers(model)) == 14 and same({k: v.detach() for k, v in found.items()}, state)
        assert main(["generate", str(checkpoint), "12", "--max-new-tokens", "2"]) == 0
        assert main(["merge", str(checkpoint), str(tmp_path / "merged")]) == 0
        new = finished[0] | {
            "output_dir": str(tmp_path / "run"),
            "adapter_name_or_path": str(checkpoint),
            "max_steps": 1,
        }
        train(new)


class TestFallback:
    """The disk of output_dir goes away in the middle of a run."""

    def test_the_state_is_saved_elsewhere_and_goes_on_from_there(
        self, settings: dict[str, Any], run: Path, tmp_path: Path
    ) -> None:
        whole = train(settings | {"output_dir": str(tmp_path / "whole")})
        keys = settings | {"save_fallback_dir": str(tmp_path / "spare")}
        away, spare = tmp_path / "away", tmp_path / "spare" / run.name
        lost, stopped = at_pass(6, lambda ids: run.rename(away)), at_pass(11, send(signal.SIGTERM))
        with lost, stopped, pytest.raises((Interrupted, StorageError)):
            train(keys)
        assert steps(away) == [2]
        assert steps(spare) == [4]
        assert any(f"the checkpoint is {spare / 'checkpoint-4'}" in note for note in notes(away))
        shutil.rmtree(run, ignore_errors=True)
        away.rename(run)
        shutil.copytree(spare / "checkpoint-4", run / "checkpoint-4")
        resumed = train(keys, resume=True)
        assert "going on after update 4" in " ".join(notes(run))
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()

    def test_what_another_run_left_there_stays(
        self, settings: dict[str, Any], run: Path, tmp_path: Path
    ) -> None:
        taken = tmp_path / "spare" / run.name / "checkpoint-4"
        taken.mkdir(parents=True)
        (taken / "mine").write_text("kept")
        away = tmp_path / "away"
        with at_pass(6, lambda ids: run.rename(away)), pytest.raises(StorageError):
            train(settings | {"save_fallback_dir": str(tmp_path / "spare"), "on_save_error": "stop"})
        assert [path.name for path in taken.iterdir()] == ["mine"]
        assert any("another run's" in note for note in notes(away))
