"""Four bits per weight: blocks of a flat weight over their absolute maximum, as codes of a 16-value codebook.

QLoRA (arXiv 2305.14314, §3): NF4 or FP4 codes in blocks of 64 with one float32 constant each, half a bit per
weight. Double quantisation keeps the constants in 8 bits (dynamic codebook, blocks of 256, less their mean),
which leaves 8/64 + 32/(64·256) = 0.127 bits. Packed bytes and constants are those of bitsandbytes on a CPU, bit
for bit, for any size of weight.

`dequantize_reference` is the definition; `FourBit.dequantize` gives the same bits in bounded memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.ops.products import FourBits
from lorakit.quant.codebooks import codebook, nearest, pairs, quick
from lorakit.quant.kernels import DTYPES, decode, installed

CONSTANTS_BLOCK = 256  # absolute maxima that share one constant of the second level
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # the block sizes that bitsandbytes has
_CHUNK = 1 << 18  # weights handled at once: 1 MB in float32 stays in a core's cache
_BLOCK = 1 << 20  # weights of a block of rows
_GRID = 65535  # steps of [-1, 1] to which bitsandbytes rounds on a CPU before it looks up an 8-bit code


@dataclass(frozen=True)
class FourBit:
    """How a weight is kept in four bits; the numbers themselves are tensors by name.

    ``weight`` uint8 [⌈n/2⌉, 1] has two codes a byte, the first in the high half; ``absmax`` float32 [blocks].
    With ``double`` absmax is uint8; ``nested_absmax`` float32 [⌈blocks/256⌉], ``offset`` float32 [] restore it.
    """

    kind: Literal["nf4", "fp4"] = "nf4"
    blocksize: int = 64
    double: bool = True

    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4") or self.blocksize not in BLOCKS:
            sizes = ", ".join(map(str, BLOCKS))
            raise ModelError(
                f"there is no 4-bit format {self.kind!r} with blocks of {self.blocksize}",
                remedy=f"nf4 or fp4 with blocks of {sizes}",
            )

    @property
    def name(self) -> str:
        """``nf4`` or ``fp4``."""
        return self.kind

    def empty(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Tensors of the right sizes, not filled."""
        n = math.prod(shape)
        blocks = -(-n // self.blocksize)
        constants = {"absmax": torch.empty(blocks, device=device)}
        if self.double:
            constants = {
                "absmax": torch.empty(blocks, dtype=torch.uint8, device=device),
                "nested_absmax": torch.empty(-(-blocks // CONSTANTS_BLOCK), device=device),
                "offset": torch.empty((), device=device),
            }
        return {"weight": torch.empty(-(-n // 2), 1, dtype=torch.uint8, device=device), **constants}

    def quantize(self, W: Tensor) -> dict[str, Tensor]:
        """The tensors for a weight of any shape and float dtype; ``ModelError`` if it is not finite."""
        flat = W.detach().reshape(-1)
        n = flat.numel()
        weight = torch.empty(-(-n // 2), 1, dtype=torch.uint8, device=W.device)
        absmax = torch.empty(-(-n // self.blocksize), device=W.device)
        for start, stop in _spans(n, _CHUNK):
            x = flat[start:stop].float()
            scales = absmax[start // self.blocksize : -(-stop // self.blocksize)]
            codes = _quick_codes(_scaled(x, self.blocksize, scales), self.kind)
            weight[start // 2 : -(-stop // 2), 0] = (codes[::2] << 4) | codes[1::2]
        if not absmax.isfinite().all():
            raise ModelError(
                "the weight holds NaN or infinity, which four bits cannot",
                remedy="download the model again, or check where it was made",
            )
        if not self.double:
            return {"weight": weight, "absmax": absmax}
        offset = absmax.mean()
        codes, nested = quantize_dynamic(absmax - offset)
        return {"weight": weight, "absmax": codes, "nested_absmax": nested, "offset": offset}

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The weight: each code's value times its block's constant in float32, rounded once to ``dtype``."""
        out = torch.empty(shape, dtype=dtype, device=tensors["weight"].device)
        self._decode(tensors, self.absmax(tensors), 0, out.view(-1))
        return out

    def blocks(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """The rows of `dequantize`, some at a time."""
        rows, features = shape
        absmax = self.absmax(tensors)
        kernel = (
            features % self.blocksize == 0 and dtype in DTYPES and kernel_fits(self, features, absmax.device)
        )
        aligned = self.blocksize // math.gcd(features, self.blocksize)  # so many rows end where a block ends
        for start, stop in _spans(rows, max(1, _BLOCK // (features * aligned)) * aligned):
            if kernel:
                packed = tensors["weight"].view(-1)[start * features // 2 : stop * features // 2]
                scales = absmax[start * features // self.blocksize : stop * features // self.blocksize]
                shape = stop - start, features
                yield decode(packed, scales, shape, dtype, kind=self.kind, blocksize=self.blocksize)
            else:
                out = torch.empty(stop - start, features, dtype=dtype, device=absmax.device)
                self._decode(tensors, absmax, start * features, out.view(-1))
                yield out

    def factor(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> FourBits:
        """The weight as products by matrix units take it."""
        kept = FourBits(shape, tensors["weight"], codebook(self.kind), self.blocksize, tensors["absmax"])
        if not self.double:
            return kept
        nested, offset = tensors["nested_absmax"], tensors["offset"]
        return kept._replace(dynamic=codebook("dynamic8"), nested=nested, offset=offset)

    def _decode(self, tensors: Mapping[str, Tensor], absmax: Tensor, first: int, out: Tensor) -> None:
        """The weight's numbers from the start of a block, number ``first``, until ``out`` is full."""
        packed = tensors["weight"].view(-1)
        # Two float32 values as one 64-bit number: half the look-ups, and rows of one element are the fast case.
        table = pairs(self.kind).to(packed.device).view(torch.int64).view(-1)
        for start, stop in _spans(out.numel(), _CHUNK):
            codes = packed[(first + start) // 2 : -(-(first + stop) // 2)]
            values = table.index_select(0, codes.int()).view(torch.float32)[: stop - start]
            scales = absmax[(first + start) // self.blocksize : -(-(first + stop) // self.blocksize), None]
            whole = len(values) // self.blocksize
            cut = whole * self.blocksize
            values[:cut].view(whole, self.blocksize).mul_(scales[:whole])
            values[cut:].mul_(scales[-1])
            out[start:stop] = values

    def absmax(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The constants of the blocks in float32."""
        if not self.double:
            return tensors["absmax"]
        return dequantize_dynamic(tensors["absmax"], tensors["nested_absmax"]) + tensors["offset"]


@functools.cache
def kernel_fits(form: FourBit, features: int, device: torch.device) -> bool:
    """Whether bitsandbytes is installed and its kernel for this device reads rows of this length right.

    Version 0.50's for AVX-512 does not where 16 divides the length but the block does not.
    """
    if not installed():
        return False
    plain, shape = replace(form, double=False), (5, features)
    tensors = plain.quantize(torch.linspace(-1.0, 1.0, 5 * features, device=device).view(shape))
    read = decode(
        tensors["weight"], tensors["absmax"], shape, torch.float32, kind=form.kind, blocksize=form.blocksize
    )
    return bool(torch.equal(read, plain.dequantize(tensors, shape, torch.float32)))


def dequantize_reference(
    form: FourBit, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The definition of `FourBit.dequantize`, one line a step; takes 17 times the memory of the weight."""
    packed = tensors["weight"].view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: math.prod(shape)]
    block = torch.arange(codes.numel(), device=codes.device) // form.blocksize
    values = codebook(form.kind).to(packed.device)[codes.long()]
    return (values * form.absmax(tensors)[block]).to(dtype).view(shape)


def quantize_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    """A flat float32 tensor in 8 bits: codes uint8 [n] and absolute maxima float32 [⌈n/256⌉]."""
    blocks = F.pad(x, (0, -x.numel() % CONSTANTS_BLOCK)).view(-1, CONSTANTS_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax[:, None])).clamp_(-1.0, 1.0)
    scaled.nan_to_num_(nan=-1.0)  # 0 · ∞: a block of zeros gets the lowest code
    place = ((scaled + 1) * (0.5 * _GRID) + 0.5).floor()
    return _codes(place / _GRID * 2 - 1, "dynamic8").view(-1)[: x.numel()], absmax


def dequantize_dynamic(codes: Tensor, absmax: Tensor) -> Tensor:
    """Undo `quantize_dynamic`, in float32."""
    values = codebook("dynamic8").to(codes.device).index_select(0, codes.int())
    blocks = F.pad(values, (0, -values.numel() % CONSTANTS_BLOCK)).view(-1, CONSTANTS_BLOCK)
    return (blocks * absmax[:, None]).view(-1)[: values.numel()]


def _scaled(x: Tensor, blocksize: int, absmax: Tensor) -> Tensor:
    """``x`` over the maximum of its block, in [-1, 1]; the maxima are written to ``absmax``.

    Full blocks are multiplied by the reciprocal, a shorter last one is divided, as in bitsandbytes.
    """
    whole = x.numel() // blocksize
    cut = whole * blocksize
    blocks, rest = x[:cut].view(whole, blocksize), x[cut:]
    scaled = torch.empty_like(x)
    if whole:
        torch.amax(blocks.abs(), dim=1, out=absmax[:whole])
        torch.mul(blocks, 1.0 / absmax[:whole, None].clamp_min(1e-38), out=scaled[:cut].view(whole, blocksize))
    if rest.numel():
        absmax[-1] = rest.abs().max().clamp_min(1e-38)
        torch.div(rest, absmax[-1], out=scaled[cut:])
    return scaled.clamp_(-1.0, 1.0)


def _codes(scaled: Tensor, kind: str) -> Tensor:
    """The codes of the nearest values; half way between two, the smaller value's."""
    bounds, codes = nearest(kind)
    place = torch.bucketize(scaled, bounds.to(scaled.device), out_int32=True)
    return codes.to(scaled.device)[place]


def _quick_codes(scaled: Tensor, kind: str) -> Tensor:
    """`_codes` of four bits, ten times as fast on a CPU; an odd number of them gets a zero's for company."""
    scaled = F.pad(scaled, (0, scaled.numel() % 2))
    between, codes = (table.to(scaled.device) for table in quick(kind))
    upper = (scaled.view(torch.int32) >> 16).add_(32768)
    above = (scaled > between.index_select(0, upper)).view(torch.uint8)
    return (codes.index_select(0, upper) >> (above << 2)) & 15


def _spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    """[0, n) in pieces of ``size``."""
    return ((start, min(start + size, n)) for start in range(0, n, size))
