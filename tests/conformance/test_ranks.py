"""Two gloo ranks train as one process does, save, resume, change their number, and fail together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_program
import torch
from torch import nn

from lorakit.checkpoint.state import State
from lorakit.parallel.launch import launch
from lorakit.parallel.world import World

PROGRAM = Path(rank_program.__file__)
TOLERANCE = 1e-5  # relative, of losses
DATA_ERROR = 3  # exit code


def command(scenario: str, out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(PROGRAM), scenario, str(out), *arguments]


@pytest.fixture(autouse=True, scope="module")
def small_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        # `make setup` puts DeepSpeed there; see the Makefile.
        paths = [os.environ.get("PYTHONPATH", ""), str(Path(sys.prefix) / "deepspeed")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        yield


def plain_losses() -> list[float]:
    """One process, one batch at a time, torch and nothing of lorakit's engine: the oracle."""
    model: Any = rank_program.model_of()
    optimizer = rank_program.optimizer_of(model)
    losses = []
    for step in range(rank_program.UPDATES):
        batches = rank_program.data(step)
        tokens = sum(ids[:, 1:].numel() for ids in batches)
        total = 0.0
        for ids in batches:
            logits = model(input_ids=ids).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            (loss / tokens).backward()
            total += loss.item() / tokens
        nn.utils.clip_grad_norm_(model.parameters(), rank_program.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saw under every strategy; one start of processes for all of them."""
    out = tmp_path_factory.mktemp("ranks")
    assert launch(2, command("trajectories", out, *rank_program.STRATEGIES)) == 0
    return out


@pytest.fixture(scope="module")
def oracle() -> list[float]:
    return plain_losses()


@pytest.mark.parametrize("name", rank_program.STRATEGIES)
def test_two_ranks_train_as_one_process(trained: Path, oracle: list[float], name: str) -> None:
    seen = json.loads((trained / f"{name}.json").read_text())
    assert oracle[-1] != pytest.approx(oracle[0], rel=1e-3)
    assert seen["losses"] == pytest.approx(oracle, rel=TOLERANCE)
    assert seen["resumed"], "a fresh start from the middle is not the same bit for bit"
    assert seen["rolled_back"], "going back to the middle is not the same bit for bit"
    assert seen["crossed"] == pytest.approx(oracle[rank_program.CUT :], rel=TOLERANCE)


@pytest.mark.parametrize("name", rank_program.STRATEGIES)
def test_one_process_goes_on_where_two_ranks_stopped(trained: Path, oracle: list[float], name: str) -> None:
    saved = torch.load(trained / f"{name}.pt", weights_only=True)
    alone = rank_program.begin("none", World())
    assert rank_program.go_on(alone, State(**saved["middle"])) == pytest.approx(
        oracle[rank_program.CUT :], rel=TOLERANCE
    )
    found, expected = alone.collect(), State(**saved["end"])
    assert found.values == expected.values
    assert found.tensors.keys() == expected.tensors.keys()
    for key, tensor in found.tensors.items():
        torch.testing.assert_close(tensor, expected.tensors[key], rtol=1e-4, atol=1e-5, msg=key)


def test_what_bases_are_made_of_can_be_sharded(trained: Path) -> None:
    seen = json.loads((trained / "bases.json").read_text())
    assert len(seen) == 4
    for name, (sharded, whole) in seen.items():
        assert sharded == pytest.approx(whole, rel=1e-3 if "base" in name else TOLERANCE), name


def run(scenario: str, out: Path, *arguments: str) -> tuple[int, str, float]:
    """Exit code, what all ranks and the launcher wrote to stderr, and seconds, of two ranks."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command(scenario, out, *arguments)],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


LAUNCHER = """
import sys
from lorakit import log
from lorakit.parallel import launch
log.setup()
launch.GRACE = 2.0
sys.exit(launch.launch(2, sys.argv[1:]))
"""


def test_the_first_cause_ends_all(tmp_path: Path) -> None:
    code, text, _ = run("fail", tmp_path)
    assert code == DATA_ERROR
    assert "row 7 is broken" in text
    assert "rank 1 failed first: E-DATA: row 7 is broken" in text


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_ends_all_and_is_named(tmp_path: Path, rank: str) -> None:
    code, text, seconds = run("vanish", tmp_path, rank)
    assert code == 128 + signal.SIGKILL
    assert f"rank {rank} failed first" in text
    assert f"rank {rank} (process" in text
    assert seconds < 60


def test_a_rank_that_stands_still_ends_all(tmp_path: Path) -> None:
    code, text, seconds = run("freeze", tmp_path)
    assert code == 128 + signal.SIGKILL
    assert "rank 1 failed first: it stopped without a word" in text
    assert seconds < 60


def test_ranks_agree_and_signals_reach_each_once(tmp_path: Path) -> None:
    with started("listen", tmp_path) as launcher:
        ready(tmp_path)
        launcher.send_signal(signal.SIGTERM)
        text, _ = launcher.communicate(timeout=30)
        assert launcher.returncode == 128 + signal.SIGTERM
    seen = json.loads((tmp_path / "agree.json").read_text())
    assert (seen["ranks"], seen["any"]) == (["0", "1"], True)
    assert "data: rank 0: sha 0\n  data: rank 1: sha 1" in seen["refusal"]
    assert "config: " not in seen["refusal"]
    assert text == b"said by rank 0\n"  # the others are silent


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    with started("listen", tmp_path) as launcher:
        ranks = ready(tmp_path)
        launcher.kill()
        launcher.wait()
        end = time.monotonic() + 30
        while any(alive(rank) for rank in ranks) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(alive(rank) for rank in ranks)


def test_slurm_and_torchrun_start_the_same_program(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run([*torchrun, *command("agree", tmp_path)[1:]], check=True, timeout=90, capture_output=True)
    assert json.loads((tmp_path / "agree.json").read_text())["ranks"] == ["0", "1"]
    (tmp_path / "agree.json").unlink()
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            command("agree", tmp_path),
            env={**os.environ, **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
    assert json.loads((tmp_path / "agree.json").read_text())["ranks"] == ["0", "1"]


@contextlib.contextmanager
def started(scenario: str, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = [sys.executable, "-c", LAUNCHER, *command(scenario, out)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as launcher:
        try:
            yield launcher
        finally:
            launcher.kill()


def ready(out: Path) -> list[int]:
    """The processes of the ranks, once both are there."""
    files = [out / f"ready-{rank}" for rank in range(2)]
    end = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < end
        time.sleep(0.1)
    return [int(file.read_text()) for file in files]


def alive(process: int) -> bool:
    """Whether it runs; a process that ended but was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
