"""The logger (to stderr, rank 0 only) and the metrics file (one JSON object a line)."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

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
    """``metrics.jsonl``: appended line by line, flushed at once, so that a killed run keeps its history."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error

    def write(self, event: str, **values: Any) -> None:
        """Append one object; ``event`` tells its kind (train, eval, note)."""
        self._stream.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")
        self._stream.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


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
