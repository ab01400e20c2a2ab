"""One run at a time in a folder: a lock that names its holder and does not outlive it.

The system's own file lock decides, which ends with the process that holds it, however that ends. What the file
says (process, machine, since when) is for people, and decides only where the file system has no locks: there
the holder counts as gone when its machine has restarted since, or knows no such process any more.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lorakit.errors import ConflictError, StorageError
from lorakit.log import logger

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_MOST_BYTES = 4096
_held: set[int] = set()  # open lock files of this process


@dataclass(frozen=True)
class Holder:
    """The process that has a lock."""

    pid: int
    born: float  # when the process began: its number may be given away again
    host: str
    boot: str  # another one after each restart of the machine
    since: str  # when the lock was taken, ISO 8601

    @classmethod
    def myself(cls) -> Holder:
        """The process that asks."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(os.getpid(), psutil.Process().create_time(), socket.gethostname(), _boot(), now)

    @property
    def gone(self) -> bool:
        """Whether it has certainly ended; of a process on another machine nobody can tell."""
        if self.host != socket.gethostname():
            return False
        try:
            # Seconds: the time of birth is counted from that of the start of the machine, which is a guess.
            return self.boot != _boot() or abs(psutil.Process(self.pid).create_time() - self.born) > 2
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` within the block; it is removed at the end.

    Where the file system has no locks, two that ask in the very same moment may both get it.

    Raises:
        ConflictError: somebody else has it.
        StorageError: the file cannot be written.
    """
    try:
        descriptor = _take(path)
    except OSError as error:
        raise StorageError(
            f"cannot use the lock {path}: {error.strerror or error}",
            remedy="choose another output_dir",
        ) from error
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a forked child, which holds nothing
            _held.discard(descriptor)
            with contextlib.suppress(OSError):
                if _is_at(descriptor, path):
                    path.unlink()  # while it is still locked: nobody can have taken it in between
            os.close(descriptor)


def holder(path: Path) -> Holder | None:
    """The process that the lock file ``path`` names, unless it has certainly ended; changes nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = _read(descriptor)
    finally:
        os.close(descriptor)
    return None if found is None or found.gone else found


def _take(path: Path) -> int:
    """The open lock file, with this process written into it."""
    while True:
        with contextlib.ExitStack() as opened:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, descriptor)
            _refuse_holder(descriptor, path)
            if _is_at(descriptor, path):  # else its holder has just removed it: once more, with a new one
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(asdict(Holder.myself())).encode())
                opened.pop_all()
                return descriptor


def _refuse_holder(descriptor: int, path: Path) -> None:
    """Lock the file, or raise `ConflictError` with the name of who holds it."""
    locked, before = _try_lock(descriptor), _read(descriptor)
    remedy = "wait for it, or choose another output_dir"
    if locked is None and before and not before.gone:
        locked, remedy = False, f"{remedy}; if you know that it is over, remove {path}"
    if locked is False:
        who = before or "it has not said yet who it is"
        raise ConflictError(f"another run is writing to {path.parent}: {who}", remedy=remedy)
    if before:
        logger.info("the last run here ended without a word (%s); its lock is taken over", before)


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock was free; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _read(descriptor: int) -> Holder | None:
    """Who the file names; None if nobody, or nobody yet."""
    try:
        told = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        return Holder(int(told["pid"]), float(told["born"]), told["host"], told["boot"], told["since"])
    except (ValueError, TypeError, LookupError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return str(round(psutil.boot_time()))


def _leave_to_parent() -> None:
    """A forked child must not keep its parent's locks alive."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
