"""The doctor besides its rules: the verb, the look at a configuration, the curve, rates, the machine."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import hardware
from lorakit.cli.main import main
from lorakit.doctor.before import Check, examine
from lorakit.doctor.curve import Curve, curve_of
from lorakit.doctor.evidence import gather
from lorakit.doctor.machine import machine, old_packages
from lorakit.doctor.rates import measure, rates
from lorakit.doctor.rules import RULES, diagnose
from lorakit.errors import ConfigError
from lorakit.planning.setup import Setup
from lorakit.planning.time import find_rates

Call = Callable[..., tuple[int, str, str]]


def curve(losses: list[float], learning_rates: list[float] | None = None) -> Curve:
    found = curve_of(range(1, len(losses) + 1), losses, learning_rates or [1.0] * len(losses))
    assert found is not None
    return found


class TestCurve:
    def test_a_straight_line(self) -> None:
        found = curve([10 - i / 10 for i in range(50)])
        change, error = found.trend
        assert change == pytest.approx(-4.9)
        assert error == pytest.approx(0, abs=1e-6)
        assert found.noise == pytest.approx(0, abs=1e-9)
        assert found.unfinished == pytest.approx(1, abs=0.15)
        assert found.spikes() == []

    def test_noise_is_its_standard_deviation(self) -> None:
        rng = random.Random(3)
        losses = [5 + rng.gauss(0, 0.2) for _ in range(4000)]
        losses[100] = 50.0  # one point moves nothing
        assert curve(losses).noise == pytest.approx(0.2, rel=0.1)

    def test_convergence_is_judged_in_the_time_of_the_schedule(self) -> None:
        """A loss that falls in proportion to the rate has not finished, however flat its end looks."""
        n = 100
        cosine = [0.5 * (1 + math.cos(math.pi * i / n)) for i in range(n)]
        done = [sum(cosine[: i + 1]) for i in range(n)]
        falling = curve([6 - 0.05 * t for t in done], cosine)
        assert falling.losses[70] - falling.losses[99] < 0.1 * (falling.start - falling.end)
        assert falling.unfinished == pytest.approx(1, abs=0.15)
        at_rest = curve([1 + 5 * math.exp(-t / 4) for t in done], cosine)
        assert at_rest.unfinished < 0.02

    def test_a_spike_is_no_steep_fall(self) -> None:
        steep = [4.0, 3.9, 1.0, *[0.9] * 12]
        assert curve(steep).spikes() == []
        assert curve([*steep[:5], 3.0, *steep[5:]]).spikes() == [6]

    def test_too_little(self) -> None:
        assert curve_of([1, 2, 3, 4], [1.0, math.nan, None, 1.0], [1.0] * 4) is None


def checks(config: Path, *overrides: str) -> dict[str, Check]:
    return {check.name: check for check in examine(config, overrides).checks}


class TestBefore:
    @pytest.fixture
    def config(self, tiny_llama: Path, tmp_path: Path) -> Path:
        rows = [{"instruction": f"dog {i}", "output": str(i * i)} for i in range(12)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "sft.yaml"
        path.write_text(f"model_name_or_path: {tiny_llama}\ndataset: rows.jsonl\noutput_dir: run\n")
        return path

    def test_all_is_well(self, config: Path) -> None:
        found = examine(config)
        assert {check.state for check in found.checks} == {"good"}, found
        assert found.exit_code == 0
        names = [check.name for check in found.checks]
        assert names == [
            "configuration",
            "machine",
            "output_dir",
            "model",
            "template",
            "data",
            "memory",
            "disk",
        ]
        assert not (config.parent / "run").exists()  # it only looks

    def test_nothing_is_left_behind(self, config: Path) -> None:
        before = sorted(path.name for path in config.parent.iterdir())
        examine(config)
        assert sorted(path.name for path in config.parent.iterdir()) == before

    def test_a_wrong_configuration(self, config: Path) -> None:
        with pytest.raises(ConfigError):
            examine(config, ["lora_rnak=8"])

    def test_memory_is_planned_for_the_rows_there_are(self, config: Path) -> None:
        """256 rows of 1,048,576 tokens would not fit; the rows have twenty."""
        found = checks(config, "cutoff_len=1048576", "per_device_train_batch_size=256")
        assert found["memory"].state == "good", found
        (length,) = (int(word) for word in found["memory"].detail.split() if word.isdigit())
        assert length < 100

    def test_memory_that_is_not_there(self, config: Path) -> None:
        found = examine(config, ["model_name_or_path=llama-3-70b", "quantization_bit=null"])
        by_name = {check.name: check for check in found.checks}
        assert by_name["model"].state == "bad" and by_name["model"].exit_code == 4
        assert "not encoded" in by_name["data"].detail
        assert by_name["memory"].state == "warning" and by_name["memory"].remedies
        assert found.exit_code == 4

    def test_data_that_are_not_there(self, config: Path) -> None:
        found = examine(config, ["dataset=nothing.jsonl"])
        by_name = {check.name: check for check in found.checks}
        assert by_name["data"].state == "bad" and found.exit_code == 3
        assert by_name["template"].state == by_name["disk"].state == "good"

    def test_rows_without_an_answer(self, config: Path) -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
        (config.parent / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        found = examine(config)
        assert found.exit_code == 3
        assert any("no row is left" in check.detail for check in found.checks)

    def test_a_folder_with_results(self, config: Path) -> None:
        (config.parent / "run" / "adapter").mkdir(parents=True)
        found = checks(config)["output_dir"]
        assert found.state == "bad" and found.exit_code == 8
        assert checks(config, found.remedies[0])["output_dir"].state == "good"
        assert checks(config, found.remedies[1])["output_dir"].state == "good"

    def test_the_verb(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", str(config), "dataset=nothing.jsonl"]) == 3
        out = capsys.readouterr().out
        assert out.count("ok  ") == 7 and "BAD      data: " in out
        assert main(["doctor", str(config), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["exit_code"] == 0 and {check["state"] for check in found["checks"]} == {"good"}


class TestVerb:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        """A run as one is found whose process was killed."""
        (tmp_path / "config.resolved.yaml").write_text(
            "model_name_or_path: nowhere/nothing\nlearning_rate: 0.001\nmax_steps: 50\nlora_rank: 8\n"
        )
        line: dict[str, Any] = {"event": "train", "steps": 50, "learning_rate": 0.001, "grad_norm": 1.0}
        points = [{**line, "step": i, "loss": 1.0 if i < 30 else 9.0, "tokens": 5000 * i} for i in range(1, 41)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
        return tmp_path

    def test_text(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", str(run)]) == 5
        out = capsys.readouterr().out
        assert out.startswith("severe[running-away]: the loss ran away and did not come back\n")
        assert "\n  + learning_rate=0.0001 warmup_ratio=0.1\n" in out
        assert "rules asked" in out and "need the run's end (run.json)" in out

    def test_json(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", str(run), "--json"]) == 5
        found = json.loads(capsys.readouterr().out)
        assert found == json.loads(json.dumps(diagnose(gather(run)).to_dict()))
        assert [finding["rule"] for finding in found["findings"]] == ["running-away", "killed"]

    def test_torch_is_not_needed_without_an_adapter(self, run: Path) -> None:
        code = (
            "import sys; from lorakit.cli.main import main; main(sys.argv[1:]); "
            "print(*{'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
        )
        command = [sys.executable, "-c", code, "doctor", str(run), "--json"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stderr == "\n"

    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", str(tmp_path)]) == 2
        assert "is not the directory of a run" in capsys.readouterr().err

    def test_a_run_takes_no_keys(self, run: Path) -> None:
        assert main(["doctor", str(run), "lora_rank=4"]) == 2


class TestMachine:
    def test_machine(self) -> None:
        found = machine()
        assert found["device"] == hardware.device()
        assert set(found["ops"]) == {
            "linear",
            "attention",
            "loss",
            "4 bits",
            "8 bits",
            "norm, gated, rotary",
            "C++ passes",
        }
        assert all(each["runs"] and each["why"] for each in found["ops"].values())
        assert 0 < found["memory_free_gb"] <= found["memory_gb"]
        assert len(found["enough_for"]) == 3
        assert set(found["instruction_sets"]) <= hardware.cpu_flags()
        assert found["peft"] and found["torch"] != "not installed"

    def test_requirements_are_met_here(self) -> None:
        assert old_packages() == []

    def test_rates(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Structure alone: how fast is a matter of the machine and of the moment."""
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
        found = measure()
        expected = {"fp32", "bf16"} | ({"int8"} if hardware.integer_products() else set())
        assert set(found.gflops) - {"fp16"} == expected
        assert all(rate > 0 for rate in found.gflops.values())
        first = rates()
        assert json.loads((tmp_path / "rates.json").read_text())["gflops"] == first.gflops
        assert rates() == first  # kept
        known = find_rates(Setup(device=hardware.device()))
        assert (known.gflops, known.threads) == (first.gflops["bf16"], first.threads)
        (tmp_path / "rates.json").write_text("{")
        assert set(rates().gflops) == set(first.gflops)

    def test_the_verb(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
        assert main(["env", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["gflops"] == json.loads((tmp_path / "rates.json").read_text())["gflops"]
        assert main(["env"]) == 0
        out = capsys.readouterr().out
        assert "GFLOP/s" in out and "what runs, and why:" in out and "enough, by common advice, for:" in out
        assert main(["env", "--fresh", "--json"]) == 0
        assert set(json.loads(capsys.readouterr().out)["gflops"]) == set(found["gflops"])


def test_the_documentation_has_every_rule() -> None:
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| (severe|warning|hint)", text, re.MULTILINE)
    assert [name for name, _ in rows] == [rule.name for rule in RULES]
    covered = set(re.findall(r"\bD\d\d\b", text))
    assert covered == {f"D{number:02}" for number in range(1, 14)}


def test_the_documented_use_of_monitor_memory(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile(program, "docs/doctor.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.fullmatch(r"0\.[34]\d GB more at the highest point, \d+ samples\n", said), said
