"""Rows of tables: CSV and TSV with a header, and Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from lorakit.data.raw import BOM, ROW_LIMIT, RawRow, not_utf8
from lorakit.errors import DataError

_PARQUET_BATCH = 256


class _Lines:
    """Lines of text for the csv module, which go on after a line that is not UTF-8."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.offset = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line, start = self._stream.readline(ROW_LIMIT), self.offset
        if not line:
            raise StopIteration
        self.offset += len(line)
        return (line.removeprefix(BOM) if start == 0 else line).decode("utf-8")


def csv_rows(path: Path, stream: BinaryIO, delimiter: str) -> Iterator[RawRow]:
    """The rows of a table of text.

    Raises:
        DataError: the first row names no columns, or one of them twice.
    """
    csv.field_size_limit(ROW_LIMIT)
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        start, problem, cells = lines.offset, None, []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            problem = not_utf8(error, lines.offset - len(error.object))
        except csv.Error as error:
            problem = f"not a row of a table: {error}"
        if header is None:
            header = _header(cells, problem, str(path))
        elif cells or problem:
            number += 1
            if problem is None and len(cells) != len(header):
                problem = f"the row has {len(cells)} cells, the header names {len(header)}"
            value = None if problem else dict(zip(header, cells, strict=True))
            yield RawRow(f"{path}: row {number}", value, start, problem)


def _header(cells: list[str], problem: str | None, place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if problem is not None:
        raise DataError(f"the header: {problem}", place=place)
    if "" in names:
        raise DataError(f"the header has no name for column {names.index('') + 1}", place=place)
    if twice:
        raise DataError(f"the header names {', '.join(twice)} twice", place=place)
    return names


def parquet_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a Parquet file, a batch at a time.

    Raises:
        DataError: it is no Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            classes = _class_names(file.schema_arrow.metadata or {})
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield named_classes(RawRow(f"{path}: row {number}", row), classes)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a Parquet file, or damaged: {error}", place=str(path)) from error


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    """The names of class numbers, which `datasets` writes into a Parquet file."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {column: kind["names"] for column, kind in features.items() if kind["_type"] == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def named_classes(row: RawRow, classes: Mapping[str, Sequence[str]]) -> RawRow:
    """The row with the names of its classes in place of their numbers."""
    value = dict(row.value)
    for column, names in classes.items():
        number = value.get(column)
        if isinstance(number, int):
            if not 0 <= number < len(names):
                return RawRow(
                    row.place, None, row.offset, f"{column} {number} is none of the {len(names)} classes"
                )
            value[column] = names[number]
    return RawRow(row.place, value, row.offset)
