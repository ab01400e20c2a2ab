"""ShareGPT: ``conversations`` of ``from`` and ``value``, or whatever names a registry entry gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.formats.common import Format, RowData, conversation, list_of, text_of, tools_of
from lorakit.data.formats.openai import message
from lorakit.data.sample import Message, Sample
from lorakit.errors import DataError


@dataclass(frozen=True)
class Tags:
    """The keys of a turn, and the names of each role in it."""

    role: str = "from"
    content: str = "value"
    user: tuple[str, ...] = ("human", "user")
    assistant: tuple[str, ...] = ("gpt", "assistant", "chatgpt", "bot", "model")
    observation: tuple[str, ...] = ("observation", "tool", "function_response")
    function: tuple[str, ...] = ("function_call",)
    system: tuple[str, ...] = ("system",)

    @property
    def names(self) -> Mapping[str, str]:
        """What is written to what is meant."""
        roles = {
            "user": self.user,
            "assistant": self.assistant,
            "tool": self.observation,
            "call": self.function,
            "system": self.system,
        }
        return {name: role for role, names in roles.items() for name in names}


TAGS = Tags()


def convert(row: RowData, place: str, tags: Tags = TAGS, key: str = "conversations") -> Sample:
    """The turns of a row; its ``system`` gives way to a system turn."""
    turns = list_of(row[key], key, place)
    names = tags.names
    messages = [_message(turn, number, tags, names, place) for number, turn in enumerate(turns, start=1)]
    system = text_of(row.get("system"), "system", place)
    if system and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", system))
    return conversation(messages, place, tools_of(row.get("tools"), place))


def _message(turn: Any, number: int, tags: Tags, names: Mapping[str, str], place: str) -> Message:
    written = turn.get(tags.role) if isinstance(turn, dict) else None
    role = names.get(written) if isinstance(written, str) else None
    if role is None:
        said = f"message {number} needs a {tags.role} out of {', '.join(names)}"
        raise DataError(f"{said}; found {written!r}" if written is not None else said, place=place)
    plain = {key: turn[key] for key in ("weight", "train", "tool_calls") if turn.get(key) is not None}
    if role == "call":
        calls = turn.get(tags.content)
        text = calls.strip() if isinstance(calls, str) else calls
        listed = isinstance(text, list) or (isinstance(text, str) and text.startswith("["))
        plain["tool_calls"] = text if listed else [text]
        return message({"role": "assistant", **plain}, number, place)
    return message({"role": role, "content": turn.get(tags.content), **plain}, number, place)


SHAREGPT = Format("sharegpt", frozenset({"conversations"}), convert)
