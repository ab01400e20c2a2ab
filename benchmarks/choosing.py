"""Small trainings that differ in one setting each: what rank, alpha, targets … do to the loss and to the cost.

    .venv/bin/python benchmarks/choosing.py [--quick] [--fresh] [--only TABLE …] [--tables]

The task is the demo's, US addresses to JSON with SmolLM2-135M-Instruct, much shortened: 24 updates of 8
rows, one pass over 192 rows. Quality is the loss on 100 held-out rows; what was forgotten is seen in the
perplexity of a text about something else. Each run has a process of its own, so that peaks of memory do not
mix, and takes 60 to 90 s on two cores. Rows that are in ``results/choosing.json`` are not run again
(``--fresh`` starts anew), so that an interrupted program goes on where it stopped; after every row it
writes that file and the tables of ``docs/choosing.md``. ``--tables`` writes the tables alone. ``--quick``
runs two rows for two updates and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit import hardware
from lorakit.files import cache_folder, write_json, write_text
from lorakit.report.numbers import number

RESULTS = Path(__file__).parent / "results" / "choosing.json"
PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
PROTOCOL = {"updates": 24, "batch": 8, "held_out_rows": 100}
QUICK = {"updates": 2, "batch": 8, "held_out_rows": 8}
CUTS = (1, 2, 4, 8)  # ranks that a finished adapter is cut to

Keys = dict[str, Any]
ATTENTION, MLP = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"
DEFAULT: Keys = {
    "lora_rank": 8,
    "lora_target": "all",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.05,
    "max_samples": 192,
    "seed": 42,
}


@dataclass(frozen=True)
class Table:
    """Settings that are compared, by what the page calls them; ``columns`` are keys of a measured row."""

    cases: Mapping[str, Keys]
    columns: tuple[str, ...]


SIZE = ("trainable", "adapter_mb")
COST = ("tokens_per_second", "peak_gb")
TABLES = {
    "seeds": Table({f"seed {seed}": {"seed": seed} for seed in (42, 7, 2026)}, ("loss", "forgetting")),
    "rank": Table(
        {f"rank {r}": {"lora_rank": r} for r in (2, 4, 8, 16, 32, 64)},
        ("loss", *SIZE, *COST, "recommended", "forgetting"),
    ),
    "alpha": Table(
        {f"rank {r}, alpha {k}r": {"lora_rank": r, "lora_alpha": k * r} for r in (8, 32) for k in (1, 2, 4)},
        ("loss", "forgetting"),
    ),
    "targets": Table(
        {
            "q, v": {"lora_target": "q_proj,v_proj"},
            "q, k, v, o": {"lora_target": ATTENTION},
            "gate, up, down": {"lora_target": MLP},
            "all seven": {},
            "q, v at rank 42": {"lora_target": "q_proj,v_proj", "lora_rank": 42},
        },
        ("loss", *SIZE, *COST),
    ),
    "rate": Table(
        {f"{rate:g}": {"learning_rate": rate} for rate in (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)},
        ("loss", "forgetting"),
    ),
    "method": Table(
        {
            "LoRA": {},
            "rsLoRA": {"use_rslora": True},
            "DoRA": {"use_dora": True},
            "AdaLoRA, 8 → 4": {"use_adalora": True},
            "PiSSA": {"pissa_init": True},
            "LoRA-FA": {"lora_fa": True},
            "LoRA, rank 64": {"lora_rank": 64},
            "rsLoRA, rank 64": {"lora_rank": 64, "use_rslora": True},
        },
        ("loss", *SIZE, *COST, "forgetting"),
    ),
    "memory": Table(
        {
            "bf16 base": {},
            "8-bit base": {"quantization_bit": 8},
            "4-bit base": {"quantization_bit": 4},
            "checkpointing": {"gradient_checkpointing": True},
            "4-bit base and checkpointing": {"quantization_bit": 4, "gradient_checkpointing": True},
        },
        ("loss", *COST),
    ),
    "data": Table(
        {f"{n} rows, {192 // n} passes": {"max_samples": n} for n in (24, 48, 96, 192)}, ("loss", "last_loss")
    ),
    "dropout": Table({f"{share:g}": {"lora_dropout": share} for share in (0, 0.05, 0.1)}, ("loss", *COST)),
}
CUT: dict[str, Keys] = {"rank 8": {}, "rank 64": {"lora_rank": 64}}  # finished adapters that are cut
TITLES = {
    "loss": "held-out loss", "trainable": "trained numbers", "adapter_mb": "adapter MB", "peak_gb": "peak GB",
    "tokens_per_second": "tokens/s", "recommended": "ranks for 90 %", "forgetting": "other text",
    "last_loss": "training loss",
}  # fmt: skip
FORMS = {
    "loss": ".4f", "trainable": ",", "adapter_mb": ".1f", "peak_gb": ".2f", "tokens_per_second": ".0f",
    "recommended": "", "forgetting": "+.1%", "last_loss": ".4f",
}  # fmt: skip


def main() -> None:
    """Run what is missing, and write it down row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[*TABLES, "cut"], default=[*TABLES, "cut"])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: keys, protocol
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(*map(json.loads, options.one))))
        return
    if options.quick:
        for name, keys in {"default": {}, "rank 2": {"lora_rank": 2}}.items():
            print(name, json.dumps(measured(keys, QUICK)), flush=True)
        return
    rows = {} if options.fresh else known()
    for keys in [] if options.tables else wanted(options.only):
        if identity(keys) not in rows:
            rows[identity(keys)] = measured(keys, PROTOCOL)
            print(f"{rows[identity(keys)]['loss']:.4f}  {identity(keys)}", flush=True)
            facts = {"processor": hardware.processor_name(), "protocol": PROTOCOL}
            write_json(RESULTS, {**facts, "rows": rows})
            write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), rows))
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), rows))


def identity(keys: Keys) -> str:
    """What differs from the default, so that a setting that several tables show is run once."""
    keys = {"lora_alpha": 2 * keys.get("lora_rank", 8), **keys}
    default = {**DEFAULT, "lora_alpha": 2 * keys.get("lora_rank", 8), "lora_dropout": 0}
    differing = {key: value for key, value in sorted(keys.items()) if default.get(key) != value}
    return ", ".join(f"{key}={value}" for key, value in differing.items()) or "default"


def wanted(tables: list[str]) -> list[Keys]:
    """The settings of these tables."""
    found = [keys for name, table in TABLES.items() if name in tables for keys in table.cases.values()]
    return found + (list(CUT.values()) if "cut" in tables else [])


def known() -> dict[str, Any]:
    """The rows that were measured in this way."""
    if not RESULTS.is_file():
        return {}
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return dict(found["rows"]) if found["protocol"] == PROTOCOL else {}


def measured(keys: Keys, protocol: Mapping[str, int]) -> dict[str, Any]:
    """Train in a process of its own."""
    command = [sys.executable, __file__, "--one", json.dumps(keys), json.dumps(protocol)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def run(keys: Keys, protocol: Mapping[str, int]) -> dict[str, Any]:
    """One training, in this process; see `TITLES` for what is measured.

    ``forgetting`` is the relative change of the perplexity of Python's text, ``last_loss`` the mean of the last
    three updates, ``tokens_per_second`` the median of the updates, ``peak_gb`` the process's highest memory.
    """
    from lorakit import train
    from lorakit.demo.addresses import prepare
    from lorakit.report.record import RunRecord

    training, test = prepare(cache_folder() / "addresses")
    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder, "held-out.jsonl")
        lines = test.read_text(encoding="utf-8").splitlines(keepends=True)
        held_out.write_text("".join(lines[: protocol["held_out_rows"]]), encoding="utf-8")
        few = Path(folder, "train.jsonl")  # max_samples would cut the held-out rows, too
        count = {**DEFAULT, **keys}["max_samples"]
        few.write_text("".join(training.read_text(encoding="utf-8").splitlines(True)[:count]), encoding="utf-8")
        result = train(
            {
                **DEFAULT,
                **keys,
                "max_samples": None,
                "model_name_or_path": "smollm2-135m-instruct",
                "dataset": str(few),
                "eval_dataset": str(held_out),
                "output_dir": str(Path(folder, "run")),
                "tokenized_path": str(Path(folder, "encoded")),
                "max_steps": protocol["updates"],
                "per_device_train_batch_size": protocol["batch"],
                "gradient_accumulation_steps": 1,
                "eval_on_start": not keys,
                "forgetting_text": "python",
                "logging_steps": 1,
                "save_strategy": "no",
            }
        )
        record, after = RunRecord.read(result.folder), result.after
        info = json.loads((result.folder / "run.json").read_text(encoding="utf-8"))
        assert after is not None
        rates = [point.tokens_per_second for point in record.train[2:] if point.tokens_per_second]
        row = {
            "loss": round(after.loss, 5),
            "base_loss": round(result.before.loss, 5) if result.before else None,
            "last_loss": round(statistics.mean(p.loss or math.nan for p in record.train[-3:]), 5),
            "trainable": info["adapter"]["trainable"],
            "adapter_mb": round((result.adapter / "adapter_model.safetensors").stat().st_size / 1e6, 2),
            "tokens_per_second": round(statistics.median(rates), 1) if rates else None,
            "peak_gb": info["environment"]["peak_memory_gb"],
            "recommended": info["ranks"]["recommended"],
            "effective_rank": round(info["ranks"]["effective"], 2),
            "perplexity": round(info["forgetting"]["adapter"], 3),
            "forgetting": round(info["forgetting"]["adapter"] / info["forgetting"]["base"] - 1, 5),
        }
        if identity(keys) in map(identity, CUT.values()) and protocol == PROTOCOL:
            row["cut"] = cut(result.folder, held_out)
        return row


def cut(folder: Path, held_out: Path) -> dict[str, float]:
    """Held-out loss of a finished adapter, whole and at lower ranks, in float32."""
    from lorakit.checkpoint.compress import compress
    from lorakit.data.reading import read_samples
    from lorakit.evals.evaluate import hold_out, mean_loss
    from lorakit.evals.session import open_session

    session = open_session(str(folder), precision="fp32", merge=False)
    samples = read_samples([held_out]).samples
    rows = hold_out(session.tokenizer, samples, template=session.template, cutoff_len=2048, answers=False).rows
    losses = {"whole": mean_loss(session.model, session.tokenizer, rows, 10)}
    for rank in CUTS:
        if rank < json.loads((folder / "run.json").read_text(encoding="utf-8"))["adapter"]["r"]:
            compress(session.model, "default", f"rank{rank}", rank=rank)
            losses[str(rank)] = mean_loss(session.model, session.tokenizer, rows, 10)
    return {name: round(loss, 5) for name, loss in losses.items()}


# ------------------------------------------------------------------------------------------------ the page


def filled(page: str, rows: Mapping[str, Any]) -> str:
    """The page with every table between its markers as ``rows`` have it."""
    for name, text in {**{n: table_text(n, rows) for n in TABLES}, "cut": cut_text(rows)}.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        if not found or end not in rest:
            raise SystemExit(f"{PAGE.name} has no place for the table {name}")
        page = before + begin + text + end + rest.partition(end)[2]
    return page


def table_text(name: str, rows: Mapping[str, Any]) -> str:
    """Markdown of one table and a sentence on it, from the rows that are there."""
    table = TABLES[name]
    found = {title: rows[identity(keys)] for title, keys in table.cases.items() if identity(keys) in rows}
    if not found:
        return "Not measured yet: `benchmarks/choosing.py`.\n"
    lines = ["| | " + " | ".join(TITLES[key] for key in table.columns) + " |"]
    lines += ["| --- |" + " ---: |" * len(table.columns)]
    for title, row in found.items():
        cells = [number(row[key], FORMS[key]) for key in table.columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", verdict(found, rows), ""])


def verdict(found: Mapping[str, Any], rows: Mapping[str, Any]) -> str:
    """Which is the best, and which cannot be told from it."""
    best = min(found, key=lambda title: found[title]["loss"])
    noise = spread(rows)
    told = f"The lowest loss: {best} ({found[best]['loss']:.4f})."
    if noise is None or len(found) < 2:
        return told
    close = [t for t, row in found.items() if t != best and row["loss"] - found[best]["loss"] <= noise]
    alike = f"; within {noise:.4f}, the range of three seeds: {'; '.join(close) if close else 'no other'}."
    return told.removesuffix(".") + alike


def spread(rows: Mapping[str, Any]) -> float | None:
    """The range of the loss over the seeds: less than this between two settings means nothing."""
    losses = [rows[identity(k)]["loss"] for k in TABLES["seeds"].cases.values() if identity(k) in rows]
    return max(losses) - min(losses) if len(losses) == len(TABLES["seeds"].cases) else None


def cut_text(rows: Mapping[str, Any]) -> str:
    """Markdown of the losses at lower ranks."""
    found = {t: rows[identity(k)]["cut"] for t, k in CUT.items() if "cut" in rows.get(identity(k), {})}
    if not found:
        return "Not measured yet: `benchmarks/choosing.py`.\n"
    ranks = [str(rank) for rank in CUTS]
    lines = ["| trained at | whole | " + " | ".join(f"cut to {rank}" for rank in ranks) + " |"]
    lines += ["| --- |" + " ---: |" * (1 + len(ranks))]
    for title, losses in found.items():
        cells = [number(losses.get(key), ".4f") for key in ("whole", *ranks)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
