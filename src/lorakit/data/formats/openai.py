"""OpenAI: ``messages`` with roles, parts of text, tool calls, weights; and ``tools``."""

from __future__ import annotations

from typing import Any, cast

from lorakit.data.formats.common import Format, RowData, conversation, list_of, parsed, text_of, tools_of
from lorakit.data.sample import ROLES, Message, Role, Sample
from lorakit.errors import DataError

_OTHER_ROLES = {"developer": "system", "function": "tool"}
_THINKING = ("reasoning_content", "thinking")
_PLAIN = {"role", "content"}
_KNOWN = {"role", "content", "tool_calls", "function_call", "tool_call_id", "weight", "train", *_THINKING}


def convert(row: RowData, place: str, key: str = "messages") -> Sample:
    """Turns as they stand under ``key``."""
    turns = list_of(row[key], key, place)
    messages = [message(turn, number, place) for number, turn in enumerate(turns, start=1)]
    _check_answers(turns, place)
    return conversation(messages, place, tools_of(row.get("tools"), place))


def message(turn: Any, number: int, place: str) -> Message:
    """One turn; ``number`` names it in an error."""
    role = turn.get("role") if isinstance(turn, dict) else None
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ROLES:
        raise DataError(f"message {number} needs a role out of {', '.join(ROLES)}", place=place)
    if turn.keys() <= _PLAIN:  # by far the most frequent, and read in a third of the time
        return Message(cast(Role, role), content_of(turn.get("content"), number, place))
    known = _KNOWN | {"name"} if role == "tool" else _KNOWN
    extra = sorted(key for key, value in turn.items() if key not in known and value)
    if extra:
        raise DataError(f"message {number} has {', '.join(extra)}, which is not supported", place=place)
    calls = _calls(turn, number, place)
    if calls and role != "assistant":
        raise DataError(f"message {number}: only an assistant calls tools, not {role}", place=place)
    thinking = next((turn[key] for key in _THINKING if turn.get(key)), None)
    return Message(
        cast(Role, role),
        content_of(turn.get("content"), number, place),
        calls,
        _trained(turn, number, place),
        None if thinking is None else text_of(thinking, f"the thinking of message {number}", place),
    )


def content_of(value: object, number: int, place: str) -> str:
    """Text, or parts of text joined."""
    if not isinstance(value, list):
        return text_of(value, "content", place)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(f"message {number} has a part of type {kind}; only text is read", place=place)
        texts.append(text_of(part.get("text"), "the text of a part", place))
    return "".join(texts)


def call_of(value: object, what: str, place: str) -> dict[str, Any]:
    """A tool call as ``{"name": …, "arguments": {…}}``, from an object or JSON text."""
    call = parsed(value, what, place) if isinstance(value, str) else value
    call = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise DataError(f"{what} must be an object with a name and arguments", place=place)
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"the arguments of {what}", place)
    if not isinstance(arguments, dict | None):
        raise DataError(f"the arguments of {what} must be an object", place=place)
    return {"name": call["name"], "arguments": arguments or {}}


def _calls(turn: RowData, number: int, place: str) -> tuple[RowData, ...]:
    calls = list_of(turn.get("tool_calls") or [], "tool_calls", place)
    if turn.get("function_call"):
        calls = [*calls, turn["function_call"]]
    return tuple(call_of(call, f"a tool call of message {number}", place) for call in calls)


def _trained(turn: RowData, number: int, place: str) -> bool | None:
    train, weight = turn.get("train"), turn.get("weight")
    if not isinstance(train, bool | None):
        raise DataError(f"message {number}: train must be true or false", place=place)
    if weight not in (None, 0, 1):
        raise DataError(f"message {number}: weight must be 0 or 1", place=place)
    if train is not None and weight is not None and train != bool(weight):
        raise DataError(f"message {number}: train and weight contradict each other", place=place)
    return train if weight is None else bool(weight)


def _check_answers(turns: list[Any], place: str) -> None:
    """Each tool result must belong to one call of the turn before it."""
    calls: list[Any] = []
    for number, turn in enumerate(turns, start=1):
        if turn["role"] not in {"tool", "function"}:
            calls = [call.get("id") for call in turn.get("tool_calls") or [] if isinstance(call, dict)]
            continue
        answered = turn.get("tool_call_id")
        if answered is not None and answered not in calls:
            raise DataError(
                f"message {number} answers the tool call {answered!r}, which nobody made", place=place
            )
        if answered is None and (len(calls) > 1 or any(calls)):
            raise DataError(
                f"message {number} has no tool_call_id: which call it answers is unknown", place=place
            )


OPENAI = Format("openai", frozenset({"messages"}), convert)
