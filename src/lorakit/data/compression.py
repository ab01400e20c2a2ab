"""Bytes of a file, plain or compressed (``.gz``, ``.zst``), as a stream that never holds more than a piece.

A compressed file may grow to `EXPANSION_RATIO` times its size, and to `EXPANSION_FLOOR` bytes in any case;
what grows further is a bomb and refused.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lorakit.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".gz", ".zst")
EXPANSION_RATIO = 200
EXPANSION_FLOOR = 256 * 1024 * 1024

_ZSTD_PIECE = 1024  # compressed bytes a step: 4 of them can stand for 128 KiB
_ZSTD_WINDOW = 2**27


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed by its suffix.

    Raises:
        DataError: it cannot be read, is cut off, or grows beyond all measure.
    """
    try:
        with path.open("rb") as stream:
            if path.suffix in SUFFIXES:
                unpacked = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else _Zstd(stream)
                yield io.BufferedReader(_Bounded(unpacked, path))
            else:
                yield stream
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror or error}", place=str(path)) from error


class _Bounded(io.RawIOBase):
    """What comes out of a decompressor, up to the limit."""

    def __init__(self, inner: gzip.GzipFile | _Zstd, path: Path) -> None:
        self._inner = inner
        self._path = path
        self._limit = max(EXPANSION_FLOOR, EXPANSION_RATIO * path.stat().st_size)
        self._seen = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        try:
            data = self._inner.read(len(view))
        except EOFError as error:
            raise DataError("the compressed file is cut off", place=str(self._path)) from error
        except (zlib.error, gzip.BadGzipFile, _ZstdFault) as error:
            kind = "gzip" if self._path.suffix == ".gz" else "zstd"
            raise DataError(f"not a {kind} file, or damaged: {error}", place=str(self._path)) from error
        self._seen += len(data)
        if self._seen > self._limit:
            raise DataError(
                f"the file grows to more than {self._limit // 2**20} MiB when unpacked: a compression bomb",
                place=str(self._path),
                remedy="unpack it yourself if you trust it",
            )
        view[: len(data)] = data
        return len(data)


class _ZstdFault(Exception):  # noqa: N818 - never leaves this file
    """zstandard's error, under a name that needs no import of it."""


class _Zstd:
    """Frames of zstd one after the other; unlike its library's reader it notices that the last one is cut."""

    def __init__(self, stream: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._library = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._stream = stream
        self._frame = self._library.decompressobj()
        self._inside = False
        self._ready = b""

    def read(self, size: int) -> bytes:
        while not self._ready:
            piece = self._stream.read(_ZSTD_PIECE)
            if not piece:
                if self._inside:
                    raise EOFError
                return b""
            self._ready = self._unpack(piece)
        data, self._ready = self._ready[:size], self._ready[size:]
        return data

    def _unpack(self, piece: bytes) -> bytes:
        parts = []
        try:
            while piece:
                parts.append(self._frame.decompress(piece))
                self._inside = not self._frame.eof
                piece = self._frame.unused_data if self._frame.eof else b""
                if self._frame.eof:
                    self._frame = self._library.decompressobj()
        except self._error as error:
            raise _ZstdFault(str(error)) from error
        return b"".join(parts)
