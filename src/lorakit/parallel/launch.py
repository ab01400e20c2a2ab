"""`lorakit train C.yaml --nproc N`: one command N times on this machine, as the ranks of a run. No torch here.

Signals go to every rank, once: the ranks are out of the terminal's reach, so that Ctrl-C does not count twice.
When one rank fails the others end by themselves, see `watch`; those that do not are killed after a while. On
several machines torchrun or srun start the same program instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from lorakit.errors import UsageError
from lorakit.log import logger
from lorakit.parallel.place import find_place

GRACE = 20.0  # seconds that the other ranks get after one has failed
LAUNCHER = "LORAKIT_LAUNCHER"  # tells a rank which process started it
_POLL = 0.05
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # a wish, not a failure: the others save and follow
_FORWARDED = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


def launch(nproc: int, command: Sequence[str]) -> int:
    """Run ``command`` as ``nproc`` ranks and wait for them.

    Rank 0 has this process's standard input and output; what the others print goes nowhere, errors excepted.

    Args:
        nproc: number of ranks: with GPUs at most one each.
        command: of one rank, such as ``[sys.executable, "-m", "lorakit", "train", "C.yaml"]``.

    Returns:
        The exit code of the rank that failed first (128 + n for signal n), 0 if none did.

    Raises:
        UsageError: a number below 1, or this process is a rank already.
    """
    if nproc < 1:
        raise UsageError(f"--nproc {nproc}: at least one process is needed")
    if find_place(os.environ) is not None:
        raise UsageError(
            "--nproc starts ranks, and this process was started as one already",
            remedy="leave out --nproc under torchrun or srun",
        )
    port = _free_port()
    ranks = []
    for rank in range(nproc):
        only = None if rank == 0 else subprocess.DEVNULL
        environment = _environment(os.environ, rank, nproc, port)
        ranks.append(
            subprocess.Popen(command, env=environment, stdin=only, stdout=only, start_new_session=True)
        )
    with _forwarding(ranks):
        return _wait(ranks)


def _environment(known: Mapping[str, str], rank: int, nproc: int, port: int) -> dict[str, str]:
    threads = str(max((os.cpu_count() or 1) // nproc, 1))
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        "OMP_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": loopback,  # it would look up this machine's name, which may have no address
        **known,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The first failure's exit code, once all ranks have ended."""
    first, limit = 0, float("inf")
    while any(rank.poll() is None for rank in ranks):
        if not first:
            first = _failure(ranks)
            if first and first not in _STOPPED:
                limit = time.monotonic() + GRACE
        if time.monotonic() > limit:
            _send(ranks, signal.SIGKILL)
        time.sleep(_POLL)
    return first or _failure(ranks)


def _failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Exit code of a rank that has failed, of one that was killed if there is one; 0 if none has."""
    codes = {number: rank.returncode for number, rank in enumerate(ranks) if rank.returncode}
    killed = {number: code for number, code in codes.items() if code < 0}
    for number, code in killed.items():
        name = signal.Signals(-code).name
        logger.error("rank %d (process %d) was ended by %s", number, ranks[number].pid, name)
        return 128 - code
    return next(iter(codes.values()), 0)


@contextlib.contextmanager
def _forwarding(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within the block what this process is told by a signal, its ranks are told."""

    def forward(signum: int, frame: FrameType | None) -> None:
        _send(ranks, signum)

    before = {signum: signal.signal(signum, forward) for signum in _FORWARDED}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _send(ranks: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(signum)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
