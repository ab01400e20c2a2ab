"""Each rule of the doctor: a real run that has the symptom is found out, a healthy one is left alone.

The rows are of one easy pattern, which the tiny model learns in a hundred updates. What is wrong with a run is
wrong with its settings, its rows or its model; nothing is written into its files, where not said otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import at_pass, send, write_rows

from lorakit.config.load import load_mapping
from lorakit.config.resolve import resolve
from lorakit.data.store import StoredRows
from lorakit.doctor.evidence import Evidence, gather
from lorakit.doctor.finding import Diagnosis
from lorakit.doctor.rules import RULES, diagnose
from lorakit.errors import DivergedError, MemoryLimitError
from lorakit.planning.plan import plan
from lorakit.training.recipe import train

pytestmark = pytest.mark.usefixtures("one_thread")

ANIMALS = ("dog", "fox", "cat", "owl", "bee", "ant")
Settings = dict[str, Any]
Train = Callable[..., Path]


def easy(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    pairs = [(rng.choice(ANIMALS), rng.randint(1, 9)) for _ in range(count)]
    return [{"instruction": f"{a} {n}", "output": f"{n} {a}s jump over the lazy {a}"} for a, n in pairs]


def letters(count: int, seed: int) -> list[dict[str, str]]:
    """Rows that can only be learned by heart."""
    rng = random.Random(seed)
    return [
        {"instruction": str(rng.randint(1, 999)), "output": "".join(rng.choices("abcdefghij", k=12))}
        for _ in range(count)
    ]


def odd(count: int, seed: int) -> list[dict[str, str]]:
    """Easy rows but one."""
    return [*easy(count - 1, seed), {"instruction": "dog 3", "output": "~^|{}<>@#$%&!?~^|{}<>@#$%&!?" * 2}]


def half_marked(count: int, seed: int) -> list[dict[str, Any]]:
    """Two of three answers are marked as not to be trained."""
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"], "weight": int(i % 3 == 0)},
            ]
        }
        for i, row in enumerate(easy(count, seed))
    ]


def uneven(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"instruction": rng.choice(ANIMALS), "output": "dog " * (1 if rng.random() < 0.8 else 60)}
        for _ in range(count)
    ]


def documents(count: int, seed: int) -> list[dict[str, str]]:
    """Long prompts, short answers."""
    return [
        {"instruction": "the quick brown fox " * 40, "output": row["output"][:1]} for row in easy(count, seed)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def models(folder: Path, tiny_llama: Path) -> dict[str, Path]:
    """Models besides the tiny Llama: one whose second block's attention leads nowhere, one that is padded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    llama = AutoModelForCausalLM.from_pretrained(tiny_llama)
    llama.model.layers[1].self_attn.o_proj.weight.data.zero_()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=64, n_layer=2, n_head=4, **ends)
        )
    for name, model in (("cut off", llama), ("gpt2", gpt2)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"tiny": tiny_llama, "cut off": folder / "cut off", "gpt2": folder / "gpt2"}


@pytest.fixture(scope="module")
def trained(folder: Path, models: dict[str, Path]) -> Train:
    """``trained(name, model=…, rows=…, held_out=…, **settings)``: the folder of a run, which may fail."""

    def run(
        name: str,
        model: str = "tiny",
        rows: list[dict[str, Any]] | None = None,
        held_out: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> Path:
        write_rows(folder / f"{name}.jsonl", rows or easy(96, 1))
        write_rows(folder / f"{name}-test.jsonl", held_out or easy(12, 2))
        keys: Settings = {
            "model_name_or_path": str(models[model]), "dataset": str(folder / f"{name}.jsonl"),
            "eval_dataset": str(folder / f"{name}-test.jsonl"), "eval_on_start": True,
            "tokenized_path": str(folder / "encoded"), "output_dir": str(folder / f"{name}-run"),
            "lora_rank": 8, "learning_rate": 0.01, "warmup_ratio": 0.1, "max_steps": 20, "logging_steps": 1,
            "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "plot_loss": False,
            "preprocessing_num_workers": 1, "save_strategy": "no",
        }  # fmt: skip
        with contextlib.suppress(DivergedError, MemoryLimitError):
            train(keys | settings)
        return folder / f"{name}-run"

    return run


@pytest.fixture(scope="module")
def healthy(trained: Train, single_thread: Callable[[], contextlib.AbstractContextManager[None]]) -> Path:
    with single_thread():
        return trained("healthy", max_steps=80, logging_steps=2)


def check_lines(diagnosis: Diagnosis, evidence: Evidence) -> None:
    """Every proposed line is one that the configuration takes, in place of what stands there."""
    known = {key: value for key, value in evidence.settings.items() if value is not None}
    for finding in diagnosis.findings:
        assert finding.remedies or finding.rule == "dead-adapters", finding.rule
        for line in finding.remedies:
            settings = resolve(load_mapping(known, Path.cwd(), line.split()))
            for change in line.split():
                key, _, value = change.partition("=")
                assert settings.origins[key].startswith("command line"), change
                assert key == "resume_from_checkpoint" or dict(settings)[key] != evidence.settings[key], change
                assert value


def examined(run: Path, rule: str) -> tuple[Diagnosis, Evidence]:
    evidence = gather(run)
    diagnosis = diagnose(evidence)
    check_lines(diagnosis, evidence)
    assert rule in {finding.rule for finding in diagnosis.findings}, diagnosis
    return diagnosis, evidence


# rule -> severity, exit code, what is wrong
SYMPTOMS: dict[str, tuple[str, int, Settings]] = {
    "flat-loss": ("severe", 5, {"learning_rate": 1e-9, "max_steps": 30}),
    "rate-too-low": ("warning", 0, {"learning_rate": 3e-4, "max_steps": 40}),
    "underfitting": ("warning", 0, {"learning_rate": 3e-3, "max_steps": 24}),
    "overfitting": (
        "warning",
        0,
        {"rows": letters(12, 3), "held_out": letters(12, 4), "eval_steps": 20, "max_steps": 60},
    ),
    "spikes": ("warning", 0, {"rows": odd(96, 1), "per_device_train_batch_size": 2, "max_steps": 96}),
    "clipping": ("warning", 0, {"max_grad_norm": 0.01}),
    "rough": (
        "warning",
        0,
        {
            "rows": uneven(96, 1),
            "held_out": uneven(12, 2),
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 1,
            "max_steps": 50,
        },
    ),
    "not-finite": ("severe", 5, {"lora_alpha": 1e36, "learning_rate": 1.0, "warmup_ratio": 0.0}),
    "exploding-norms": ("severe", 4, {"learning_rate": 0.3}),
    "dead-adapters": ("warning", 0, {"model": "cut off", "lora_target": "q_proj,v_proj"}),
    "rank-too-large": ("hint", 0, {"lora_rank": 64, "max_steps": 40}),
    "rank-saturated": (
        "warning",
        0,
        {"lora_rank": 1, "lora_target": "q_proj,v_proj", "learning_rate": 0.02, "max_steps": 150},
    ),
    "truncation": ("warning", 0, {"cutoff_len": 24}),
    "masked-rows": ("severe", 3, {"rows": half_marked(96, 1)}),
    "little-loss": ("hint", 0, {"rows": documents(8, 1), "max_steps": 4}),
    "padding": ("hint", 0, {"model": "gpt2", "rows": uneven(60, 1), "max_steps": 4}),
    "small-passes": (
        "hint",
        0,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 6},
    ),
    "needless-checkpointing": ("hint", 0, {"gradient_checkpointing": True, "max_steps": 4}),
}


@pytest.mark.parametrize("rule", SYMPTOMS)
def test_symptom(rule: str, trained: Train) -> None:
    severity, exit_code, settings = SYMPTOMS[rule]
    diagnosis, _ = examined(trained(rule, **settings), rule)
    (finding,) = (finding for finding in diagnosis.findings if finding.rule == rule)
    assert finding.severity == severity
    assert diagnosis.exit_code == exit_code
    assert finding.evidence and all(value == value for value in finding.evidence.values())  # no NaN


def test_a_healthy_run_has_no_finding(healthy: Path) -> None:
    diagnosis = diagnose(gather(healthy))
    assert diagnosis.findings == ()
    assert diagnosis.exit_code == 0
    assert diagnosis.skipped == {}
    assert set(diagnosis.checked) == {rule.name for rule in RULES}


def test_a_healthy_run_of_a_model_that_is_padded(trained: Train) -> None:
    run = trained("healthy-gpt2", model="gpt2", max_steps=80, logging_steps=2)
    assert diagnose(gather(run)).findings == ()


class TestOnTopOfWhatWasLearned:
    """Runs that go on with the healthy adapter, so that there is something to lose."""

    def test_running_away(self, healthy: Path, trained: Train) -> None:
        run = trained(
            "away", adapter_name_or_path=str(healthy / "adapter"), learning_rate=0.5, max_steps=30,
            lr_scheduler_type="constant",
        )  # fmt: skip
        diagnosis, _ = examined(run, "running-away")
        assert diagnosis.exit_code == 5
        rates = [line for f in diagnosis.findings for line in f.remedies if line.startswith("learning_rate")]
        assert rates and all(float(r.split()[0].partition("=")[2]) < 0.5 for r in rates)  # nobody asks for more

    def test_rate_too_high(self, healthy: Path, trained: Train) -> None:
        run = trained(
            "high", adapter_name_or_path=str(healthy / "adapter"), learning_rate=0.02, max_steps=60,
            warmup_ratio=0.0,
        )  # fmt: skip
        examined(run, "rate-too-high")

    def test_poor(self, healthy: Path, trained: Train) -> None:
        run = trained("poor", adapter_name_or_path=str(healthy / "adapter"), learning_rate=1e-6, max_steps=16)
        diagnosis, _ = examined(run, "poor")
        assert diagnosis.exit_code == 0

    def test_worse_than_before(self, healthy: Path, trained: Train) -> None:
        run = trained("worse", adapter_name_or_path=str(healthy / "adapter"), rows=letters(12, 3), max_steps=40)
        diagnosis, _ = examined(run, "overfitting")
        assert diagnosis.findings[0].severity == "severe"
        assert diagnosis.exit_code == 5


class TestMemory:
    @staticmethod
    def too_much(most: int) -> Callable[[torch.Tensor], None]:
        """Really ask torch's allocator for a petabyte if a pass has more than ``most`` tokens."""
        return lambda ids: torch.empty(2**50) if ids.numel() > most else None

    def test_divided(self, trained: Train) -> None:
        with at_pass(0, self.too_much(60)):
            run = trained("divided", max_steps=4)
        diagnosis, _ = examined(run, "out-of-memory")
        assert diagnosis.exit_code == 0

    def test_ended(self, trained: Train) -> None:
        with at_pass(0, self.too_much(10)):
            run = trained("ended")
        diagnosis, evidence = examined(run, "out-of-memory")
        assert diagnosis.exit_code == 7
        assert not (run / "run.json").exists() and evidence.adapter is None
        assert "dead-adapters" in diagnosis.skipped and "killed" in diagnosis.checked

    def test_head_room(self, healthy: Path, folder: Path) -> None:
        """Filling this machine's memory would disturb others: the limit in the record is lowered instead."""
        run = folder / "tight"
        shutil.copytree(healthy, run)
        record = json.loads((run / "run.json").read_text())
        record["environment"]["memory_limit_gb"] = 1.05 * record["environment"]["peak_memory_gb"]
        (run / "run.json").write_text(json.dumps(record))
        (finding,) = examined(run, "head-room")[0].findings
        assert finding.evidence["limit_gb"] == pytest.approx(1.05 * float(finding.evidence["peak_gb"]))
        assert "rank is a weak lever" in finding.advice

    def test_killed(self, trained: Train, folder: Path) -> None:
        child = os.fork()
        if not child:
            with at_pass(8, send(signal.SIGKILL)):
                trained("killed")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        (finding,) = examined(folder / "killed-run", "killed")[0].findings
        assert finding.rule == "killed"


class TestTime:
    def test_slow_data(self, trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each row takes as long as from a disk far away."""
        read = StoredRows._row

        def slowly(rows: StoredRows, number: int) -> Any:
            time.sleep(0.02)
            return read(rows, number)

        monkeypatch.setattr(StoredRows, "_row", slowly)
        run = trained("slow-data", max_steps=8, eval_on_start=False, eval_dataset=None)
        examined(run, "slow-data")

    def test_wide_numbers(self, trained: Train) -> None:
        run = trained("wide", bf16=False, max_steps=4)
        evidence = gather(run)
        if evidence.environment["best_precision"] == "bf16":
            examined(run, "wide-numbers")
        else:
            assert "wide-numbers" not in {finding.rule for finding in diagnose(evidence).findings}

    def test_slow(self, healthy: Path) -> None:
        """What the plan expects is a matter of the machine: a larger model's, at a measured rate, is put in."""
        evidence = gather(healthy)
        larger = plan(healthy / "config.resolved.yaml", model="gpt2", gflops=1e7)
        rates = replace(larger.time.rates, threads=1)
        larger = replace(larger, time=replace(larger.time, rates=rates), without_checkpointing=0)
        (finding,) = diagnose(replace(evidence, plan=larger)).findings
        assert finding.rule == "slow"
        assert diagnose(replace(evidence, plan=None)).findings == ()


def test_damaged(healthy: Path, folder: Path) -> None:
    run = folder / "damaged"
    shutil.copytree(healthy, run)
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    diagnosis, _ = examined(run, "damaged")
    assert diagnosis.exit_code == 4


def test_a_diagnosis_does_not_wait_for_transformers(healthy: Path) -> None:
    code = (
        "import sys; from lorakit.cli.main import main; status = main(['doctor', sys.argv[1]])\n"
        "print(status, {'torch', 'transformers'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(healthy)], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "0 {'torch'}\n"  # the adapter's singular values


def test_every_rule_has_a_symptom() -> None:
    own = {"running-away", "rate-too-high", "poor", "out-of-memory", "head-room", "killed", "slow-data"}
    own |= {"wide-numbers", "slow", "damaged"}
    assert own | SYMPTOMS.keys() == {rule.name for rule in RULES}


def test_every_row_of_the_troubleshooting_tables_has_a_rule() -> None:
    """As docs/doctor.md says. D13, looking at the machine, is `lorakit env` (tests/unit/test_doctor.py)."""
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    covered: set[str] = set()
    for rule in RULES:
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{rule.name}` |"))
        told, written = (set(re.findall(r"\bD\d\d\b", text)) for text in (rule.check.__doc__ or "", line))
        assert told <= written, rule.name
        covered |= written
    assert covered == {f"D{n:02}" for n in range(1, 13)}
