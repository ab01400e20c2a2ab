"""Module paths against names and regular expressions, within a fixed time.

A regular expression can come from an adapter that somebody sent, and a few characters of it are enough to
keep Python's ``re`` busy for years; the ``regex`` library takes a deadline.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Iterable
from typing import Any, TypeVar

import regex

from lorakit.errors import UsageError

T = TypeVar("T")
Names = str | Iterable[str]

_META = frozenset(r"\^$*+?()[]{}|")
_LONGEST = 2000
_SECONDS = 0.5
_MOST_COPIES = 10_000


def is_expression(pattern: str) -> bool:
    """Whether ``pattern`` is a regular expression, not a plain name: it holds a character no name has.

    ``^path``, which PEFT writes for one very module, counts as a name.
    """
    return not _META.isdisjoint(pattern.removeprefix("^"))


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that ``pattern`` selects.

    A plain name selects the paths that are it or end in ``.name``, ``^path`` that path alone; a regular
    expression those that it matches as a whole (PEFT's rule).

    Raises:
        UsageError: not a regular expression, or it takes longer than half a second.
    """
    if not is_expression(pattern):
        if pattern.startswith("^"):
            return [path for path in paths if path == pattern[1:]]
        return [path for path in paths if path == pattern or path.endswith(f".{pattern}")]
    copies = math.prod(max(int(n), 1) for n in re.findall(r"\{(\d{1,9})", pattern))
    if len(pattern) > _LONGEST or copies > _MOST_COPIES:  # the engine writes counted parts out when it compiles
        raise UsageError(f"the regular expression {pattern!r:.80} is too large", remedy="write a list of names")
    deadline = time.monotonic() + _SECONDS
    try:
        compiled = _compiled(pattern)
        return [p for p in paths if compiled.fullmatch(p, timeout=max(deadline - time.monotonic(), 1e-6))]
    except regex.error as error:
        raise UsageError(f"{pattern!r:.80} is not a regular expression: {error}") from error
    except (TimeoutError, MemoryError, RecursionError) as error:
        raise UsageError(
            f"the regular expression {pattern!r:.80} takes longer than {_SECONDS} s", remedy="simplify it"
        ) from error


@functools.lru_cache(maxsize=10_000)  # regex keeps 500 of its own: too few for a large model's rank_pattern
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)


def first_match(patterns: Iterable[tuple[str, T]], path: str) -> T | None:
    """The value of the first pattern that selects ``path`` or its end, else None (PEFT's rank_pattern rule)."""
    for pattern, value in patterns:
        whole = rf"(.*\.)?({pattern})" if is_expression(pattern) else pattern
        if matching(whole, [path]):
            return value
    return None


def parse_names(key: str, names: Names) -> str | tuple[str, ...]:
    """A tuple of names from a list or a comma string; a string that is a regular expression stays one."""
    if isinstance(names, str):
        if is_expression(names):
            return names
        names = names.split(",")
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"{key} must hold names, not {names!r:.80}")
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def block_numbers(value: str | int | Iterable[int] | None) -> tuple[int, ...] | None:
    """``"0-3,8"``, 5 and [0, 1] as sorted block numbers."""
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    numbers: set[int] = set()
    for part in parts:
        bounds = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", str(part))
        if bounds is None or isinstance(part, bool):
            raise UsageError(
                f"layers_to_transform cannot be {value!r:.80}", remedy='write numbers such as [0, 1] or "0-3,8"'
            )
        first = int(bounds[1])
        numbers.update(range(first, int(bounds[2] or first) + 1))
    if not numbers:
        raise UsageError("layers_to_transform names no layer", remedy="leave it out to adapt all")
    return tuple(sorted(numbers))
