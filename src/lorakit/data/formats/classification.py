"""Classification: ``{"text": …, "label": …}`` becomes a question whose answer is the label."""

from __future__ import annotations

from lorakit.data.formats.common import Format, RowData, filled
from lorakit.data.sample import Message, Sample
from lorakit.errors import DataError


def convert(row: RowData, place: str) -> Sample:
    """The label is a name, or a whole number of at least 0 that stands for itself."""
    label, text = row["label"], filled(row["text"], "text", place)
    if type(label) is int and label >= 0:
        label = str(label)
    if not isinstance(label, str):
        shown = "null" if label is None else f"{label!r}"
        raise DataError(f"label must be a name or a whole number of at least 0, not {shown}", place=place)
    label = filled(label, "label", place)
    return Sample((Message("user", text), Message("assistant", label)), place, label=label)


CLASSIFICATION = Format("classification", frozenset({"text", "label"}), convert)
