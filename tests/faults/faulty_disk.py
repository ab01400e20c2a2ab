"""`faulty_disk.c` from Python: work done in a forked process on a disk that fails at its k-th change.

Only in a program that was started with the environment of `environment()`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OPEN, WRITE, SYNC, RENAME, REMOVE, MKDIR, CHMOD, RESIZE, LOCK = (1 << i for i in range(9))
GROWS = OPEN | WRITE | MKDIR | RESIZE  # what a full disk refuses
CHANGES = GROWS | SYNC | RENAME | REMOVE | CHMOD

Action = Literal["count", "kill", "cut", "cut back", "signal", "fail", "fail on"]
_ACTIONS: tuple[Action, ...] = ("count", "kill", "cut", "cut back", "signal", "fail", "fail on")


@dataclass(frozen=True)
class Fault:
    """What happens at the ``at``-th change (from 1) of these kinds.

    ``kill`` ends the process; ``cut`` takes from every file what was not flushed, too; ``cut back`` also
    takes back the renames in folders that were not flushed; ``signal`` sends the signal ``error``; ``fail``
    returns ``error`` once, ``fail on`` from there on.
    """

    action: Action
    kinds: int = CHANGES
    at: int = 0
    error: int = 0


@dataclass(frozen=True)
class Outcome:
    """How the work ended: what it returned as text, the name of an exception, or ``killed by SIGKILL``.

    With the changes counted, and their trace.
    """

    end: str
    changes: int = 0
    trace: tuple[str, ...] = ()


def compiler() -> str | None:
    """A C compiler, if there is one."""
    return shutil.which("cc") or shutil.which("gcc")


def environment(folder: Path) -> dict[str, str]:
    """The environment for a program that uses this module; the library is built in ``folder``."""
    library = folder / "faulty_disk.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler() or "cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


def arm(folder: Path, fault: Fault, log: int = -1) -> None:
    """From now on the disk below ``folder`` has this fault, in this process."""
    code = _ACTIONS.index(fault.action)
    _library().disk_arm(
        os.fsencode(folder.resolve()), fault.kinds, ctypes.c_long(fault.at), code, fault.error, log
    )


def disarm() -> int:
    """The disk is a good one again; returns the changes counted."""
    return int(_library().disk_disarm())


def run(folder: Path, fault: Fault, work: Callable[[], object]) -> Outcome:
    """Do ``work`` in a forked process whose disk below ``folder`` has the fault."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _serve(folder, fault, work, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        told = stream.read().decode().split("\n")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return Outcome(f"killed by {signal.Signals(-status).name}", trace=tuple(told[:-1]))
    if status:
        raise RuntimeError(f"the process ended with {status}: {told}")
    end, changes = told[-1].split(" ")
    return Outcome(end, int(changes), tuple(told[:-1]))


def _serve(folder: Path, fault: Fault, work: Callable[[], object], pipe: int) -> None:
    """The life of the forked process: it tells its trace and its end, and never returns."""
    try:
        arm(folder, fault, pipe)
        try:
            end = str(work())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            end = type(error).__name__
        os.write(pipe, f"{end} {disarm()}".encode())
        os._exit(0)
    finally:
        os._exit(3)


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.disk_arm.argtypes = [
        ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ]  # fmt: skip
    library.disk_arm.restype = None
    library.disk_disarm.restype = ctypes.c_long
    return library
