"""Alpaca: ``instruction``, ``output`` and, if wanted, ``input``, ``system``, ``history`` and ``tools``."""

from __future__ import annotations

from lorakit.data.formats.common import Format, RowData, conversation, list_of, text_of, tools_of
from lorakit.data.sample import Message, Sample
from lorakit.errors import DataError


def convert(row: RowData, place: str) -> Sample:
    """``history`` holds pairs of turns that went before; ``input`` follows ``instruction`` on a new line."""
    messages = []
    if system := text_of(row.get("system"), "system", place):
        messages.append(Message("system", system))
    for question, answer in _pairs(row.get("history"), place):
        messages.append(Message("user", text_of(question, "a turn of history", place)))
        messages.append(Message("assistant", text_of(answer, "a turn of history", place)))
    parts = [text_of(row.get(key), key, place) for key in ("instruction", "input")]
    messages.append(Message("user", "\n".join(part for part in parts if part)))
    messages.append(Message("assistant", text_of(row.get("output"), "output", place)))
    return conversation(messages, place, tools_of(row.get("tools"), place))


def _pairs(history: object, place: str) -> list[list[object]]:
    said = "history must be a list of [question, answer] pairs"
    try:
        pairs = list_of(history or [], "history", place)
    except DataError as error:
        raise DataError(said, place=place) from error
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(said, place=place)
    return pairs


ALPACA = Format("alpaca", frozenset({"instruction", "output"}), convert)
