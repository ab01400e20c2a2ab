"""The logger (to stderr, rank 0 only) and the metrics file (one JSON object a line)."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from lorakit.errors import StorageError

logger = logging.getLogger("lorakit")


def setup(level: int = logging.INFO) -> None:
    """Send lorakit's log to stderr, plain; ranks other than 0 only speak of errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR)


class MetricsFile:
    """``metrics.jsonl``: appended line by line, flushed at once, so that a killed run keeps its history.

    What the disk refuses is kept and tried again with the next line: a full disk does not end a training.
    """

    def __init__(self, path: Path | None) -> None:
        """``None``: nothing is kept, as on all ranks but the first."""
        self._path = path or Path(os.devnull)
        self._unwritten = b""
        try:
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error

    def write(self, event: str, **values: Any) -> None:
        """Append one object; ``event`` tells its kind (train, eval, note)."""
        late = bool(self._unwritten)
        line = json.dumps({"event": event, **values}, ensure_ascii=False) + "\n"
        self._unwritten += line.encode(errors="backslashreplace")  # a path need not be UTF-8; \udc80 is JSON
        try:
            self._flush()
        except OSError as error:
            if not late:
                logger.warning("ALARM: cannot write %s: %s; trying again later", self._path, error.strerror)

    def settle(self) -> int:
        """Bring every line to the disk; returns the file's size, the lines of earlier starts included.

        Raises:
            StorageError: the disk refuses.
        """
        try:
            self._flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without fsync
                raise StorageError(f"cannot write {self._path}: {error.strerror}") from error
        return self.size()

    def size(self) -> int:
        """Bytes of the file as it is, without what the disk refused."""
        return os.fstat(self._file.fileno()).st_size

    def _flush(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self.settle()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All events of a metrics file; a torn last line (a killed run) is left out."""
    events = []
    # Not splitlines(): U+2028 and friends may stand inside a JSON string. A torn line may end inside a letter.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events
