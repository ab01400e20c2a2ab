"""Predicted against measured peak memory of whole training runs, each in a process of its own.

    .venv/bin/python benchmarks/calibration.py [--quick] [--only NAME …]

Runs differ in model, method, bits of the base, checkpointing, length, batch, targets, rank and dropout. Each
trains three updates on rows of exactly known length, all tokens of which carry loss, and reports the largest
resident set of its process; `lorakit plan` is asked for the same configuration. Models other than SmolLM2-135M
have random weights and its tokenizer. Memory does not depend on how busy the machine is. The result goes to
``results/calibration.json`` and ``results/calibration.md``: every run, and the median and the 90th percentile
of the error. ``--quick`` takes four runs and writes nothing.

Columns, in GB of 10⁹ bytes; ``error`` is predicted over measured, less one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lorakit import hardware, plan
from lorakit.files import write_json, write_text
from lorakit.modelinfo.table import config_of

DEMO = "smollm2-135m-instruct"
# Made here with random weights: a family and its shape, small enough for two cores.
MADE: dict[str, dict[str, Any]] = {
    "smollm2-360m": {},
    "qwen3-0.6b": {"num_hidden_layers": 8, "vocab_size": 49152, "hidden_size": 768},
    "gpt2": {"vocab_size": 49152},
}


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str = DEMO
    method: str = "lora"
    bits: int = 16
    checkpointing: bool = False
    length: int = 512
    batch: int = 1
    row: int = 512
    targets: str = "all"
    rank: int = 8
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """What differs from the usual."""
        parts = [
            f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return " ".join(parts) or "usual"


ATTENTION = "q_proj,k_proj,v_proj,o_proj"
CASES = (
    Case(), Case(length=1024, row=1024), Case(length=1024, row=128), Case(length=2048, row=256),
    Case(checkpointing=True), Case(length=2048, row=256, checkpointing=True),
    Case(length=1024, row=1024, checkpointing=True), Case(batch=4), Case(batch=4, checkpointing=True),
    Case(targets="q_proj,v_proj"), Case(targets=ATTENTION, rank=64), Case(rank=256), Case(dropout=0.1),
    Case(method="dora"), Case(method="dora", checkpointing=True), Case(method="adalora"),
    Case(bits=32), Case(bits=32, checkpointing=True), Case(bits=4), Case(bits=4, checkpointing=True),
    Case(bits=8), Case(bits=4, method="dora", checkpointing=True), Case(bits=4, length=1024, row=128),
    Case("smollm2-360m"), Case("smollm2-360m", bits=4, checkpointing=True),
    Case("smollm2-360m", checkpointing=True, length=1024, row=128), Case("smollm2-360m", bits=32),
    Case("qwen3-0.6b", targets=ATTENTION), Case("qwen3-0.6b", checkpointing=True), Case("gpt2", targets="all"),
    Case("gpt2", batch=4, checkpointing=True), Case("smollm2-360m", bits=8, targets=ATTENTION),
)  # fmt: skip
UPDATES = 3  # one of them may have the short row; the optimizer's memory is there from the second on
QUICK = (0, 4, 9, 17)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", help="runs by name")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: case, folder
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(Case(**json.loads(options.one[0])), Path(options.one[1]))))
        return
    cases = [CASES[i] for i in QUICK] if options.quick else CASES
    cases = [case for case in cases if not options.only or case.name in options.only]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            row = measured(case, Path(folder))
            rows.append(row)
            print(f"{row['error']:+7.1%}  {row['measured_gb']:6.2f} GB  {case.name}", flush=True)
    if not (options.quick or options.only):
        write(rows)


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Run it elsewhere, and predict it here."""
    model = str(demo() if case.model == DEMO else made(case.model, folder))
    work = Path(tempfile.mkdtemp(dir=folder))
    config = configuration(case, model, work)
    predicted = plan(config, row=case.row, bits=case.bits)
    command = [sys.executable, __file__, "--one", json.dumps({**asdict(case), "model": model}), str(work)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(work)
    total = max(predicted.memory.total, predicted.loading)
    return {
        "case": case.name,
        **asdict(case),
        "measured_gb": gigabytes(found["peak"]),
        "predicted_gb": gigabytes(total),
        "error": round(total / found["peak"] - 1, 4),
        "libraries_gb": gigabytes(found["libraries"]),
        "categories_gb": {name: gigabytes(n) for name, n in predicted.memory.categories().items()},
    }


def configuration(case: Case, model: str, work: Path) -> dict[str, Any]:
    """The keys of a run of a few updates."""
    rows = work / "rows.jsonl"
    count = UPDATES * case.batch * -(-case.length // case.row)
    long, short = (json.dumps({"instruction": "count", "output": "one two " * n}) for n in (case.row, 4))
    # The check before the first update takes the shortest row, and must not be what is measured.
    rows.write_text(f"{short}\n" + f"{long}\n" * count, encoding="utf-8")
    keys = {
        "model_name_or_path": model,
        "dataset": str(rows),
        "output_dir": str(work / "run"),
        "template": "chatml",
        "train_on_prompt": True,
        "cutoff_len": case.length if case.row == case.length else case.row,
        "per_device_train_batch_size": case.batch * (case.length // case.row),
        "gradient_accumulation_steps": 1,
        "max_steps": UPDATES,
        "lora_rank": case.rank,
        "lora_target": case.targets,
        "lora_dropout": case.dropout,
        "use_dora": case.method == "dora",
        "use_adalora": case.method == "adalora",
        "gradient_checkpointing": case.checkpointing,
    }
    if case.bits == 32:
        keys["bf16"] = False
    if case.bits < 16:
        keys["quantization_bit"] = case.bits
    return keys


def made(name: str, folder: Path) -> Path:
    """A folder with a model of random weights in bfloat16 and the demo model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lorakit.models.load import load_tokenizer
    from lorakit.models.sources import locate

    path = folder / name
    if not path.is_dir():
        known = config_of(name)
        assert known is not None
        values = {**known, **MADE[name]}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM
        model.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        load_tokenizer(locate(DEMO)).save_pretrained(path)
    return path


def demo() -> Path:
    """Its folder, so that a plan sees how wide the weights in the file are."""
    from lorakit.models.sources import locate

    path = locate(DEMO).path
    assert path is not None
    return path


def run(case: Case, work: Path) -> dict[str, int]:
    """Train, in this process."""
    from lorakit import train

    importlib.import_module("lorakit.models.load")  # torch and transformers, as every run has them
    libraries = hardware.memory_used()
    train(configuration(case, case.model, work))
    return {"peak": hardware.memory_peak(), "libraries": libraries}


def write(rows: list[dict[str, Any]]) -> None:
    """Both files."""
    errors = sorted(abs(row["error"]) for row in rows)
    summary = {
        "runs": len(rows),
        "median_error": statistics.median(errors),
        "p90_error": errors[min(len(errors) - 1, int(0.9 * len(errors)))],
        "largest_error": errors[-1],
        "processor": hardware.processor_name(),
    }
    results = Path(__file__).parent / "results"
    write_json(results / "calibration.json", {**summary, "rows": rows})
    lines = ["| run | measured GB | predicted GB | error |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['case']} | {row['measured_gb']:.2f} | {row['predicted_gb']:.2f} | {row['error']:+.1%} |"
        for row in rows
    ]
    told = f"median error {summary['median_error']:.1%}, 90th percentile {summary['p90_error']:.1%}"
    write_text(results / "calibration.md", "\n".join([*lines, "", told, ""]))


def gigabytes(count: float) -> float:
    """10⁹ bytes."""
    return round(count / 1e9, 3)


if __name__ == "__main__":
    main()
