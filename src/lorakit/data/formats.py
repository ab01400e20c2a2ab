"""Row formats. Each is recognised by its keys and becomes a `Sample`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from lorakit.data.sample import ROLES, Message, Role, Sample
from lorakit.data.sources import find_files, read_rows
from lorakit.errors import DataError


def read_samples(paths: Sequence[str | Path], max_samples: int | None = None) -> list[Sample]:
    """Every row of the files and folders as a conversation.

    Args:
        paths: files or folders.
        max_samples: keep only this many rows of each file, from its start.

    Raises:
        DataError: naming the file, the row and the rule it breaks.
    """
    samples: list[Sample] = []
    for file in find_files(paths):
        for number, (place, row) in enumerate(read_rows(file)):
            if max_samples is not None and number >= max_samples:
                break
            samples.append(to_sample(row, place))
    return samples


def to_sample(row: dict[str, Any], place: str) -> Sample:
    """One row, whatever its format; ``DataError`` naming the keys found and the ones needed."""
    for needed, convert in _FORMATS:
        if needed <= row.keys():
            return Sample(_checked(convert(row, place), place), place)
    known = " or ".join("{" + ", ".join(sorted(keys)) + "}" for keys, _ in _FORMATS)
    raise DataError(
        f"a row with the keys {{{', '.join(sorted(row))}}} is in no known format",
        place=place,
        remedy=f"needed: {known}",
    )


def _alpaca(row: dict[str, Any], place: str) -> list[Message]:
    """``instruction``, ``output`` and, if wanted, ``input``, ``system`` and ``history`` (pairs of turns)."""
    messages = []
    if system := _text(row, "system", place):
        messages.append(Message("system", system))
    history = row.get("history") or []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise DataError("history must be a list of [question, answer] pairs", place=place)
    for question, answer in history:
        messages.append(Message("user", _checked_text(question, "a turn of history", place)))
        messages.append(Message("assistant", _checked_text(answer, "a turn of history", place)))
    parts = [_text(row, "instruction", place), _text(row, "input", place)]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    messages.append(Message("assistant", _text(row, "output", place)))
    return messages


def _openai(row: dict[str, Any], place: str) -> list[Message]:
    """``messages``: a list of ``{"role": …, "content": …}``."""
    turns = row["messages"]
    if not isinstance(turns, list):
        raise DataError(f"messages must be a list, not {type(turns).__name__}", place=place)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"message {number} needs a role out of {', '.join(ROLES)}", place=place)
        extra = sorted(key for key, value in turn.items() if key not in {"role", "content"} and value)
        if extra:
            raise DataError(f"message {number} has {', '.join(extra)}, which is not supported yet", place=place)
        messages.append(Message(cast(Role, turn["role"]), _text(turn, "content", place)))
    return messages


_FORMATS: tuple[tuple[frozenset[str], Callable[[dict[str, Any], str], list[Message]]], ...] = (
    (frozenset({"messages"}), _openai),
    (frozenset({"instruction", "output"}), _alpaca),
)


def _text(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    return "" if value is None else _checked_text(value, key, place)


def _checked_text(value: object, what: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, not {type(value).__name__}", place=place)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds a lone surrogate at character {error.start}", place=place) from error
    return value


def _checked(messages: list[Message], place: str) -> tuple[Message, ...]:
    turns = [m.role for m in messages]
    if "system" in turns[1:]:
        raise DataError("a system message may only come first", place=place)
    turns = turns[1:] if turns[:1] == ["system"] else turns
    if "assistant" not in turns:
        raise DataError("no assistant turn: there is nothing to learn here", place=place)
    expected = ["user", "assistant"] * len(turns)
    if turns != expected[: len(turns)]:
        raise DataError(f"turns must alternate user, assistant, …; found {', '.join(turns)}", place=place)
    if not all(m.content.strip() for m in messages if m.role != "system"):
        raise DataError("an empty turn", place=place, remedy="fill it or remove the row")
    return tuple(messages)
