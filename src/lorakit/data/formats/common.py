"""What the formats share: a format as a value, checked texts, checked turns, tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.sample import Message, Sample
from lorakit.errors import DataError

RowData = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How a row becomes a sample.

    Attributes:
        name: what it is called in the log.
        needed: the keys that a row must have.
        convert: row and place to sample; ``DataError`` naming the rule that the row breaks.
    """

    name: str
    needed: frozenset[str]
    convert: Callable[[RowData, str], Sample]

    def sample(self, row: RowData, place: str) -> Sample:
        """One row as a sample.

        Raises:
            DataError: a key is missing, or the row breaks a rule of the format.
        """
        missing = self.needed - row.keys()
        if missing:
            raise DataError(
                f"{_names(missing)} missing in a row of the format {self.name}: found {{{_names(row)}}}",
                place=place,
                remedy=f"needed: {{{_names(self.needed)}}}",
            )
        return self.convert(row, place)


def text_of(value: object, what: str, place: str) -> str:
    """The value as checked text; nothing for None."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, not {type(value).__name__}", place=place)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{what} holds a lone surrogate at character {error.start}", place=place) from error
    return value


def filled(value: object, what: str, place: str) -> str:
    """The same where nothing is not enough."""
    text = text_of(value, what, place)
    if not text.strip():
        raise DataError(f"{what} is empty", place=place, remedy="fill it or remove the row")
    return text


def list_of(value: object, what: str, place: str) -> list[Any]:
    """A list, or one written as JSON text, as a CSV cell holds it."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, what, place)
    if not isinstance(value, list):
        raise DataError(f"{what} must be a list, not {type(value).__name__}", place=place)
    return value


def parsed(text: str, what: str, place: str) -> Any:
    """JSON inside a text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not JSON: {error}", place=place) from error


def tools_of(value: object, place: str) -> tuple[RowData, ...]:
    """Tools as OpenAI writes them, from a list or JSON text, each wrapped in ``function`` or bare."""
    if value is None or value == "":
        return ()
    tools = []
    for tool in list_of(value, "tools", place):
        bare = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(bare, dict) or not isinstance(bare.get("name"), str):
            raise DataError("each of tools must be an object with a name", place=place)
        tools.append({"type": "function", "function": bare})
    return tuple(tools)


def conversation(messages: Sequence[Message], place: str, tools: tuple[RowData, ...] = ()) -> Sample:
    """A chat of checked turns.

    Raises:
        DataError: turns in a wrong order, an empty one, or no answer to learn.
    """
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise DataError("a system message may only come first", place=place)
    if "assistant" not in roles:
        raise DataError("no assistant turn: there is nothing to learn here", place=place)
    roles = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(roles):
        if role not in _AFTER[roles[number - 1] if number else "start"]:
            found = ", ".join(roles[max(number - 4, 0) : number + 3])
            raise DataError(f"turns must alternate user, assistant, …; found {found}", place=place)
    if not all(message.content.strip() or _may_be_empty(message) for message in messages):
        raise DataError("an empty turn", place=place, remedy="fill it or remove the row")
    return Sample(tuple(messages), place, tools)


_AFTER: Mapping[str, tuple[str, ...]] = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def _may_be_empty(message: Message) -> bool:
    return message.role in {"system", "tool"} or bool(message.tool_calls)


def _names(keys: object) -> str:
    assert isinstance(keys, Mapping | frozenset | set)
    return ", ".join(sorted(str(key) for key in keys))
