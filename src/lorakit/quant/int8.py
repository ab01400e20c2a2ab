"""Eight bits per weight: rows over their absolute maximum (LLM.int8, arXiv 2208.07339, §2.1).

W[o, i] ≈ codes[o, i] · SCB[o] / 127. The format's ``threshold`` is that of the paper's mixed decomposition:
input columns with an entry of at least that magnitude are not rounded to 8 bits where products run on integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorakit.errors import ModelError

_CHUNK = 1 << 20  # weights handled at once


@dataclass(frozen=True)
class Int8:
    """How a weight is kept in eight bits: ``weight`` int8 [out, in] and ``SCB`` float32 [out]."""

    threshold: float = 0.0
    integer: bool = True  # multiply on integers where that pays and is good enough (`lorakit.ops.int8`)

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8

    def empty(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Tensors of the right sizes, not filled."""
        return {
            "weight": torch.empty(shape, dtype=torch.int8, device=device),
            "SCB": torch.empty(shape[0], device=device),
        }

    def quantize(self, W: Tensor) -> dict[str, Tensor]:
        """The tensors for a weight [out, in] of any float dtype; ``ModelError`` if it is not finite."""
        W = W.detach()
        tensors = self.empty(tuple(W.shape), W.device)
        for rows in _row_spans(W):
            part = W[rows].float()
            absmax = part.abs().amax(1)
            tensors["SCB"][rows] = absmax
            # A row of zeros has no scale: nothing over anything is zero.
            tensors["weight"][rows] = (
                (part * (127.0 / absmax.clamp_min(1e-38))[:, None]).round_().to(torch.int8)
            )
        if not tensors["SCB"].isfinite().all():
            raise ModelError(
                "the weight holds NaN or infinity, which eight bits cannot",
                remedy="download the model again, or check where it was made",
            )
        return tensors

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Code times SCB/127 in float32, rounded once to ``dtype``."""
        out = torch.empty(shape, dtype=dtype, device=tensors["weight"].device)
        start = 0
        for block in self.blocks(tensors, (shape[0], shape[1]), dtype):
            out[start : start + len(block)] = block
            start += len(block)
        return out

    def blocks(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """The rows of `dequantize`, some at a time."""
        codes, scale = tensors["weight"], tensors["SCB"] * (1 / 127)
        for rows in _row_spans(codes):
            yield (codes[rows] * scale[rows, None]).to(dtype)


def _row_spans(W: Tensor) -> list[slice]:
    """Rows of a matrix in chunks of bounded size."""
    step = max(1, _CHUNK // max(1, W.shape[1]))
    return [slice(start, start + step) for start in range(0, W.shape[0], step)]
