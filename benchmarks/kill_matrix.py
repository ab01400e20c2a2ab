"""Kills and failing disks at every change that saving and training make: nothing may be lost.

    .venv/bin/python benchmarks/kill_matrix.py [--every 1] [--random 200]

Every way of writing (tests/faults/saving_matrix.py), and whole runs of `lorakit train`, which are taken up
again and compared with one that nothing happened to (tests/faults/training_matrix.py). Needs Linux and a C
compiler. The counts go to ``results/kill_matrix.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FAULTS = HERE.parent / "tests" / "faults"
sys.path.insert(0, str(FAULTS))

from training_matrix import environment  # noqa: E402


def main() -> None:
    """Try everything, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every so many changes")
    parser.add_argument("--random", type=int, default=200, help="kills at random times")
    options = parser.parse_args()
    started, every = time.time(), str(options.every)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        surroundings = environment(Path(folder))
        saving = call([FAULTS / "saving_matrix.py", f"{folder}/saving", every], surroundings)
        training = call([FAULTS / "training_matrix.py", folder, every, str(options.random)], surroundings)
    minutes = round((time.time() - started) / 60, 1)
    result = {"every": options.every, "minutes": minutes, "saving": saving, "training": training}
    results = HERE / "results"
    (results / "kill_matrix.json").write_text(json.dumps(result, indent=2) + "\n")
    (results / "kill_matrix.md").write_text(page(result))
    print(page(result))
    if saving["wrong"] or training["wrong"]:
        sys.exit(1)


def call(command: list[Any], environment: dict[str, str]) -> dict[str, Any]:
    """The JSON object that a program prints as its last line."""
    process = subprocess.run(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def page(result: dict[str, Any]) -> str:
    """The result as a short page."""
    saving: Counter[str] = Counter()
    for count in result["saving"]["counts"].values():
        saving.update(count)
    training = result["training"]["counts"]
    rows = [
        f"| {kind} | {saving.get(kind, 0) or '-'} | {training.get(kind, 0) or '-'} |"
        for kind in [*training, *(kind for kind in saving if kind not in training)]
    ]
    wrong = [*result["saving"]["wrong"], *result["training"]["wrong"]]
    total = sum(saving.values()) + sum(training.values())
    where = "at every change" if result["every"] == 1 else f"at one change in {result['every']}"
    listed = "".join(f"\n\n- {each}" for each in wrong[:50])
    return f"""# Kill matrix

{total} faults, {len(wrong)} of them with something lost, damaged, left over or not as in the run that nothing
happened to.

| Fault, {where} | single ways of writing | whole training runs |
|---|---|---|
{chr(10).join(rows)}

Each training run was taken up again by `--resume auto`; its adapter, optimizer state, random generators and
metrics were compared bit for bit. Made by `benchmarks/kill_matrix.py` in {result["minutes"]} minutes.{listed}
"""


if __name__ == "__main__":
    main()
