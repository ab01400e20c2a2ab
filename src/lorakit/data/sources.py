"""The files behind a name, and the rows in a file. Every row keeps its place, so that an error can name it."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lorakit.data.compression import SUFFIXES, open_bytes
from lorakit.data.json_rows import json_rows, jsonl_rows
from lorakit.data.raw import BOM, ROW_LIMIT, RawRow, not_utf8
from lorakit.data.tables import csv_rows, parquet_rows
from lorakit.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
REGISTRY = "dataset_info.json"

_IN_FOLDERS = KINDS[:-1]  # a .txt in a folder is more often a note than a document
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")


def kind_of(path: Path) -> str | None:
    """The suffix that tells how a file is read, compression left out; None if it is not."""
    packed = path.suffix in SUFFIXES
    kind = Path(path.stem).suffix if packed else path.suffix
    return kind if kind in KINDS and not (packed and kind == ".parquet") else None


def find_files(path: str | Path) -> list[Path]:
    """The data files behind a file, a folder (its own files by name, no deeper) or a pattern with ``*``.

    Raises:
        DataError: there is none, or its kind is not read.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if _is_data(p) and kind_of(p) in _IN_FOLDERS)
        return inside or _nothing(
            f"no {', '.join(_IN_FOLDERS[:-1])} or {_IN_FOLDERS[-1]} file in this folder", path
        )
    if not path.exists() and glob.has_magic(str(path)):
        found = sorted(Path(name) for name in glob.iglob(str(path), recursive=True))  # noqa: PTH207 - the pattern may be absolute
        return [p for p in found if p.is_file() and _is_data(p) and kind_of(p)] or _nothing(
            "no data file has such a name", path
        )
    if not path.is_file():
        raise DataError("no such file or folder", place=str(path), remedy=_near(path))
    if kind_of(path) is None:
        raise _not_read(path)
    return [path]


def raw_rows(path: Path) -> Iterator[RawRow]:
    """The rows of one file, good and bad, read in pieces.

    Raises:
        DataError: the file cannot be read at all, or holds no row.
    """
    empty = True
    for row in _rows(path):
        empty = False
        yield row
    if empty:
        raise DataError("the file holds no rows", place=str(path))


def _rows(path: Path) -> Iterator[RawRow]:
    kind = kind_of(path)
    if kind == ".parquet":
        yield from parquet_rows(path)
        return
    with open_bytes(path) as stream:
        match kind:
            case ".jsonl":
                yield from jsonl_rows(path, stream)
            case ".json":
                yield from json_rows(path, stream)
            case ".txt":
                yield from _document(path, stream)
            case _:
                yield from csv_rows(path, stream, "\t" if kind == ".tsv" else ",")


def _document(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    """A text file is one document."""
    data = stream.read(ROW_LIMIT + 1)
    if len(data) > ROW_LIMIT:
        raise DataError(
            f"a document of more than {ROW_LIMIT // 2**20} MiB",
            place=str(path),
            remedy='split it, or write {"text": …} rows into a .jsonl file',
        )
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        start = len(data) - len(error.object)
        yield RawRow(str(path), None, start + error.start, not_utf8(error, start))
        return
    if text.strip():
        yield RawRow(str(path), {"text": text}, 0)


def _is_data(path: Path) -> bool:
    return path.name != REGISTRY and not path.name.startswith(".")


def _nothing(message: str, path: Path) -> list[Path]:
    raise DataError(message, place=str(path))


def _not_read(path: Path) -> DataError:
    if path.suffix in _ARCHIVES or path.name.endswith((".tar.gz", ".tar.zst")):
        return DataError("archives are not read", place=str(path), remedy="unpack it and name the folder")
    return DataError(
        f"{''.join(path.suffixes[-2:]) or 'no suffix'}: not a kind of file that is read",
        place=str(path),
        remedy=f"supported: {', '.join(KINDS)}, and all but Parquet packed as {' or '.join(SUFFIXES)}",
    )


def _near(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"looked in {folder.resolve()}"
