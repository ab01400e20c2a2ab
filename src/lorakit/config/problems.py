"""A problem in a configuration, the places it concerns, and the text a person reads.

All problems of a file are collected and raised as one ``ConfigError``, each shown with its line, a caret
and what to write instead.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError

_SHOWN = 100  # characters of a source line that are shown


@dataclass(frozen=True)
class Place:
    """Where something is written: a line of a file, a ``key=value`` argument, or a file as a whole."""

    file: str
    line: int | None = None
    column: int | None = None
    source: str = ""
    width: int = 1

    def __str__(self) -> str:
        parts = (self.file, self.line, self.column if self.line else None)
        return ":".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where (a contradiction has several places), and the way out."""

    message: str
    key: str | None
    places: tuple[Place, ...]
    hint: str | None = None
    allowed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "message": self.message,
            "key": self.key,
            "places": [{"file": at.file, "line": at.line, "column": at.column} for at in self.places],
            "hint": self.hint,
            "allowed": list(self.allowed),
        }

    def render(self) -> str:
        """Message, places with carets, then the hint beside the last caret and the allowed values."""
        lines = [f"error[{ConfigError.code}]: {self.message}"]
        pointed = [place for place in self.places if place.column is not None]
        gutter = max(2, *(len(str(place.line or "")) for place in self.places))
        edge = " " * gutter + " |"
        previous: Place | None = None
        for place in self.places:
            if previous is None or previous.file != place.file:
                lines.append(f"{' ' * gutter}--> {place}")
                lines += [edge] if place in pointed else []
            if place in pointed:
                lines.append(f"{place.line or '':>{gutter}} | {printable(place.source)}".rstrip())
                lines.append(f"{edge} {_caret(place)}")
            previous = place
        if self.hint and pointed:
            lines[-1] += f" {self.hint}"
        elif self.hint:
            lines.append(f"{' ' * gutter} = help: {self.hint}")
        if self.allowed:
            start = f"{' ' * gutter} = allowed: "
            lines.append(
                textwrap.fill(
                    ", ".join(self.allowed),
                    width=_SHOWN,
                    initial_indent=start,
                    subsequent_indent=" " * len(start),
                )
            )
        return "\n".join(lines)


def printable(text: str) -> str:
    """One line without control characters (a tab takes one column), cut where it gets long."""
    plain = "".join(char if char.isprintable() else " " for char in text)
    return plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "…"


def config_error(problems: Sequence[Problem], name: str) -> ConfigError:
    """The one error for all problems found in ``name``, in the order of their lines."""
    ordered = sorted(problems, key=_position)
    return ConfigError(
        f"{len(ordered)} problem{'s' if len(ordered) > 1 else ''} in {name}",
        text="\n\n".join(problem.render() for problem in ordered),
        problems=tuple(ordered),
    )


def _caret(place: Place) -> str:
    start = min((place.column or 1) - 1, _SHOWN)
    end = min(start + max(place.width, 1), _SHOWN + 1)
    return " " * start + "^" * max(end - start, 1)


def _position(problem: Problem) -> tuple[bool, bool, int]:
    """Lines of the file first, then arguments, then what is missing altogether."""
    first = problem.places[0]
    return first.column is None, first.line is None, first.line or 0
