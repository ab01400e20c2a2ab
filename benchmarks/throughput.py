"""Tokens a second of a training update: lorakit against PEFT and TRL, and against its own matrix products.

    .venv/bin/python benchmarks/throughput.py --data alpaca.json [--pairs 7]          # the table
    ... --data alpaca.json --model smollm2-135m-instruct --against peft --json

An update has 8 rows of an alpaca file; `contestants.py` says who trains on them and how. The ratios are against
the Trainer's default and against the fastest other. In each round everyone trains on the same rows once, in an
order that turns, and every matrix product of lorakit's update is computed alone, in the same number format and
shapes: the roofline. Ratios and shares are medians over rounds. Only a quiet machine gives numbers that mean
something. TRL takes part where it is installed (``pip install trl``).

Each has a process of its own, whose peak of resident memory is told, too. ``random-1b`` has the shapes of
TinyLlama-1.1B, six of its 22 layers, and random weights. The table goes to ``results/throughput.json`` and
``.md``, case by case: ``--cases 0 5`` measures these anew and keeps the others.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from contestants import DTYPES, PEERS, ROWS, TARGETS, Setting, contestant, encoded, labelled, shapes
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit import hardware
from lorakit.data.encode import Row
from lorakit.demo.addresses import prepare
from lorakit.files import cache_folder, write_json, write_text
from lorakit.modelinfo.demo import DEMO_MODEL
from lorakit.models.sources import locate
from lorakit.ops.loss import _PRODUCT

LONGEST = 8 * 2048  # tokens of an update
NAMES = ("model", "format", "targets", "dropout")
CASES = [  # of these
    (DEMO_MODEL, "bf16", "attention", 0.1), (DEMO_MODEL, "bf16", "attention", 0.0),
    (DEMO_MODEL, "bf16", "all", 0.1),
    (DEMO_MODEL, "fp32", "attention", 0.1), (DEMO_MODEL, "nf4", "attention", 0.1),
    ("random-1b", "bf16", "attention", 0.1), ("random-1b", "nf4", "attention", 0.1),
    ("random-1b", "int8", "attention", 0.1),
]  # fmt: skip


def main() -> None:
    """One case, or the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an alpaca file; the demo's addresses if left out")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="of the table, by number from 0"
    )
    parser.add_argument("--model", choices=(DEMO_MODEL, "random-1b"))
    parser.add_argument("--format", choices=(*DTYPES, "nf4", "int8"), default="bf16")
    parser.add_argument("--targets", choices=TARGETS, default="attention")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--against", choices=("peft", "all", "nobody"), default="all")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.data = options.data or prepare(cache_folder() / "addresses")[0]
    one = Setting(options.model or DEMO_MODEL, options.format, options.targets, options.dropout)
    if options.model:
        row = measure(options.data, options.pairs, one, options.against)
        print(json.dumps(row) if options.json else table([row]))
        return
    results = Path(__file__).parent / "results"
    kept = json.loads((results / "throughput.json").read_text())["rows"]
    rows = {tuple(row[name] for name in NAMES): row for row in kept}
    for number in options.cases:
        rows[CASES[number]] = measure(options.data, options.pairs, Setting(*CASES[number]), options.against)
        found = [rows[case] for case in CASES if case in rows]
        result = {"rows": found, "processor": hardware.processor_name(), "threads": torch.get_num_threads()}
        write_json(results / "throughput.json", result)
        write_text(results / "throughput.md", table(found))
    print(table(found))


def others(setting: Setting, against: str) -> list[str]:
    """Who else takes part: nobody but lorakit trains on its quantised layers."""
    if setting.form not in DTYPES or against == "nobody":
        return []
    installed = against != "peft" and importlib.util.find_spec("trl")
    return [name for name in PEERS if installed or not name.startswith("trl")]


def measure(data: Path, pairs: int, setting: Setting, against: str) -> dict[str, Any]:
    """All contestants in turns on the same rows."""
    rows, peers = encoded(data), others(setting, against)
    tokens = [sum(len(row.ids) for row in rows_of(rows, turn)) for turn in range(pairs + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in ("lorakit", *peers, "roofline")}
    peaks: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(process(name, data, setting)) for name in seconds}
        for turn in range(pairs + 1):
            names = list(seconds)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                processes[name].send(turn)
                took, peaks[name] = processes[name].recv()
                seconds[name].append(took)
    rates = {name: [t / s for t, s in zip(tokens[1:], took[1:], strict=True)] for name, took in seconds.items()}
    middle = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    best = max(peers, key=lambda name: middle[name], default=None)
    return {
        "model": setting.model, "format": setting.form, "targets": setting.targets, "dropout": setting.dropout,
        **{f"{name}_tokens_per_second": middle[name] for name in ("lorakit", *peers)},
        "best_peer": best,
        "ratio_default": ratio(rates, "peft") if peers else None,
        "ratio_median": ratio(rates, best) if best else None,
        "roofline_tokens_per_second": middle["roofline"],
        "roofline_share": ratio(rates, "roofline"),
        **{f"{name}_peak_gb": peaks[name] for name in ("lorakit", *peers)},
    }  # fmt: skip


def rows_of(rows: list[Row], turn: int) -> list[Row]:
    """An update's."""
    return rows[turn * ROWS : (turn + 1) * ROWS]


@contextlib.contextmanager
def process(name: str, data: Path, setting: Setting) -> Iterator[Any]:
    """A contestant or the roofline in a process of its own: send a turn, receive its seconds and peak GB.

    In a shared one an update would find the heap as the contestant before has left it.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=serve, args=(name, data, setting, theirs), daemon=True)
    child.start()
    theirs.close()
    ours.recv()  # it is ready
    try:
        yield ours
    finally:
        ours.close()
        child.join(10)
        child.kill()


def serve(name: str, data: Path, setting: Setting, told: Any) -> None:
    """The process."""
    rows = encoded(data)
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        step = products(setting) if name == "roofline" else contestant(stack, name, setting, rows).step
        told.send(None)
        while True:
            chosen = rows_of(rows, told.recv())
            start = time.perf_counter()
            step(chosen)
            told.send((time.perf_counter() - start, round(hardware.memory_peak() / 1e9, 3)))


def ratio(rates: dict[str, list[float]], other: str) -> float:
    """Of lorakit's rate to another's, round by round."""
    pairs = zip(rates["lorakit"], rates[other], strict=True)
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)


def products(setting: Setting) -> Callable[[list[Row]], None]:
    """Every product with a frozen weight in a packed update: x Wᵀ and g W, the head's on labelled positions."""
    config = AutoConfig.from_pretrained(locate(DEMO_MODEL).path) if setting.model == DEMO_MODEL else None
    with torch.device("meta"):
        sizes = [
            (tuple(layer.weight.shape), name == "lm_head")
            for name, layer in AutoModelForCausalLM.from_config(config or shapes(setting.model)).named_modules()
            if isinstance(layer, nn.Linear)
        ]
    weights = {size: torch.randn(size).to(setting.dtype) for size, _ in set(sizes)}
    sides = {side for size, is_head in sizes for side in (size[1:] if is_head else size)}
    x = {side: torch.randn(LONGEST, side).to(setting.dtype) for side in sides}

    def run(chosen: list[Row]) -> None:
        every = sum(len(row.ids) for row in chosen)
        for size, is_head in sizes:
            W = weights[size]
            if not is_head:
                torch.mm(x[size[1]][:every], W.T)
                torch.mm(x[size[0]][:every], W)
                continue
            for some in x[size[1]][: labelled(chosen)].split(_PRODUCT // size[0]):
                torch.mm(some @ W.T, W)

    return run


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(name.replace("_", " ") for name in names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row.get(name, "")) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
