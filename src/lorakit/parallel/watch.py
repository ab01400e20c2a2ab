"""The first cause: when one rank fails, vanishes or falls silent, all others end within seconds and name it.

Each rank writes a heartbeat to the store where the ranks met, from a thread of its own, and looks for a cause
of failure there. A collective that waits for a dead rank cannot be interrupted from Python: gloo's fail at
once, of nccl's some wait for the whole timeout. So a rank whose main thread does not come back within `GRACE`
seconds after a cause is known ends from the thread. Files are written aside and renamed: no moment is a wrong
one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from lorakit.errors import Interrupted, LorakitError, RankError
from lorakit.log import logger
from lorakit.parallel.launch import LAUNCHER
from lorakit.parallel.place import Place

INTERVAL = 0.5  # seconds between heartbeats
SILENCE = 30.0  # without one, a rank counts as dead …
DOUBT = 3.0  # … and after a collective has failed, sooner
PATIENCE = 8.0  # that a failed collective waits to learn why
GRACE = 15.0
_LAST_WORDS = 2.0  # seconds in which the others read the cause before its store may close
_LEFT = b"left"
_VANISHED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Cause:
    """Why the run ends."""

    rank: int
    message: str
    exit_code: int

    def error(self) -> RankError:
        """What the other ranks raise."""
        return RankError(f"rank {self.rank} failed first: {self.message}", exit_code=self.exit_code)


class Watch:
    """Within the block this rank's failure is told to the others, and theirs to it.

    An exception that leaves the block becomes a `RankError` where another rank failed first.
    """

    def __init__(self, store: Any, place: Place) -> None:
        self._store = store.clone()  # a connection of its own, so that no call waits for the main thread's
        self._place = place
        self._launcher = int(os.environ.get(LAUNCHER, 0))  # `lorakit train --nproc`, if that is how it began
        self._watched = list(range(place.size)) if place.rank == 0 else [0]
        self._seen: dict[int, tuple[bytes, float]] = {}  # by rank: the last beat, and when it changed
        self._silence = SILENCE
        self._cause: Cause | None = None
        self._known, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorakit-watch", daemon=True)

    def __enter__(self) -> Watch:
        rank = self._place.rank
        self._store.set(f"who/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self._store.set(f"beat/{rank}", "0")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cause = None if error is None or isinstance(error, Interrupted) else self._blame(error)
        self._leave(_LAST_WORDS if cause else None)
        if cause and cause.rank != self._place.rank and isinstance(error, Exception):
            raise cause.error() from error

    def _blame(self, error: BaseException) -> Cause:
        """The first cause: what another rank left, or this error, which is then told to the others."""
        if _is_lost_connection(error):
            self._watched, self._silence = list(range(self._place.size)), DOUBT
            self._known.wait(PATIENCE)
        cause = self._cause or self._tell(_cause(self._place.rank, error))
        if cause.rank == self._place.rank:
            get_error_handler().record_exception(error)  # for torchrun's own summary, where that runs
        return cause

    def _tell(self, cause: Cause) -> Cause:
        """Leave a cause where all look for it; returns the first that anybody left."""
        try:
            return _from_store(self._store.compare_set("cause", "", json.dumps(asdict(cause))))
        except dist.DistError:  # rank 0, which holds the store, has ended
            return cause

    def _run(self) -> None:
        beats = 0
        while not self._leaving.wait(INTERVAL):
            beats += 1
            try:
                self._store.set(f"beat/{self._place.rank}", str(beats))
                self._cause = self._look()
            except dist.DistError:
                self._cause = Cause(0, "it vanished, and with it the place where the ranks meet", _VANISHED)
            if self._launcher and os.getppid() != self._launcher:
                self._cause = Cause(self._place.rank, "the process that started it has ended", _VANISHED)
            if self._cause:
                break
        else:
            return
        self._known.set()
        if not self._leaving.wait(GRACE):
            logger.error("%s", self._cause.error().render())
            os._exit(self._cause.exit_code)

    def _look(self) -> Cause | None:
        if self._store.check(["cause"]):
            return _from_store(self._store.get("cause"))
        now = time.monotonic()
        for rank in self._watched:
            if not self._store.check([f"beat/{rank}"]):
                continue  # it has not come yet; how long to wait for it is the business of `join`
            beat = self._store.get(f"beat/{rank}")
            last, since = self._seen.setdefault(rank, (beat, now))
            if beat != last:
                self._seen[rank] = (beat, now)
            elif beat != _LEFT and now - since > self._silence:
                who = self._store.get(f"who/{rank}").decode()
                return self._tell(
                    Cause(rank, f"it stopped without a word ({who}); out of memory, or killed?", _VANISHED)
                )
        return None

    def _leave(self, patience: float | None) -> None:
        """Stop watching. The rank that holds the store stays until the others left, or for ``patience``."""
        self._leaving.set()
        self._thread.join(PATIENCE)  # it may hang on a store whose machine is gone
        try:
            self._store.set(f"beat/{self._place.rank}", _LEFT)
            if self._place.rank == 0:
                self._wait_for_others(patience)
        except dist.DistError:
            logger.debug("the store of the run is gone already")

    def _wait_for_others(self, patience: float | None) -> None:
        end = None if patience is None else time.monotonic() + patience
        waiting = set(range(1, self._place.size))
        while waiting and (end is None or time.monotonic() < end) and self._look() is None:
            waiting = {rank for rank in waiting if self._store.get(f"beat/{rank}") != _LEFT}
            time.sleep(INTERVAL / 5)


def _from_store(text: bytes) -> Cause:
    return Cause(**json.loads(text))


def _cause(rank: int, error: BaseException) -> Cause:
    if isinstance(error, LorakitError):
        return Cause(rank, f"{error.code}: {error.message}", error.exit_code)
    code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else LorakitError.exit_code
    return Cause(rank, f"{type(error).__name__}: {error}".strip(), code)


def _is_lost_connection(error: BaseException) -> bool:
    """Whether an error is what a rank sees of another's end. Gloo's have no type, but name their source."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text or "connection" in text
    )
