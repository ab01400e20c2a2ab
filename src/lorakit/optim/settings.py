"""Further settings of a schedule or an optimizer (``lr_scheduler_kwargs``, ``optim_args``), and their checks.

No torch here, so that a configuration can be checked without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """What a value must be, for people and for the check."""

    expected: str
    accepts: Callable[[Any], bool]


def number(expected: str, within: Callable[[float], bool]) -> Setting:
    """A finite number; ``true`` is none."""
    return Setting(
        expected,
        lambda v: isinstance(v, int | float) and type(v) is not bool and math.isfinite(v) and within(v),
    )


def count(low: int = 1) -> Setting:
    """A whole number from ``low``."""
    return Setting(f"a whole number from {low}", lambda v: type(v) is int and v >= low)


def choice(*values: str | bool) -> Setting:
    """One of some words, or true and false."""
    texts = [str(v).lower() for v in values]
    return Setting(" or ".join(texts), lambda v: any(type(v) is type(one) and v == one for one in values))


def check(key: str, owner: str, given: Mapping[str, Any], known: Mapping[str, Setting]) -> None:
    """Refuse names that ``owner`` does not know, and values that it cannot use.

    Raises:
        UsageError: the first of them; ``key`` is where a configuration gives them.
    """
    for name, value in given.items():
        if name not in known:
            raise UsageError(
                f"{key}: {owner} has no setting {name}",
                remedy=f"it has {', '.join(known)}" if known else "it has none",
            )
        if not known[name].accepts(value):
            raise UsageError(f"{key}: {name} must be {known[name].expected}, not {value!r}")


def parse(text: str) -> dict[str, Any]:
    """``momentum=0.9, nesterov=true``, as the Hugging Face trainer takes ``optim_args``, as a mapping.

    Raises:
        UsageError: not of this form.
    """
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value) or name in found:
            raise UsageError(
                f"optim_args: cannot read {part.strip()!r}", remedy="write momentum=0.9,nesterov=true"
            )
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
