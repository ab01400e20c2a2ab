"""Which format a row is in, told by its keys."""

from __future__ import annotations

from functools import partial
from typing import Any

from lorakit.data.formats import openai, sharegpt
from lorakit.data.formats.alpaca import ALPACA
from lorakit.data.formats.classification import CLASSIFICATION
from lorakit.data.formats.common import Format, RowData
from lorakit.data.formats.completion import COMPLETION
from lorakit.data.formats.openai import OPENAI
from lorakit.data.formats.sharegpt import SHAREGPT
from lorakit.data.formats.text import TEXT
from lorakit.data.sample import Sample
from lorakit.errors import DataError

# The first whose keys a row has is taken.
FORMATS: tuple[Format, ...] = (OPENAI, SHAREGPT, ALPACA, COMPLETION, CLASSIFICATION, TEXT)

_PREFERENCES = ("chosen", "rejected")


def recognise(row: RowData, place: str) -> Format:
    """The format of a row.

    Raises:
        DataError: naming the keys found and the ones needed.
    """
    for known in FORMATS:
        if known.needed <= row.keys():
            return _by_turn(known, row)
    found = ", ".join(sorted(map(str, row)))
    if set(_PREFERENCES) <= row.keys():
        raise DataError(
            f"a row with the keys {{{found}}} holds preferences (chosen, rejected), which are not trained on",
            place=place,
        )
    raise DataError(
        f"a row with the keys {{{found}}} is in no known format",
        place=place,
        remedy=f"needed: {' or '.join('{' + ', '.join(sorted(f.needed)) + '}' for f in FORMATS)}; "
        "other names are mapped by the columns of a dataset_info.json entry",
    )


def to_sample(row: RowData, place: str) -> Sample:
    """One row, whatever its format."""
    return recognise(row, place).sample(row, place)


def _by_turn(known: Format, row: RowData) -> Format:
    """People write either kind of turn under either key: the first turn tells."""
    if known not in (OPENAI, SHAREGPT):
        return known
    (key,) = known.needed
    turns: Any = row[key]
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    if known is OPENAI and "from" in first:
        return Format("sharegpt", known.needed, partial(sharegpt.convert, key=key))
    if known is SHAREGPT and "role" in first:
        return Format("openai", known.needed, partial(openai.convert, key=key))
    return known
