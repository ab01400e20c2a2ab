"""The table of contents of a GGUF file, and its tensors as float32, without transformers.

Every count and length is compared with the bytes the file has before it is followed.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from lorakit.errors import ModelError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_STEPS = 2_000_000  # lengths that are followed: a vocabulary has one a token and one a merge
_STRING, _ARRAY = 8, 9
_FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes
_UINT32 = 4
_MAX_DEPTH = 4
_CHUNK = 1 << 22  # values that are widened at once


@dataclass(frozen=True)
class GgufTensor:
    """One row of the table; ``begin`` is the first byte in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    size: int


def gguf_table(path: Path) -> list[GgufTensor]:
    """Name, shape (rows first, as in PyTorch) and number format of every tensor.

    Raises:
        ModelError: it cannot be read or is not what it claims.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).table()
    except OSError as error:
        raise ModelError(f"cannot read {path.name}: {error.strerror}", place=str(path)) from error
    except (ValueError, struct.error) as error:
        raise ModelError(
            f"this is not a usable GGUF file: {error}", place=str(path), remedy="download it again"
        ) from error


def gguf_values(path: Path, tensor: GgufTensor) -> Iterator[Tensor]:
    """The values, a piece at a time; ``NotImplementedError`` for a number format that cannot be unpacked."""
    kind = GGMLQuantizationType[tensor.dtype]
    data = np.memmap(path, mode="r", offset=tensor.begin, shape=(tensor.size,))
    block, size = GGML_QUANT_SIZES[kind]
    step = _CHUNK // block * size
    for begin in range(0, tensor.size, step):
        yield torch.from_numpy(dequantize(np.array(data[begin : begin + step]), kind))


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.steps = data, 0, 0

    def table(self) -> list[GgufTensor]:
        if self.take(4) != _MAGIC:
            raise ValueError(f"it begins with {self.data[:4]!r} instead of {_MAGIC!r}")
        version, tensors, fields = *self.numbers("<I"), *self.numbers("<QQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        alignment = 32
        for _ in self.counted(fields):
            key, kind = self.string(), self.number("<I")
            if key == b"general.alignment" and kind == _UINT32:
                alignment = self.number("<I")
            else:
                self.skip(kind, 0)
        rows = [self.row() for _ in self.counted(tensors)]
        if alignment < 1:
            raise ValueError(f"alignment {alignment}")
        start = -(-self.at // alignment) * alignment
        return [self.placed(*row, start) for row in rows]

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string().decode()
        dimensions = self.number("<I")
        if dimensions > 8:
            raise ValueError(f"tensor {name[:200]!r} has {dimensions} dimensions")
        shape = self.numbers(f"<{dimensions}Q")
        return name, tuple(reversed(shape)), *self.numbers("<IQ")

    def placed(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> GgufTensor:
        dtype = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[dtype]
        needed, begin = math.prod(shape) // block * size, start + offset
        if begin + needed > len(self.data):
            raise ValueError(f"tensor {name[:200]!r} claims bytes beyond its end")
        return GgufTensor(name, shape, dtype.name, begin, needed)

    def skip(self, kind: int, depth: int) -> None:
        """Go past one value."""
        if kind in _FIXED:
            self.go(_FIXED[kind])
        elif kind == _STRING:
            self.go(self.number("<Q"))
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            inner, count = self.numbers("<IQ")
            if inner in _FIXED:
                self.go(_FIXED[inner] * count)
                return
            for _ in self.counted(count):
                self.skip(inner, depth + 1)
        else:
            raise ValueError(f"unknown type {kind} in its metadata")

    def counted(self, count: int) -> range:
        self.steps += count
        if self.steps > _MAX_STEPS:
            raise ValueError(f"it claims {count} entries")
        return range(count)

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def number(self, layout: str) -> int:
        return self.numbers(layout)[0]

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, count: int) -> bytes:
        begin = self.at
        self.go(count)
        return self.data[begin : self.at]

    def go(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
