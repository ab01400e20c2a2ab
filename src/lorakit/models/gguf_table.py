"""The table of contents of a GGUF file, and its tensors as float32, without transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from lorakit.modelinfo.gguf import GgufHeader, GgufRow, damaged, gguf_header

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
    header = gguf_header(path)
    try:
        return [_placed(row, header) for row in header.rows]
    except ValueError as error:  # of a format that is not known, too
        raise damaged(path, error) from error


def gguf_values(path: Path, tensor: GgufTensor) -> Iterator[Tensor]:
    """The values, a piece at a time; ``NotImplementedError`` for a number format that cannot be unpacked."""
    kind = GGMLQuantizationType[tensor.dtype]
    data = np.memmap(path, mode="r", offset=tensor.begin, shape=(tensor.size,))
    block, size = GGML_QUANT_SIZES[kind]
    step = _CHUNK // block * size
    for begin in range(0, tensor.size, step):
        yield torch.from_numpy(dequantize(np.array(data[begin : begin + step]), kind))


def _placed(row: GgufRow, header: GgufHeader) -> GgufTensor:
    dtype = GGMLQuantizationType(row.kind)
    block, size = GGML_QUANT_SIZES[dtype]
    needed, begin = math.prod(row.shape) // block * size, header.start + row.offset
    if begin + needed > header.size:
        raise ValueError(f"tensor {row.name[:200]!r} claims bytes beyond its end")
    return GgufTensor(row.name, row.shape, dtype.name, begin, needed)
