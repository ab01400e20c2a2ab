"""What a token costs: speed and memory against the length of rows, the rank, and the width of the model.

    .venv/bin/python benchmarks/curves.py [--rounds 5]

bf16, LoRA on q, k, v and o with dropout 0.1. An update is one pass: 1,024 tokens, or one row where that is
longer. Rows are random tokens, all of which carry loss. ``length``: SmolLM2-135M, r=8. ``rank``: the same with
rows of 128 tokens. ``width``: two random layers with heads of 64 and the same vocabulary, r=8, rows of 128
tokens. In each round all points of a curve take their turn, so that what the machine does meets them alike;
rates are medians. Peak memory is that of a fresh process after three updates. The tables go to
``results/curves.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from contestants import Setting, Step, contestant

from lorakit import hardware
from lorakit.data.encode import Row
from lorakit.files import write_json

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
RANKS = (1, 4, 8, 16, 32, 64, 128, 256)
WIDTHS = (576, 1024, 2048, 3072, 4096)
TOKENS, SHORT, VOCABULARY = 1024, 128, 49152
Point = tuple[Setting, int]  # and the length of rows
CURVES: dict[str, dict[int, Point]] = {
    "length": {length: (Setting(), length) for length in LENGTHS},
    "rank": {rank: (Setting(rank=rank), SHORT) for rank in RANKS},
    "width": {width: (Setting(f"width-{width}"), SHORT) for width in WIDTHS},
}


def main() -> None:
    """All curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curves", choices=CURVES, nargs="+", default=list(CURVES))
    parser.add_argument("--peak", nargs=2, metavar=("CURVE", "POINT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(*CURVES[options.peak[0]][int(options.peak[1])]))
        return
    path = Path(__file__).parent / "results" / "curves.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in options.curves:
        found[name] = curve(name, CURVES[name], options.rounds)
        write_json(path, found)


def curve(name: str, points: dict[int, Point], rounds: int) -> list[dict[str, float]]:
    """Tokens a second and peak memory of each point."""
    rates: dict[int, list[float]] = {at: [] for at in points}
    with contextlib.ExitStack() as stack:
        steps = {at: step_of(stack, point) for at, point in points.items()}
        for turn in range(rounds + 1):
            for at in list(points)[:: 1 if turn % 2 else -1]:
                chosen = rows(points[at][1])
                start = time.perf_counter()
                steps[at](chosen)
                rates[at].append(sum(len(row.ids) for row in chosen) / (time.perf_counter() - start))
    found = []
    for at, each in rates.items():
        found.append({
            name: at, "tokens_per_second": round(statistics.median(each[1:]), 1), "peak_gb": resident(name, at)
        })  # fmt: skip
        print(found[-1], flush=True)
    return found


def step_of(stack: contextlib.ExitStack, point: Point) -> Step:
    """How the point is trained."""
    setting, length = point
    return contestant(stack, "lorakit", setting, rows(length)).step


def rows(length: int) -> list[Row]:
    """An update of random tokens."""
    draw = random.Random(length)
    made = []
    for _ in range(max(1, TOKENS // length)):
        ids = tuple(draw.randrange(VOCABULARY) for _ in range(length))
        made.append(Row(ids, ids))
    return made


def peak(setting: Setting, length: int) -> float:
    """GB of this process after three updates."""
    with contextlib.ExitStack() as stack:
        step = contestant(stack, "lorakit", setting, rows(length)).step
        for _ in range(3):
            step(rows(length))
    return round(hardware.memory_peak() / 1e9, 3)


def resident(name: str, at: int) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(at)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
