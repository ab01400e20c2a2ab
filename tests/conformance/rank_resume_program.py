"""One rank of `test_resume_ranks`: ``python rank_resume_program.py MODEL DATA OUT PRECISION``.

The whole run, then the three cuts of test_resume.py. The processes are started once for all of them.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from test_resume import BOUNDARY, CUT, EDGE, STEPS, Whole, check_same, keys_of, killed_after, watched

from lorakit.checkpoint.snapshot import snapshots
from lorakit.errors import Interrupted
from lorakit.parallel.world import World, join
from lorakit.training import recipe

PASSES = 2  # of each rank in an update, the last of an epoch included


def main(world: World, model: Path, data: Path, out: Path, precision: str) -> None:
    keys = keys_of(model, data, precision) | {"per_device_train_batch_size": 1}
    with watched() as passes:
        recipe.train(keys | {"output_dir": str(out / "whole")})
    whole = Whole(out / "whole", keys, passes[1:], STEPS)
    assert len(whole.passes) == PASSES * STEPS
    for step in (BOUNDARY, EDGE):
        if world.first:
            killed_after(step, whole.folder, out / f"cut-{step}")
        world.wait()
        go_on(world, whole, out / f"cut-{step}", updates=STEPS - step)
    before = PASSES * (CUT - 1)
    stop_after = 1 + before + 1 if world.rank else None  # one rank alone gets the signal
    with watched(stop_after) as first, pytest.raises(Interrupted) as caught:
        recipe.train(keys | {"output_dir": str(out / "stopped")})
    assert caught.value.exit_code == 143
    assert len(first) == 1 + before + 1
    assert snapshots(out / "stopped")[0].name == f"checkpoint-{CUT - 1}"
    go_on(world, whole, out / "stopped", updates=STEPS - CUT + 1)


def go_on(world: World, whole: Whole, run: Path, *, updates: int) -> None:
    with watched() as passes:
        recipe.train(whole.keys | {"output_dir": str(run)}, resume=True)
    world.wait()
    assert len(passes) - 1 == PASSES * updates
    check_same(run, whole, passes[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, data, out, precision = sys.argv[1:]
    with join(timeout=60) as joined:
        recipe.join = lambda *given, **more: contextlib.nullcontext(joined)  # type: ignore[assignment]
        main(joined, Path(model), Path(data), Path(out), precision)
    if joined.first:
        Path(out, "same").touch()
