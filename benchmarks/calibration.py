"""Predicted against measured peak memory of whole training runs, each in a process of its own.

    .venv/bin/python benchmarks/calibration.py [--quick] [--only NAME …]

Runs differ in model, method, bits of the base, checkpointing, length, batch, targets, rank and dropout. Each
trains three updates on rows of exactly known length, all tokens of which carry loss, and reports the largest
resident set of its process while the base is loaded and, apart, while it trains; `lorakit plan` is asked for
the same configuration. Models other than SmolLM2-135M have random weights and its tokenizer. Memory does not
depend on how busy the machine is. The result goes to ``results/calibration.json`` and ``.md``: every run, and
the median and the 90th percentile of the error. ``--quick`` takes four runs and writes nothing; ``--predict``
keeps what was measured and asks the planner anew.

Sizes are bytes, in the table GB of 10⁹; ``error`` is predicted over measured, less one.
"""

from __future__ import annotations

import argparse
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
from lorakit.modelinfo.demo import DEMO_MODEL
from lorakit.modelinfo.table import config_of

# Made here with random weights: a family and its shape, small enough for two cores.
MADE: dict[str, dict[str, Any]] = {
    "smollm2-360m": {},
    "qwen3-0.6b": {"num_hidden_layers": 8, "vocab_size": 49152, "hidden_size": 768},
    "gpt2": {"vocab_size": 49152},
}


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str = DEMO_MODEL
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
RESULTS = Path(__file__).parent / "results"
UPDATES = 3  # one of them may have the short row; the optimizer's memory is there from the second on
QUICK = (0, 4, 9, 17)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", help="runs by name")
    parser.add_argument("--predict", action="store_true", help="of the runs in the result, measure nothing")
    parser.add_argument("--models", type=Path, help="folder in which models are made, and stay")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: case, folder
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(Case(**json.loads(options.one[0])), Path(options.one[1]))))
        return
    cases = [CASES[i] for i in QUICK] if options.quick else CASES
    cases = [case for case in cases if not options.only or case.name in options.only]
    known = {row["case"]: row["measured"] for row in results()} if options.predict else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            model = made(case.model, options.models or Path(folder))
            keys = configuration(case, model, Path(tempfile.mkdtemp(dir=folder)))
            row = compared(case, keys, known.get(case.name) or measured(case, model, keys))
            rows.append(row)
            print(f"{row['error']:+7.1%}  {row['measured']['training'] / 1e9:6.2f} GB  {case.name}", flush=True)
            if not (options.quick or options.only):
                write(rows)


def measured(case: Case, model: str, keys: dict[str, Any]) -> dict[str, int]:
    """Peaks of a run in a process of its own, in bytes."""
    work = Path(keys["output_dir"]).parent
    command = [sys.executable, __file__, "--one", json.dumps({**asdict(case), "model": model}), str(work)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(work)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(case: Case, keys: dict[str, Any], found: dict[str, int]) -> dict[str, Any]:
    """A row of the result: what was measured, and what is predicted now."""
    predicted = plan(keys, row=case.row, bits=case.bits)
    total = predicted.memory.total
    return {
        "case": case.name,
        **asdict(case),
        "measured": found,
        "predicted": {"training": total, "loading": predicted.loading, **predicted.memory.categories()},
        "error": round(total / found["training"] - 1, 4),
        "error_of_loading": round(predicted.loading / found["loading"] - 1, 4) if predicted.loading else None,
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


def made(name: str, folder: Path) -> str:
    """Itself, or a folder with a model of random weights in bfloat16 and the demo model's tokenizer."""
    if name not in MADE:
        return name
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
        load_tokenizer(locate(DEMO_MODEL)).save_pretrained(path)
    return str(path)


def run(case: Case, work: Path) -> dict[str, int]:
    """Train, in this process: the largest resident set until the base is loaded, and from there on."""
    from lorakit import train
    from lorakit.training import recipe

    found, share_work = {}, recipe.share_work

    def loaded(*args: Any) -> Any:
        found["loading"] = hardware.resident_peak()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
        return share_work(*args)

    recipe.share_work = loaded
    train(configuration(case, case.model, work))
    return {**found, "training": hardware.resident_peak()}


def results() -> list[dict[str, Any]]:
    """The rows of the last result."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "calibration.json").read_bytes())["rows"]
    return rows


def write(rows: list[dict[str, Any]]) -> None:
    """Both files."""
    summary: dict[str, Any] = {"runs": len(rows), "processor": hardware.processor_name()}
    for name, key in (("training", "error"), ("loading", "error_of_loading")):
        errors = sorted(abs(row[key]) for row in rows if row[key] is not None)
        ninth = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
        summary[name] = {"median": statistics.median(errors), "p90": ninth, "largest": errors[-1]}
    write_json(RESULTS / "calibration.json", {**summary, "rows": rows})
    lines = ["| run | measured GB | predicted GB | error |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        real, said = row["measured"]["training"] / 1e9, row["predicted"]["training"] / 1e9
        lines.append(f"| {row['case']} | {real:.2f} | {said:.2f} | {row['error']:+.1%} |")
    told = [
        f"{name}: median error {each['median']:.1%}, 90th percentile {each['p90']:.1%}, "
        f"largest {each['largest']:.1%}"
        for name, each in summary.items() if isinstance(each, dict)
    ]  # fmt: skip
    write_text(RESULTS / "calibration.md", "\n".join([*lines, "", *told, ""]))


if __name__ == "__main__":
    main()
