"""What ranks know and decide without talking: place, share, DeepSpeed's settings; and the launcher."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorakit.errors import LorakitError, UsageError
from lorakit.parallel import world as worlds
from lorakit.parallel.ddp import BUCKET, sum_gradients
from lorakit.parallel.fsdp import blocks
from lorakit.parallel.launch import launch
from lorakit.parallel.place import Place, find_place, first_host
from lorakit.parallel.world import World, check_same_everywhere, join
from lorakit.parallel.zero_config import RunNumbers, fill, read

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "12"}
SRUN = {
    "SLURM_JOB_ID": "4007", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "99", "SLURM_STEP_NODELIST": "gpu[03-05]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (TORCHRUN, Place(3, 8, 1, "a", 12)),
        ({**TORCHRUN, **SRUN}, Place(3, 8, 1, "a", 12)),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (SRUN, Place(5, 6, 1, "gpu03", 29507)),
        ({**SRUN, "MASTER_ADDR": "b", "MASTER_PORT": "9"}, Place(5, 6, 1, "b", 9)),
        # What a batch script sees that does not use srun: one process, however many tasks the job has.
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, None),
    ],
)
def test_the_place_in_a_run(environ: dict[str, str], expected: Place | None) -> None:
    assert find_place(environ) == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"RANK": "two"}, "RANK"),
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"RANK": "-1"}, "rank -1"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
    ],
)
def test_a_broken_environment_is_refused(change: dict[str, str | None], word: str) -> None:
    environ = {key: value for key, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(UsageError, match=word):
        find_place(environ)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-07,12],big1", "gpu03"),
        ("n[1,3]-ib", "n1-ib"),
        ("rack-2-n07,x", "rack-2-n07"),
        ("", ""),
    ],
)
def test_the_first_host(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_a_process_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    # Some libraries of a run want a group even of one, and environment variables with it.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    with join() as world:
        worlds.need_group()
        assert world == World()
        assert world.first
        assert world.gather({"a": 1}) == [{"a": 1}]
        assert world.sum(1.5, 2) == [1.5, 2]
        assert world.any(True)
        assert not world.any(False)
        check_same_everywhere(world, {"data": "x"})
        world.wait()
        assert dist.is_initialized()
    assert not dist.is_initialized()


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, port: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(worlds, "MEETING", 0.5)


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        as_rank(monkeypatch, 0, port)
        with pytest.raises(UsageError, match=f"port {port} is taken"), join():
            pass


def test_ranks_that_never_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in (0, 1):  # the others never came; nobody is there
        as_rank(monkeypatch, rank, port)
        with pytest.raises(UsageError, match=f"rank {rank} of 2 did not meet the others"), join():
            pass


@given(count=st.integers(0, 40), size=st.integers(1, 7))
def test_shares_are_equally_long_and_cover_all(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert len({len(indices) for indices, _ in shares}) == 1
    assert sorted(i for indices, real in shares for i in indices[:real]) == list(range(count))
    assert all(0 <= i < count for indices, _ in shares for i in indices)


def test_gradients_keep_their_places_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUCKET > 100
    monkeypatch.setattr("lorakit.parallel.ddp.BUCKET", 10)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (4, 4), (1,), (3, 2), (5,)]
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64]
    parameters = [nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
    gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.clone()
    parameters[3].grad = None
    sum_gradients(World(), parameters)
    assert parameters[3].grad is None
    for i in (0, 1, 2, 4):
        assert torch.equal(parameters[i].grad, gradients[i])
        assert parameters[i].grad.dtype == dtypes[i]


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    inner = nn.ModuleList([nn.Linear(1, 1)])
    block = nn.Sequential(nn.Linear(1, 1), inner)
    model = nn.ModuleDict({"layers": nn.ModuleList([block, nn.Linear(2, 2)]), "head": nn.Linear(1, 1)})
    assert list(blocks(model)) == [block, model["layers"][1]]


# ------------------------------------------------------------------------------------------------ the launcher


def test_the_launcher_returns_the_first_failure(tmp_path: Path) -> None:
    program = "import os, sys; sys.exit(7 if os.environ['RANK'] == '1' else 0)"
    assert launch(3, [sys.executable, "-c", program]) == 7
    assert launch(2, [sys.executable, "-c", "pass"]) == 0


def test_the_launcher_shares_out_cores_and_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = "import os, json; json.dump(dict(os.environ), open(os.environ['RANK'] + '.json', 'w'))"
    monkeypatch.chdir(tmp_path)
    assert launch(2, [sys.executable, "-c", program]) == 0
    found = [json.loads(Path(f"{rank}.json").read_text()) for rank in range(2)]
    places = [find_place(each) for each in found]
    assert [(p.rank, p.size, p.local_rank) for p in places if p] == [(0, 2, 0), (1, 2, 1)]
    assert int(found[0]["OMP_NUM_THREADS"]) >= 1


def test_a_rank_does_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="at least one"):
        launch(0, ["true"])
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="started as one already"):
        launch(2, ["true"])


# ----------------------------------------------------------------------------------------- DeepSpeed's settings

RUN = RunNumbers(
    micro_batch=2, accumulation=4, ranks=2, max_grad_norm=1.0, precision="bf16", optimizer="adamw_torch",
    learning_rate=1e-4, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, hidden_size=64,
)  # fmt: skip
# A file as other programs' users have it.
COMMON: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def test_auto_values_are_filled_in() -> None:
    before = json.dumps(COMMON)
    filled = fill(COMMON, RUN)
    assert json.dumps(COMMON) == before
    assert '"auto"' not in json.dumps(filled)
    zero = filled["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_param_persistence_threshold"]) == (4096, 640)
    assert (zero["stage"], zero["overlap_comm"], zero["offload_optimizer"]["device"]) == (3, True, "cpu")
    assert filled["gradient_clipping"] == 0.0  # the loop clips
    same = {"train_batch_size": 16, "gradient_accumulation_steps": 4, "bf16": {"enabled": True}}
    assert fill({**COMMON, **same}, RUN) == filled


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps is 8", "is 4"]),
        ({"train_batch_size": 5}, ["train_batch_size is 5", "is 16"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "max_grad_norm is 1.0"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is true", "is false"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type is Lamb", "adamw_torch"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr is 0.001", "0.0001"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1}}}, ["lr_scheduler_type"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage is 0"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param.device"]),
        ({"zero_force_ds_cpu_optimizer": True}, ["zero_force_ds_cpu_optimizer is true"]),
        ({"curriculum_learning": {"enabled": True}}, ["curriculum_learning"]),
        ({"gradient_clipping": 2, "train_batch_size": 5}, ["gradient_clipping", "train_batch_size"]),
    ],
)
def test_contradictions_are_refused_with_both_values(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        fill({**COMMON, **change}, RUN, place="ds.json")
    assert caught.value.place == "ds.json"
    for word in words:
        assert word in caught.value.message


def test_an_optimizer_section_needs_adamw() -> None:
    with pytest.raises(UsageError, match="the run's optim is sgd"):
        fill(COMMON, replace(RUN, optimizer="sgd"))


@pytest.mark.parametrize(("text", "word"), [("{,", ":1:2"), ("[1]", "object"), (None, "cannot read")])
def test_a_file_that_is_no_settings(tmp_path: Path, text: str | None, word: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LorakitError) as caught:
        read(path)
    assert word in caught.value.render()
