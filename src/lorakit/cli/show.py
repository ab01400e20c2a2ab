"""How verbs put results on stdout: plain aligned text for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click


def emit(value: Any, as_json: bool) -> None:
    """Print a result: a text, a mapping of name to value, or a list of mappings with the same keys."""
    if as_json:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    elif isinstance(value, Mapping):
        text = table(list(value.items()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        headers = list(value[0]) if value else []
        text = table([list(row.values()) for row in value], headers)
    else:
        text = str(value)
    click.echo(text)


def table(rows: Sequence[Sequence[object]], headers: Sequence[str] = ()) -> str:
    """Columns two spaces apart, numbers to the right, everything else to the left."""
    lines = [*([list(headers)] if headers else []), *([_cell(value) for value in row] for row in rows)]
    if not lines:
        return ""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [all(_is_number(value) for value in column) for column in zip(*rows, strict=True)]
    numeric = numeric or [False] * len(widths)
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
