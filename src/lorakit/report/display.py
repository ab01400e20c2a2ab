"""What a person sees during training: a live bar on a terminal, plain lines everywhere else.

Showing progress is never a reason to lose a run: a stream that is closed, hung up or cannot spell a character
costs the line, not the training.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lorakit.report.numbers import blend, duration

_WINDOW = 50  # steps whose pace the remaining time is judged by
_FIELDS = (  # (key of a train event, words)
    ("learning_rate", "lr {:.1e}"),
    ("grad_norm", "grad {:.2f}"),
    ("tokens_per_second", "{:.0f} tok/s"),
    ("memory_gb", "{:.1f} GB"),
)


class Display(Protocol):
    """Progress of one training; enter it around the loop."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def advance(self, step: int, loss: float) -> None:
        """One step is done; cheap, called for every step."""

    def log(self, entry: Mapping[str, Any]) -> None:
        """Show a train event of the metrics file."""

    def note(self, text: str) -> None:
        """Show a line of text."""


def make_display(total_steps: int, stream: TextIO | None = None) -> Display:
    """A live bar if ``stream`` (default: stderr) is a terminal that can redraw, else plain lines."""
    safe = SafeStream(sys.stderr if stream is None else stream)
    if safe.isatty() and os.environ.get("TERM", "").lower() not in {"dumb", "unknown"}:
        return LiveDisplay(total_steps, safe)
    return PlainDisplay(total_steps, safe)


class SafeStream:
    """A text stream whose ``write`` never raises for what is wrong at the other end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Write, with ``?`` for characters that the stream's encoding lacks."""
        with contextlib.suppress(OSError, ValueError):  # gone, hung up, or closed
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush, if there is still somebody to flush to."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether a terminal listens."""
        return not self._stream.closed and self._stream.isatty()


class _Pace:
    """Remaining time, judged by the latest steps, so that neither a resumed start nor an old pause counts."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._marks: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def mark(self, step: int) -> None:
        self._marks.append((step, time.monotonic()))

    def remaining(self) -> float | None:
        if len(self._marks) < 2:
            return None
        (first, began), (last, ended) = self._marks[0], self._marks[-1]
        return (ended - began) / (last - first) * (self._total - last) if last > first else None


class PlainDisplay:
    """One line per logged step."""

    def __init__(self, total_steps: int, stream: SafeStream) -> None:
        self._total = total_steps
        self._stream = stream
        self._pace = _Pace(total_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.flush()

    def advance(self, step: int, loss: float) -> None:
        """Keep time."""
        self._pace.mark(step)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Print the event as one line."""
        parts = [f"step {entry['step']}/{self._total}", f"loss {entry['loss']:.3f}", *_words(entry)]
        if (remaining := self._pace.remaining()) is not None:
            parts.append(f"eta {duration(remaining)}")
        self.note("  ".join(parts))

    def note(self, text: str) -> None:
        """Print the text."""
        self._stream.write(f"{text}\n")
        self._stream.flush()


class LiveDisplay:
    """A bar that redraws itself, with the latest numbers below it."""

    def __init__(self, total_steps: int, stream: SafeStream) -> None:
        self._total = total_steps
        self._pace = _Pace(total_steps)
        self._console = Console(file=cast(TextIO, stream), highlight=False)
        self._step = 0
        self._loss: float | None = None
        self._latest: list[str] = []
        self._live = Live(get_renderable=self._picture, console=self._console, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def advance(self, step: int, loss: float) -> None:
        """Move the bar; its redrawing thread shows it at the next turn."""
        self._pace.mark(step)
        self._step = step
        self._loss = blend(self._loss, loss)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Replace the numbers below the bar."""
        self._latest = _words(entry)

    def note(self, text: str) -> None:
        """Print the text above the bar."""
        self._console.print(text, markup=False)

    def _picture(self) -> Group:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        remaining = self._pace.remaining()
        count = f"{self._step}/{self._total}" + ("" if remaining is None else f"  eta {duration(remaining)}")
        bar.add_row(ProgressBar(total=self._total, completed=self._step), count)
        loss = [] if self._loss is None else [f"loss {self._loss:.3f}"]
        return Group(
            bar, Text("  ".join([*loss, *self._latest]), style="dim", no_wrap=True, overflow="ellipsis")
        )


def _words(entry: Mapping[str, Any]) -> list[str]:
    """The numbers of a train event; what it does not tell is left out."""
    return [words.format(entry[key]) for key, words in _FIELDS if entry.get(key) is not None]
