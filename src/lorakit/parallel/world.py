"""Who takes part in a run, and how they agree. A run of one process is a world of one, without communication.

What is agreed upon goes over gloo, on the CPU; gradients and weights on GPUs go over nccl. (No run on GPUs was
possible where this was written.)
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from lorakit import hardware
from lorakit.errors import Interrupted, UsageError
from lorakit.log import logger
from lorakit.parallel.place import Place, find_place
from lorakit.parallel.watch import Watch

MEETING = 300.0  # seconds that ranks wait for each other at the start
_WIDEST = 60  # characters of a fact that a table shows


@dataclass(frozen=True)
class World:
    """A process among all of a run; every rank calls every method, at the same point of its program."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        self.add(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum(float(flag))[0] > 0

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def copy(self, tensor: Tensor) -> None:
        """Give every rank the first one's numbers, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            self.sum(0.0)  # over gloo: a barrier of nccl would guess this rank's GPU

    def share(self, count: int) -> tuple[list[int], int]:
        """Which of ``count`` things are this rank's: their indices, and how many of these count.

        Every rank gets as many indices, so that each makes as many passes and none waits for ever; those beyond
        the number returned only fill up. With nothing to share out, nobody gets anything.
        """
        mine = list(range(self.rank, count, self.size))
        return mine + [0] * (-(-count // self.size) - len(mine)), len(mine)


@contextlib.contextmanager
def join(timeout: float = 1800.0) -> Iterator[World]:
    """Within the block this process is a rank of its run, or a world of one if nobody started it as a rank.

    The process uses GPU number ``local_rank`` where there are GPUs.

    Args:
        timeout: seconds that a collective waits for the other ranks (``ddp_timeout``).

    Raises:
        UsageError: the ranks cannot meet: the address is wrong or taken, some never came, nccl is missing.
        RankError: another rank failed first.
    """
    place = find_place(os.environ)
    if place is None:
        yield World()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    store = _meet(place)
    with Watch(store, place):
        _begin_group(place, store, timeout)
        try:
            yield World(place.rank, place.size, place.local_rank)
        except (SystemExit, Interrupted):
            # All leave. Threads of the group that met the end of the interpreter would abort the process.
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def need_group() -> None:
    """A process group of one, if there is none yet: some libraries want one even then."""
    if not dist.is_initialized():
        _begin_group(Place(0, 1, 0, "", 0), dist.HashStore(), MEETING)  # type: ignore[attr-defined]


def check_same_everywhere(world: World, facts: Mapping[str, str]) -> None:
    """Refuse a run whose ranks do not all agree on every fact: configuration, data, base model, versions.

    Raises:
        UsageError: with a table of what differs on which rank.
    """
    found = world.gather(dict(facts))
    rows = []
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each.get(name, "(nothing)") for each in found]
        if len(set(values)) > 1:
            groups = {value: [r for r, other in enumerate(values) if other == value] for value in values}
            rows += [f"  {name}: {_ranks(ranks)}: {value[:_WIDEST]}" for value, ranks in groups.items()]
    if rows:
        raise UsageError(
            "the ranks differ in what they would train:\n" + "\n".join(rows),
            remedy="give every machine the same files, packages and configuration",
        )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _begin_group(place: Place, store: Any, timeout: float) -> None:
    backend = _backend(place)
    # srun sets none of these; other libraries (DeepSpeed, trackers) read them.
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(place.local_rank))
    if place.rank:
        logger.setLevel(logging.ERROR)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=limit)


def _backend(place: Place) -> str:
    """What carries the tensors of each device; chooses this process's GPU."""
    if hardware.device() == "cpu":
        return "gloo"
    if not dist.is_nccl_available():
        raise UsageError(
            "this build of torch has no nccl, so that GPUs cannot work together",
            remedy="install a torch with nccl (Linux), or hide the GPUs: CUDA_VISIBLE_DEVICES=''",
        )
    if place.local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {place.rank} would use GPU {place.local_rank} of {torch.cuda.device_count()}",
            remedy="start at most one rank for each GPU",
        )
    torch.cuda.set_device(place.local_rank)
    return "cpu:gloo,cuda:nccl"


def _meet(place: Place) -> Any:
    """The store that rank 0 (or torchrun) serves, once all ranks are there."""
    url = f"tcp://{place.host}:{place.port}"
    try:
        store, *_ = next(rendezvous(url, place.rank, place.size, timeout=timedelta(seconds=MEETING)))
    except (dist.DistError, ValueError) as error:
        cause = str(error).splitlines()[0]
        if "EADDRINUSE" in cause:
            raise UsageError(
                f"port {place.port} is taken by another process",
                place=url,
                remedy="set MASTER_PORT to a free port, the same for all ranks",
            ) from error
        raise UsageError(
            f"rank {place.rank} of {place.size} did not meet the others within {MEETING:.0f} s: {cause}",
            place=url,
            remedy="check MASTER_ADDR and MASTER_PORT (the machine of rank 0, reachable from here), "
            "and that every rank was started",
        ) from error
    return store
