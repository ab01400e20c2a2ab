"""Rows from JSON and JSONL files. Every row keeps its place, so that an error can name it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import DataError

SUFFIXES = (".jsonl", ".json")


def find_files(paths: Sequence[str | Path]) -> list[Path]:
    """The data files behind files and folders (a folder gives its JSON and JSONL files, by name)."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
            if not inside:
                raise DataError("no .json or .jsonl file in this folder", place=str(path))
            files += inside
        elif not path.is_file():
            raise DataError("no such file or folder", place=str(path), remedy=_near(path))
        elif path.suffix not in SUFFIXES:
            raise DataError(f"{path.suffix or 'no suffix'}: not a kind of file that is read", place=str(path),
                            remedy=f"supported: {', '.join(SUFFIXES)}")  # fmt: skip
        else:
            files.append(path)
    return files


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one file with their places (``file:line`` in JSONL, ``file: row N`` in JSON).

    Raises:
        DataError: not UTF-8, not JSON, not objects, or no row at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text (byte {error.start}: {error.object[error.start]:#04x})", place=str(path)
        ) from error
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", place=str(path)) from error
    rows = _jsonl(path, text) if path.suffix == ".jsonl" else _json(path, text)
    empty = True
    for place, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise DataError(f"a row must be a JSON object, not {type(row).__name__}", place=place)
        yield place, row
    if empty:
        raise DataError("the file holds no rows", place=str(path))


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): U+2028 and friends may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    value = _parse(text, str(path)) if text.strip() else []
    if not isinstance(value, list):
        raise DataError(
            "a .json file must hold a list of rows",
            place=str(path),
            remedy="wrap the rows in [ ] or name the file .jsonl if it holds one object a line",
        )
    for number, row in enumerate(value, start=1):
        yield f"{path}: row {number}", row


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        at = error.pos if isinstance(error, json.JSONDecodeError) else 0
        snippet = text[max(at - 30, 0) : at + 30].replace("\n", " ")
        raise DataError(f"not JSON: {error} near {snippet!r}", place=place) from error


def _near(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"looked in {folder.resolve()}"
