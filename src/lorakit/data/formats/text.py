"""Plain text for continued pre-training: ``{"text": …}``."""

from __future__ import annotations

from lorakit.data.formats.common import Format, RowData, filled
from lorakit.data.sample import Message, Sample


def convert(row: RowData, place: str) -> Sample:
    """All of the text is learnt."""
    return Sample((Message("assistant", filled(row["text"], "text", place)),), place, kind="text")


TEXT = Format("text", frozenset({"text"}), convert)
