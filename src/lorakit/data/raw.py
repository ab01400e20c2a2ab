"""A row as a file gives it, and the texts that say why it is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROW_LIMIT = 64 * 1024 * 1024  # bytes
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the file.

    Attributes:
        place: ``file:line`` or ``file: row N``.
        value: what was parsed; None where ``problem`` says why nothing could be.
        offset: the byte of the (unpacked) file where the row or its mistake begins, if there is such a thing.
        problem: the rule that the row breaks.
    """

    place: str
    value: Any
    offset: int | None = None
    problem: str | None = None


def not_utf8(error: UnicodeDecodeError, start: int) -> str:
    """The rule that bytes break; ``start`` is where the decoded bytes begin in the file."""
    return f"not UTF-8 text (byte {start + error.start}: {error.object[error.start]:#04x})"


def not_json(error: Exception, text: str, at: int) -> str:
    """The rule that a text breaks, with what stands around the place."""
    said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    snippet = text[max(at - 30, 0) : at + 30].replace("\n", " ").strip()
    return f"not JSON: {said} near {snippet!r}"
