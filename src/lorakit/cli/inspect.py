"""``lorakit inspect``: what a file or folder of weights holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.show import emit, table

if TYPE_CHECKING:
    from lorakit.checkpoint.inspect import Inspection


@click.command()
@click.argument("weights", type=click.Path())
@click.option(
    "--limit", type=click.IntRange(min=0), default=20, show_default=True,
    help="Rows of each table; 0 for all. JSON always has all.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(weights: str, limit: int, as_json: bool) -> None:
    r"""Show the tensors of WEIGHTS: an adapter folder, a run directory, a .safetensors, .pth or .gguf file.

    For an adapter also the size and the effective rank of the update on each module, and what it belongs to.
    Nothing in the file is executed.

    \b
    lorakit inspect runs/addresses
    """
    found = _inspect(Path(weights))
    emit(_as_json(found) if as_json else _as_text(found, limit), as_json)


def _inspect(path: Path) -> Inspection:
    from lorakit.checkpoint import inspect as looking

    if path.suffix != ".gguf":
        return looking.inspect(path)
    from lorakit.models.gguf_table import gguf_table, gguf_values

    facts = [looking.tensor_facts(t.name, t.shape, t.dtype, gguf_values(path, t)) for t in gguf_table(path)]
    return looking.Inspection(str(path), "GGUF file", facts, [], {}, {}, [])


def _as_json(found: Inspection) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(found), "dead": found.dead, "non_finite": found.non_finite}


def _as_text(found: Inspection, limit: int) -> str:
    facts = {"path": found.path, "kind": found.kind, "tensors": len(found.tensors)}
    facts["values"] = sum(tensor.values for tensor in found.tensors)
    config = {key: value for key, value in found.config.items() if value not in (None, False, {}, [], "")}
    described = {**facts, **config, **_flat(found.notes)}
    parts = [table([(_safe(key), _short(value)) for key, value in described.items()])]
    updates = [
        (_safe(u.module), u.r, u.scaling, u.norm, u.effective_rank, u.stable_rank, u.rank_90, u.rank_99)
        for u in found.updates
    ]
    ranks = ("effective rank", "stable rank", "rank 90 %", "rank 99 %")
    parts += _cut(updates, ("module", "r", "scaling", "norm of ΔW", *ranks), limit)
    tensors = [(_safe(t.name), "×".join(map(str, t.shape)) or "scalar", t.dtype, t.norm) for t in found.tensors]
    parts += _cut(tensors, ("tensor", "shape", "format", "norm"), limit)
    for title, names in (("dead (ΔW = 0)", found.dead), ("NaN or infinity in", found.non_finite)):
        if names:
            parts.append(f"{title}: {_short(', '.join(names), 400)}")
    return "\n\n".join([*parts, *map(_safe, found.problems)])


def _flat(notes: dict[str, Any]) -> dict[str, Any]:
    """``{"base": {"weights": …}}`` as ``{"base weights": …}``."""
    pairs = [(key, value.items() if isinstance(value, dict) else [("", value)]) for key, value in notes.items()]
    return {f"{key} {inner}".strip(): value for key, items in pairs for inner, value in items}


def _cut(rows: Sequence[Sequence[object]], headers: Sequence[str], limit: int) -> list[str]:
    """The table, if it has rows, and how many of them are not shown."""
    shown = rows[:limit] if limit else rows
    more = len(rows) - len(shown)
    text = table(shown, headers)
    return [text + (f"\n… {more} more (--limit 0 shows all)" if more else "")] if rows else []


def _short(value: object, longest: int = 100) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _safe(text if len(text) <= longest else f"{text[:longest]}…")


def _safe(text: str) -> str:
    """Without what a terminal would obey: names come from a file that somebody sent."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
