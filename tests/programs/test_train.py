"""Training as a user starts it: one finished run, runs that repeat it, every way to fail or to stop."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from running import ROWS, STEPS, Call, events, everything, settings_of, small_run, start

from lorakit.files import sha256_file

TRAIN_FIELDS = {
    "event", "step", "steps", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
    "data_seconds", "memory_gb", "seconds",
}  # fmt: skip
EVAL_FIELDS = {"event", "step", "seconds", "rows", "loss", "perplexity", "exact_match", "field_f1"}


class TestRun:
    def test_what_the_user_sees(self, run: Path, finished: tuple[int, str, str]) -> None:
        _, out, err = finished
        scores, paths = out.split("\n\n")
        assert [line.split("  ")[0] for line in scores.splitlines()] == [
            "4 held-out rows", "Exact match", "Field F1", "Loss", "Perplexity",
        ]  # fmt: skip
        assert paths.splitlines() == [
            f"adapter  {run}/adapter",
            f"report   {run}/report.html",
            f'next     lorakit generate {run} "your prompt"',
        ]
        assert "Traceback" not in err and "Warning" not in err
        assert err.count(f"/{STEPS}  loss ") == STEPS / 5
        assert re.search(
            r"^4 rows, \d+ tokens \(\d+ with loss\), longest \d+; truncated 0, dropped 0$", err, re.M
        )

    def test_the_files(self, run: Path) -> None:
        assert {path.name for path in run.iterdir()} == {
            "config.resolved.yaml", "metrics.jsonl", "run.json", "report.html", "adapter",
            "checkpoint-25", "checkpoint-50", "checkpoint-60",
        }  # fmt: skip
        saved = {"adapter_config.json", "adapter_model.safetensors", "lorakit.json", "chat_template.jinja"}
        assert {path.name for path in (run / "adapter").iterdir()} == saved | {"README.md"}
        state = {"state.safetensors", "state.json", "manifest.json", "config.resolved.yaml"}
        assert {path.name for path in (run / "checkpoint-25").iterdir()} == saved | state

    def test_the_metrics(self, run: Path) -> None:
        train = events(run, "train")
        assert all(event.keys() == TRAIN_FIELDS for event in train)
        assert [event["step"] for event in train] == list(range(5, STEPS + 1, 5))
        assert {event["steps"] for event in train} == {STEPS}
        assert train[-1]["epoch"] == STEPS  # four rows make one update
        record = json.loads((run / "run.json").read_text())
        assert train[-1]["tokens"] == STEPS * record["data"]["train"]["tokens"]
        # Six updates of warm-up, then down to zero: step 5 used 4/6 of the peak, step 60 1/54.
        assert train[0]["learning_rate"] == pytest.approx(0.02 * 4 / 6)
        assert train[-1]["learning_rate"] == pytest.approx(0.02 / 54)

    def test_it_learns_the_rows_by_heart(self, run: Path) -> None:
        train, (before, after) = events(run, "train"), events(run, "eval")
        assert train[0]["loss"] > 2
        assert train[-1]["loss"] < 0.1
        assert before.keys() == after.keys() == EVAL_FIELDS
        assert (before["step"], after["step"]) == (0, STEPS)
        assert before["loss"] > 4 > 0.1 > after["loss"]
        assert (before["exact_match"], before["field_f1"]) == (0.0, 0.0)
        assert (after["exact_match"], after["field_f1"]) == (1.0, 1.0)

    def test_the_record(self, run: Path, model_folder: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["base_unchanged"] is True
        assert (record["model"]["name"], record["model"]["kind"]) == (str(model_folder), "folder")
        assert record["data"]["train"]["rows"] == record["data"]["eval"]["rows"] == len(ROWS)
        # Hidden 64, two of four heads for k and v, 128 in between; r (in + out) a module, two layers.
        sides = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64), "gate": (64, 128), "up": (64, 128)}
        expected = 2 * 16 * sum(a + b for a, b in [*sides.values(), (128, 64)])
        assert record["adapter"]["trainable"] == expected
        assert sum(target["parameters"] for target in record["adapter"]["targets"]) == expected
        assert [(s["reference"], s["after"]) for s in record["samples"]] == [(a, a) for _, a in ROWS]
        assert record["environment"]["torch"] == torch.__version__

    def test_the_model_card(self, run: Path) -> None:
        text = (run / "adapter" / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        matter = YAML(typ="safe", pure=True).load(front)
        assert (matter["library_name"], matter["pipeline_tag"]) == ("peft", "text-generation")
        assert "lora" in matter["tags"]
        assert body.lstrip().startswith("# LoRA adapter for")
        assert "exact match" in body.lower()

    def test_the_report_needs_nothing_from_elsewhere(self, run: Path) -> None:
        page = (run / "report.html").read_text()
        assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
        assert page.rstrip().endswith("</html>")
        assert page.count("<svg") >= 2
        assert not re.search(r"<(script|link|iframe|img|object|embed|base)\b", page, re.I)
        assert not re.search(r"@import|url\((?!#)|\b(src|href|action)\s*=\s*[\"']?(https?:)?//", page, re.I)
        assert "Springfield" in page

    def test_the_resolved_configuration_names_origins(self, run: Path, folder: Path) -> None:
        text = (run / "config.resolved.yaml").read_text()
        assert re.search(r"^lora_alpha: 32\.0 +# derived: 2 × lora_rank$", text, re.M)
        assert re.search(r"^seed: 42 +# default$", text, re.M)
        assert re.search(r"^lora_rank: 16 +# .*config\.yaml:8", text, re.M)
        assert settings_of(run)["dataset"] == [str(folder / "train.jsonl")]


class TestAgain:
    def test_the_resolved_configuration_makes_the_very_same_adapter(
        self, run: Path, lorakit: Call, tmp_path: Path
    ) -> None:
        status, _, err = lorakit("train", run / "config.resolved.yaml", f"output_dir={tmp_path / 'two'}")
        assert status == 0, err
        weights = "adapter/adapter_model.safetensors"
        assert sha256_file(tmp_path / "two" / weights) == sha256_file(run / weights)
        for kind in ("train", "eval"):
            keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "exact_match"}
            first, second = (
                [{k: v for k, v in event.items() if k in keys} for event in events(path, kind)]
                for path in (run, tmp_path / "two")
            )
            assert first == second
        changed = {
            key for key, value in settings_of(tmp_path / "two").items() if value != settings_of(run)[key]
        }
        assert changed == {"output_dir"}

    def test_a_second_run_does_not_mix_with_the_first(self, run: Path, folder: Path, lorakit: Call) -> None:
        before = everything(run)
        status, out, err = lorakit("train", folder / "config.yaml")
        assert (status, out) == (8, "")
        assert f"error[E-CONFLICT]: the results of another run are in {run}" in err
        assert "overwrite_output_dir: true" in err
        assert everything(run) == before

    def test_overrides_win_and_are_named(self, folder: Path, lorakit: Call, tmp_path: Path) -> None:
        small = small_run(folder, tmp_path / "out", "lora_rank=2", "lora_target=q_proj, v_proj", "seed=7")
        status, out, err = lorakit(*small, "--json")
        assert status == 0, err
        result = json.loads(out)
        assert result["adapter"] == str(tmp_path / "out" / "adapter")
        assert (result["before"], result["after"]) == (None, None)
        config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 4.0)
        assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
        text = (tmp_path / "out" / "config.resolved.yaml").read_text()
        assert re.search(r"^seed: 7 +# command line", text, re.M)

    def test_overwriting_replaces_the_old_results_only(
        self, folder: Path, lorakit: Call, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        assert lorakit(*small_run(folder, out, "save_strategy=steps", "save_steps=1"))[0] == 0
        assert (out / "checkpoint-1").is_dir()
        (out / "notes.txt").write_text("mine")
        assert lorakit(*small_run(folder, out, "overwrite_output_dir=true"))[0] == 0
        assert not (out / "checkpoint-1").exists()
        assert (out / "notes.txt").read_text() == "mine"
        assert [event["step"] for event in events(out, "train")] == [1, 2]

    def test_recomputing_activations_changes_no_loss(self, folder: Path, lorakit: Call, tmp_path: Path) -> None:
        losses = {}
        for value in ("true", "false"):
            out = tmp_path / value
            more = (f"gradient_checkpointing={value}", "max_steps=4", "lora_dropout=0.1")
            assert lorakit(*small_run(folder, out, *more))[0] == 0
            losses[value] = [event["loss"] for event in events(out, "train")]
        assert losses["true"] == pytest.approx(losses["false"], rel=1e-6)
        assert len(losses["true"]) == 4

    def test_other_precisions_learn_alike(self, folder: Path, lorakit: Call, tmp_path: Path) -> None:
        from lorakit import hardware

        if not hardware.supports("bf16"):
            pytest.skip("no bf16 arithmetic here")
        losses = {}
        for value in ("true", "false"):
            out = tmp_path / value
            assert lorakit(*small_run(folder, out, f"bf16={value}", "max_steps=10"))[0] == 0
            losses[value] = [event["loss"] for event in events(out, "train")]
        assert losses["true"][:3] == pytest.approx(losses["false"][:3], rel=0.05)
        assert losses["true"] != losses["false"]
        assert max(losses["true"][-1], losses["false"][-1]) < 0.1 * losses["true"][0]


class TestBatches:
    @pytest.mark.parametrize(
        "keys",
        [
            ("packing=true", "cutoff_len=256"),
            ("group_by_length=true",),
            ("max_tokens_per_batch=512", "cutoff_len=256"),
        ],
    )
    def test_rows_can_be_grouped_in_other_ways(
        self, keys: tuple[str, ...], folder: Path, lorakit: Call, tmp_path: Path
    ) -> None:
        status, _, err = lorakit(
            *small_run(folder, tmp_path / "out", "max_steps=null", "num_train_epochs=2", *keys)
        )
        assert status == 0, err
        logged = events(tmp_path / "out", "train")
        assert (logged[-1]["epoch"], logged[-1]["step"]) == (2.0, logged[-1]["steps"])
        tokens = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train"]["tokens"]
        assert logged[-1]["tokens"] == 2 * tokens  # every row once an epoch

    def test_rows_are_encoded_once(self, folder: Path, lorakit: Call, tmp_path: Path) -> None:
        cache = f"tokenized_path={tmp_path / 'rows'}"
        first, second, other = (small_run(folder, tmp_path / name, cache) for name in ("1", "2", "3"))
        found = "encoded rows are in the cache"
        assert found not in lorakit(*first)[2]
        assert found in lorakit(*second)[2]
        assert found not in lorakit(*other, "cutoff_len=64")[2]
        assert found not in lorakit(*other, "overwrite_cache=true", "overwrite_output_dir=true")[2]
        assert events(tmp_path / "1", "train")[-1]["loss"] == events(tmp_path / "2", "train")[-1]["loss"]


class TestDryRun:
    def test_it_prints_the_values_and_writes_nothing(self, folder: Path, lorakit: Call, tmp_path: Path) -> None:
        before = everything(folder)
        status, out, _ = lorakit("train", folder / "config.yaml", "--dry-run", f"output_dir={tmp_path}/new")
        assert status == 0
        values = YAML(typ="safe", pure=True).load(out)
        assert (values["lora_alpha"], values["output_dir"]) == (32.0, f"{tmp_path}/new")
        assert all(re.search(r" # \S", line) for line in out.splitlines())
        assert not (tmp_path / "new").exists()
        assert everything(folder) == before

    def test_it_is_what_validate_prints(self, folder: Path, lorakit: Call) -> None:
        dry = lorakit("train", folder / "config.yaml", "--dry-run")
        assert lorakit("validate", folder / "config.yaml") == dry
        _, out, _ = lorakit("validate", folder / "config.yaml", "--json")
        found = json.loads(out)
        assert (found["lora_rank"], found["origins"]["seed"]) == (16, "default")


FAILURES: dict[str, tuple[tuple[str, ...], int, str, tuple[str, ...]]] = {
    # name: (overrides, exit code, code, words)
    "unknown key": (("lora_rnak=4",), 2, "E-CONFIG", ("lora_rnak", "did you mean `lora_rank`?")),
    "value out of range": (("lora_rank=0",), 2, "E-CONFIG", ("lora_rank",)),
    "no model folder": (("model_name_or_path=./missing",), 2, "E-CONFIG", ("there is no model at",)),
    "no data": (("dataset=tran.jsonl",), 3, "E-DATA", ("no such file or folder", "tran.jsonl", "train.jsonl")),
    "broken data": (("dataset=broken.jsonl",), 3, "E-DATA", ("not JSON", "broken.jsonl:2")),
    "nothing to learn": (
        ("cutoff_len=16", "long_rows=drop"),
        3,
        "E-DATA",
        ("no row is left", "raise cutoff_len"),
    ),
    "an empty model folder": (("model_name_or_path=empty/",), 4, "E-MODEL", ("empty",)),
    "unknown target": (("lora_target=q_prj",), 4, "E-TARGET", ("q_prj", "q_proj")),
    "diverging": (("lora_alpha=1e30", "learning_rate=1"), 5, "E-DIVERGED", ("nothing was updated",)),
    "no folder to write to": (("output_dir=train.jsonl",), 6, "E-STORAGE", ("train.jsonl",)),
}


class TestFailures:
    @pytest.fixture
    def broken(self, folder: Path, tmp_path: Path) -> Path:
        copy = tmp_path / "user"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("runs"))
        good = json.dumps({"instruction": "a", "output": "b"})
        (copy / "broken.jsonl").write_text(f'{good}\n{{"instruction": \n{good}\n')
        (copy / "empty").mkdir()
        return copy

    @pytest.mark.parametrize("name", FAILURES)
    def test_each_has_its_exit_code_and_says_why(
        self, name: str, broken: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        overrides, expected, code, words = FAILURES[name]
        monkeypatch.chdir(broken)  # relative paths of overrides start here
        status, out, err = lorakit(*small_run(broken, broken / "out", *overrides))
        assert (status, out) == (expected, ""), err
        assert f"error[{code}]: " in err
        assert [word for word in words if word not in err] == [], err

    def test_all_codes_a_run_can_end_with_are_tried(self) -> None:
        assert {status for _, status, _, _ in FAILURES.values()} == {2, 3, 4, 5, 6}  # 8, 130, 143: elsewhere

    def test_the_error_as_json(self, broken: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(broken)
        _, out, err = lorakit(*small_run(broken, broken / "out", "dataset=broken.jsonl"), "--json")
        assert out == ""
        found = json.loads(err.splitlines()[-1])
        assert (found["code"], found["place"]) == ("E-DATA", f"{broken}/broken.jsonl:2 (byte 53)")

    def test_bad_yaml(self, tmp_path: Path, lorakit: Call) -> None:
        (tmp_path / "config.yaml").write_text("model_name_or_path: [x\nseed: 1\n")
        status, _, err = lorakit("train", tmp_path / "config.yaml")
        assert status == 2
        assert "config.yaml:" in err and "error[E-CONFIG]" in err
        assert lorakit("train", tmp_path / "missing.yaml")[0] == 2

    def test_a_mistake_costs_no_earlier_results(self, broken: Path, lorakit: Call) -> None:
        assert lorakit(*small_run(broken, broken / "out"))[0] == 0
        before = everything(broken / "out")
        for mistakes in (["lora_target=q_prj"], ["cutoff_len=16", "long_rows=drop"]):
            status, _, _ = lorakit(*small_run(broken, broken / "out", "overwrite_output_dir=true", *mistakes))
            assert status in {3, 4}
        assert everything(broken / "out") == before

    def test_a_mistake_put_right_trains(self, broken: Path, lorakit: Call) -> None:
        assert lorakit(*small_run(broken, broken / "out", "lora_target=q_prj"))[0] == 4
        assert lorakit(*small_run(broken, broken / "out", "lora_target=q_proj"))[0] == 0


class TestStopping:
    @pytest.fixture(scope="class")
    def stopped(
        self, folder: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[dict[signal.Signals, tuple[Path, int, str, str]]]:
        """Two endless runs, stopped in the middle by SIGINT and by SIGTERM."""
        outs = {s: tmp_path_factory.mktemp(s.name) / "run" for s in (signal.SIGINT, signal.SIGTERM)}
        processes = {
            s: start(*small_run(folder, out, "max_steps=1000000", f"eval_dataset={folder}/train.jsonl"))
            for s, out in outs.items()
        }
        try:
            for signum, process in processes.items():
                wait_for_metrics(outs[signum], process)
            for signum, process in processes.items():
                process.send_signal(signum)
            ends = {s: process.communicate(timeout=60) for s, process in processes.items()}
            yield {s: (outs[s], processes[s].returncode, *ends[s]) for s in outs}
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_the_run_with_its_adapter_saved(
        self,
        stopped: dict[signal.Signals, tuple[Path, int, str, str]],
        lorakit: Call,
        signum: signal.Signals,
    ) -> None:
        out, status, stdout, err = stopped[signum]
        assert (status, stdout) == (128 + signum, ""), err
        train = events(out, "train")
        assert err.splitlines()[-2:] == [
            f"error[INTERRUPTED]: stopped by signal {signum.value}; update {len(train)} is saved in {out}",
            "  = help: go on with `lorakit train CONFIG --resume auto`",
        ]
        assert "Traceback" not in err
        assert [event["step"] for event in train] == list(range(1, len(train) + 1))
        assert events(out, "eval") == []
        assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
        assert (out / "report.html").is_file()
        card = (out / "adapter" / "README.md").read_text()
        assert "The run did not come to its end" in card
        assert lorakit("generate", out, "Hi", "--max-new-tokens", 2)[0] == 0

    def test_a_stopped_run_goes_on_as_if_it_had_not_been(
        self, folder: Path, lorakit: Call, tmp_path: Path
    ) -> None:
        """Another process takes it up, and ends with the adapter of the run that nobody stopped."""
        keys = ("max_steps=80", "lora_dropout=0.1", "per_device_train_batch_size=1")
        process = start(*small_run(folder, tmp_path / "stopped", *keys))
        wait_for_metrics(tmp_path / "stopped", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert 0 < len(events(tmp_path / "stopped", "train")) < 80
        status, _, err = lorakit(*small_run(folder, tmp_path / "stopped", *keys), "--resume", "auto")
        assert status == 0, err
        assert "R0, bit for bit as if it had never stopped" in err
        assert lorakit(*small_run(folder, tmp_path / "whole", *keys))[0] == 0
        weights = "adapter/adapter_model.safetensors"
        assert sha256_file(tmp_path / "stopped" / weights) == sha256_file(tmp_path / "whole" / weights)


def wait_for_metrics(run: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until the run has logged an update."""
    end = time.monotonic() + seconds
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
