"""Rows of JSONL files, and of JSON files: a list of objects, read one at a time, or one object of columns."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorakit.data.raw import BOM, ROW_LIMIT, RawRow, not_json, not_utf8
from lorakit.errors import DataError

_PIECE = 1 << 16
_SPACE = " \t\r\n"
_TAIL = 16  # a word, number or escape that is cut off fails this near to the end of what was read


def jsonl_rows(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    """The rows of a file with one object a line."""
    offset, number = 0, 0
    while line := stream.readline(ROW_LIMIT + 1):
        number += 1
        place, start = f"{path}:{number}", offset
        offset += len(line)
        if len(line) > ROW_LIMIT:
            raise DataError(f"a row of more than {ROW_LIMIT // 2**20} MiB", place=f"{place} (byte {start})")
        if number == 1:
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        try:
            yield RawRow(place, json.loads(line.decode("utf-8")), start)
        except UnicodeDecodeError as error:
            yield RawRow(place, None, start + error.start, not_utf8(error, start))
        except (ValueError, RecursionError) as error:
            text = line.decode("utf-8")
            at = error.pos if isinstance(error, json.JSONDecodeError) else 0
            yield RawRow(place, None, start + len(text[:at].encode()), not_json(error, text, at))


def json_rows(path: Path, stream: BinaryIO) -> Iterator[RawRow]:
    """The rows of a JSON file.

    Raises:
        DataError: it is not JSON from some place on, or neither a list nor columns.
    """
    text = _Window(path, stream)
    first = text.peek()
    if first == "[":
        yield from _list(path, text)
    elif first:
        yield from _columns(path, text)


def _list(path: Path, text: _Window) -> Iterator[RawRow]:
    text.skip()
    number = 0
    while text.peek() != "]":
        if number:
            text.expect(",")
            text.peek()
        number += 1
        place, offset = f"{path}: row {number}", text.offset
        yield RawRow(place, text.value(place), offset)
        if text.peek() not in (",", "]"):
            text.fail("Expecting ',' delimiter")
    text.skip()
    if text.peek():
        text.fail("Extra data")


def _columns(path: Path, text: _Window) -> Iterator[RawRow]:
    """``{"instruction": [...], "output": [...]}``; the file is read whole."""
    table = text.value(str(path), limit=None)
    if text.peek():
        text.fail("Extra data")
    if not isinstance(table, dict) or not table or not all(isinstance(cells, list) for cells in table.values()):
        raise DataError(
            "a .json file must hold a list of rows",
            place=str(path),
            remedy="wrap the rows in [ ] or name the file .jsonl if it holds one object a line",
        )
    lengths = {name: len(cells) for name, cells in table.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"columns of different length: {', '.join(f'{name} {n}' for name, n in lengths.items())}",
            place=str(path),
        )
    for number, cells in enumerate(zip(*table.values(), strict=True), start=1):
        yield RawRow(f"{path}: row {number}", dict(zip(table, cells, strict=True)))


class _Window:
    """The part of the file that is being parsed. Grows while a value does not fit, forgets what was parsed."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parser = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._fed = 0
        self.offset = 0  # bytes before the position

    def peek(self) -> str:
        """The next character that is no space, without passing it; empty at the end."""
        while True:
            text, at = self._text, self._at
            while at < len(text) and text[at] in _SPACE:
                at += 1
            self._move(at)
            if at < len(text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Pass one character."""
        self._move(self._at + 1)

    def expect(self, char: str) -> None:
        """Pass this character."""
        if self.peek() != char:
            self.fail(f"Expecting {char!r}")
        self.skip()

    def value(self, place: str, limit: int | None = ROW_LIMIT) -> Any:
        """Parse and pass the value at the position."""
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _TAIL
                if limit is not None and len(self._text) - self._at > limit:
                    raise DataError(
                        f"a row of more than {limit // 2**20} MiB", place=f"{place} (byte {self.offset})"
                    ) from error
                ahead = error.pos - self._at
                if not (cut and self._more()):
                    self._move(min(self._at + ahead, len(self._text)))
                    self.fail(error.msg)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    not_json(error, self._text, self._at), place=f"{place} (byte {self.offset})"
                ) from error
            else:
                self._move(end)
                return value

    def fail(self, said: str) -> None:
        """Raise: the text at the position is not JSON."""
        near = not_json(ValueError(said), self._text, self._at)
        raise DataError(near, place=f"{self._path} (byte {self.offset})")

    def _move(self, at: int) -> None:
        self.offset += len(self._text[self._at : at].encode())
        self._at = at

    def _more(self) -> bool:
        """Read on; the window at least doubles, so that long values are not parsed too often."""
        piece = self._stream.read(max(_PIECE, len(self._text) - self._at))
        try:
            text = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            start = self._fed + len(piece) - len(error.object)
            raise DataError(not_utf8(error, start), place=str(self._path)) from error
        if self._fed == 0 and piece.startswith(BOM):
            self.offset = len(BOM)
        self._fed += len(piece)
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(piece)
