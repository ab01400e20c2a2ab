"""Does a run end where PEFT's ends? 200 updates by each, three seeds, the same rows in the same order.

    .venv/bin/python benchmarks/agreement.py --data alpaca.json [--seeds 0 1 2] [--updates 200] [--longest 128]

SmolLM2-135M in bf16, 8 rows an update, LoRA r=8 on q, k, v and o, dropout 0.1. The seed decides the order of
rows, the first A and dropout's masks, which differ between the two as they differ between two seeds of one. The
last 100 rows of the file are held out. Of each run: the mean loss of the last 50 updates, and the mean loss of
held-out tokens, computed by transformers' own forward pass. The differences count as noise if they are no
larger than the spread of seeds. The table goes to ``results/agreement.json``, run by run: ``--seeds 2 --names
peft`` trains these anew and keeps the others, if they are as long.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from contestants import ROWS, Setting, contestant, encoded, labelled, padded
from torch import nn

from lorakit.data.encode import Row
from lorakit.demo.addresses import prepare
from lorakit.files import cache_folder, write_json

HELD_OUT, LAST = 100, 50
NAMES = ("lorakit", "peft")
RESULTS = Path(__file__).parent / "results" / "agreement.json"


def main() -> None:
    """Run all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an alpaca file; the demo's addresses if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--names", choices=NAMES, nargs="+", default=NAMES)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the rows to take")
    options = parser.parse_args()
    data = options.data or prepare(cache_folder() / "addresses")[0]
    rows = [row for row in encoded(data) if len(row.ids) <= options.longest]
    setting = {"updates": options.updates, "longest": options.longest}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    same = all(kept.get(name) == value for name, value in setting.items())
    setting["held_out_loss_before"] = loss(Setting().base(), rows[-HELD_OUT:])
    runs = {(each["name"], each["seed"]): each for each in (kept["runs"] if same else [])}
    for seed in options.seeds:
        for name in options.names:
            runs[name, seed] = run(name, seed, options.updates, rows[:-HELD_OUT], rows[-HELD_OUT:])
            print(json.dumps(runs[name, seed]), flush=True)
            found = [runs[key] for key in sorted(runs, key=lambda key: key[::-1])]
            write_json(RESULTS, setting | {"summary": summary(found), "runs": found})
    print(json.dumps(summary(found), indent=2))


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the seeds with which both have trained."""
    seeds = set.intersection(*({run["seed"] for run in runs if run["name"] == name} for name in NAMES))
    both = [run for run in runs if run["seed"] in seeds]
    return {figure: compare(both, figure) for figure in ("training_loss", "held_out_loss")} if both else {}


def run(name: str, seed: int, updates: int, rows: list[Row], held_out: list[Row]) -> dict[str, Any]:
    """One run."""
    order: list[Row] = []
    shuffle = random.Random(seed)
    while len(order) < updates * ROWS:
        order += shuffle.sample(rows, len(rows))
    with contextlib.ExitStack() as stack:
        found = contestant(stack, name, Setting(seed=seed), rows)
        losses = [found.step(order[i * ROWS : (i + 1) * ROWS]) for i in range(updates)]
    return {
        "name": name, "seed": seed, "training_loss": round(statistics.mean(losses[-LAST:]), 4),
        "held_out_loss": loss(found.model, held_out),
    }  # fmt: skip


@torch.no_grad()
def loss(model: nn.Module, rows: list[Row]) -> float:
    """Mean of the labelled tokens."""
    model.eval()
    total = sum(float(model(**padded([row]), use_cache=False).loss) * labelled([row]) for row in rows)
    model.train()
    return round(total / labelled(rows), 4)


def compare(runs: list[dict[str, Any]], figure: str) -> dict[str, float]:
    """Means over seeds, the mean difference at the same seed, and the standard deviation between seeds."""
    found = {name: [run[figure] for run in runs if run["name"] == name] for name in NAMES}
    differences = [a - b for a, b in zip(*found.values(), strict=True)]
    spread = max(statistics.stdev(each) for each in found.values()) if len(differences) > 1 else float("nan")
    return {
        **{name: round(statistics.mean(each), 4) for name, each in found.items()},
        "difference": round(statistics.mean(differences), 4),
        "spread_of_seeds": round(spread, 4),
    }


if __name__ == "__main__":
    main()
