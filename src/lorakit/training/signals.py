"""Ctrl-C, SIGTERM and SIGUSR1 as polite requests: noted at once, answered where the run can save its state."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lorakit.parallel.world import World

_ALONE = World()
_STOP = (signal.SIGINT, signal.SIGTERM)
_SAVE = signal.SIGUSR1 if hasattr(signal, "SIGUSR1") else None  # Windows has none


class Stopped(BaseException):  # like KeyboardInterrupt, no handler of errors may swallow it
    """Raised by `StopRequest.poll` where a run can be left; the recipe turns it into `errors.Interrupted`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopRequest:
    """Within the block the first SIGINT or SIGTERM only sets `signum`; a second one acts as usual.

    SIGUSR1 asks for a checkpoint, and the run goes on: `take_save` tells once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there only
            for signum in _STOP:
                self._before[signum] = signal.signal(signum, self._note)
            if _SAVE is not None:
                self._before[_SAVE] = signal.signal(_SAVE, self._note_save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore(*self._before)

    def poll(self, world: World = _ALONE) -> None:
        """Leave here if a signal asked for it: on any rank of ``world``, all of whose ranks call this alike."""
        if world.any(self.signum is not None):
            raise Stopped(max(signum or 0 for signum in world.gather(self.signum)))

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore(*_STOP)

    def _note_save(self, signum: int, frame: FrameType | None) -> None:
        self._save = True

    def _restore(self, *signums: int) -> None:
        for signum in signums:
            if signum in self._before:
                signal.signal(signum, self._before.pop(signum))
