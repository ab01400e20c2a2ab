"""Prompt and completion: two texts that stand as they are, or two lists of messages."""

from __future__ import annotations

from dataclasses import replace

from lorakit.data.formats.common import Format, RowData, conversation, filled, list_of, tools_of
from lorakit.data.formats.openai import message
from lorakit.data.sample import Message, Sample


def convert(row: RowData, place: str) -> Sample:
    """No template is laid over texts; of messages, only those of the completion are trained."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list):
        texts = (filled(prompt, "prompt", place), filled(completion, "completion", place))
        return Sample((Message("user", texts[0]), Message("assistant", texts[1])), place, kind="completion")
    turns = [*prompt, *list_of(completion, "completion", place)]
    messages = [message(turn, number, place) for number, turn in enumerate(turns, start=1)]
    given = [replace(turn, train=False) for turn in messages[: len(prompt)]]
    return conversation([*given, *messages[len(prompt) :]], place, tools_of(row.get("tools"), place))


COMPLETION = Format("prompt/completion", frozenset({"prompt", "completion"}), convert)
