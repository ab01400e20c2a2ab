"""Which process of a run this is, as its starter (torchrun, srun, `--nproc`) says. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.errors import UsageError

_PORT = 29500  # torchrun's own; each Slurm job gets one of the thousand from here


@dataclass(frozen=True)
class Place:
    """A process among all of a run, and where they meet."""

    rank: int
    size: int
    local_rank: int  # on its machine
    host: str
    port: int


def find_place(environ: Mapping[str, str]) -> Place | None:
    """The place that the environment names; None for a process on its own.

    ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` come first. Else the variables
    of a Slurm *step* are read: a batch script has Slurm's variables too, but without srun it is one process.

    Raises:
        UsageError: a variable that is missing, or no number, or out of range.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        size = _number(environ, "WORLD_SIZE")
        place = Place(
            _number(environ, "RANK"),
            size,
            _number(environ, "LOCAL_RANK"),
            environ.get("MASTER_ADDR", "127.0.0.1" if size == 1 else ""),
            _number(environ, "MASTER_PORT", _PORT if size == 1 else None),
        )
    elif "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_JOB_ID" not in environ):
        hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "")
        place = Place(
            _number(environ, "SLURM_PROCID"),
            _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"),
            _number(environ, "SLURM_LOCALID"),
            environ.get("MASTER_ADDR") or first_host(hosts),
            _number(environ, "MASTER_PORT", _PORT + _number(environ, "SLURM_JOB_ID", 0) % 1000),
        )
    else:
        return None
    if not 0 <= place.rank < place.size:
        raise UsageError(f"rank {place.rank} of {place.size} processes: ranks count from 0")
    if not place.host:
        raise UsageError("MASTER_ADDR is not set", remedy="set it to the address of the machine of rank 0")
    return place if place.size > 1 else None


def first_host(hosts: str) -> str:
    """The first name of a Slurm node list: ``gpu[03-07,12],big1`` → ``gpu03``."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", hosts)
    return "".join(part or "" for part in found.groups()) if found else ""


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UsageError(
            f"{name} is {'not set' if text is None else repr(text)}, it must be a whole number",
            remedy="start the ranks with `lorakit train --nproc N`, torchrun or srun, which set it",
        ) from None
