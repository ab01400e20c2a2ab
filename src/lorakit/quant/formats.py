"""What a quantised format must be able to do, and how its tensors are called in files (bitsandbytes' names)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.errors import ModelError
from lorakit.quant.blockwise import CONSTANTS_BLOCK, FourBit
from lorakit.quant.codebooks import codebook
from lorakit.quant.int8 import Int8

_STATE = "weight.quant_state.bitsandbytes__"
_LONGEST = 4096  # bytes of the description behind it; real ones have 200


class Format(Protocol):
    """How a weight is kept in few bits: a frozen value. The numbers are tensors by name (``weight`` …)."""

    @property
    def name(self) -> str:
        """``nf4``, ``fp4`` or ``int8``."""
        ...

    @property
    def bits(self) -> int:
        """Bits of one code."""
        ...

    def empty(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Tensors of the right sizes for a weight of this shape, not filled."""
        ...

    def quantize(self, W: Tensor) -> dict[str, Tensor]:
        """The tensors for a dense weight; ``ModelError`` if it is not finite."""
        ...

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The dense weight."""
        ...

    def blocks(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Iterator[Tensor]:
        """The rows of `dequantize`, some at a time."""
        ...


def to_file(
    form: Format, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors as a bitsandbytes layer would save them; ``dtype`` is noted for readers."""
    if isinstance(form, Int8):
        return {**tensors, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    assert isinstance(form, FourBit)
    state: dict[str, Any] = {
        "quant_type": form.kind,
        "blocksize": form.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    named = {
        "weight": tensors["weight"],
        "weight.absmax": tensors["absmax"],
        "weight.quant_map": codebook(form.kind).clone(),
    }
    if form.double:
        named["weight.nested_absmax"] = tensors["nested_absmax"]
        named["weight.nested_quant_map"] = codebook("dynamic8").clone()
        offset = tensors["offset"].item()
        state |= {"nested_blocksize": CONSTANTS_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    packed = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return {**named, _STATE + form.kind: packed}


def from_file(named: Mapping[str, Tensor]) -> tuple[Format, dict[str, Tensor], tuple[int, ...]]:
    """Format, tensors and shape from what `to_file` or a bitsandbytes layer wrote.

    Raises:
        ModelError: tensors that are missing, unknown, misshapen or of another codebook.
    """
    if "SCB" in named:
        form: Format = Int8()
        tensors = {"weight": _get(named, "weight"), "SCB": _get(named, "SCB")}
        shape = tuple(tensors["weight"].shape)
        if "weight_format" in named and named["weight_format"].flatten().tolist() != [0]:
            raise ModelError(
                "an 8-bit weight in another order than rows", remedy="save it with bitsandbytes ≥ 0.45"
            )
    else:
        form, tensors, shape = _four_bit(named)
    unknown = sorted(named.keys() - to_file(form, tensors, shape, torch.float32).keys())
    if unknown:
        raise ModelError(f"{unknown[0]} is not part of a weight in {form.name}")
    for key, like in form.empty(shape, "meta").items():
        found = tensors[key]
        # bitsandbytes can keep packed bytes in tensors of another dtype (quant_storage), constants never.
        if found.nbytes != like.nbytes or (key != "weight" and found.dtype != like.dtype):
            raise ModelError(
                f"{key} has {found.numel()} numbers ({found.dtype}) where a weight {shape} in {form.name} "
                f"has {like.numel()} ({like.dtype})",
                remedy="the file is damaged; download it again",
            )
        tensors[key] = found.contiguous().view(like.dtype).view(like.shape)
        if like.is_floating_point() and not found.isfinite().all():
            raise ModelError(f"{key} holds NaN or infinity", remedy="the file is damaged; download it again")
    return form, tensors, shape


def _four_bit(named: Mapping[str, Tensor]) -> tuple[FourBit, dict[str, Tensor], tuple[int, ...]]:
    blobs = [key for key in named if key.startswith(_STATE)]
    if len(blobs) != 1:
        raise ModelError(
            f"{len(blobs)} entries {_STATE}… instead of one say how the weight is quantised",
            remedy="load a checkpoint that bitsandbytes or lorakit quantised",
        )
    weight = _get(named, "weight")
    try:
        state = json.loads(bytes(named[blobs[0]][:_LONGEST].tolist()))
        kind, blocksize, shape = state["quant_type"], int(state["blocksize"]), tuple(map(int, state["shape"]))
        nested = {
            key: state[f"nested_{key}"] for key in ("blocksize", "dtype", "offset") if "nested_offset" in state
        }
        offset = float(nested.get("offset", 0.0))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelError(f"{blobs[0]} cannot be read: {error!r:.200}", remedy="the file is damaged") from error
    if min(shape, default=0) < 1 or -(-math.prod(shape) // 2) != weight.nbytes:
        raise ModelError(
            f"{weight.nbytes} bytes cannot be a weight {shape!s:.80}", remedy="the file is damaged"
        )
    form = FourBit(kind, blocksize, double=bool(nested))
    tensors = {"weight": weight, "absmax": _get(named, "weight.absmax")}
    _same_codebook(named, "weight.quant_map", kind)
    if nested:
        if nested["blocksize"] != CONSTANTS_BLOCK or nested["dtype"] != "float32":
            raise ModelError(
                f"constants in blocks of {nested['blocksize']} {nested['dtype']}: only 256 float32 are known"
            )
        _same_codebook(named, "weight.nested_quant_map", "dynamic8")
        tensors["nested_absmax"] = _get(named, "weight.nested_absmax")
        tensors["offset"] = torch.tensor(offset, device=weight.device)
    return form, tensors, shape


def _get(named: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in named:
        raise ModelError(f"{key} is missing", remedy="the file is incomplete; download it again")
    return named[key]


def _same_codebook(named: Mapping[str, Tensor], key: str, kind: str) -> None:
    if not torch.equal(_get(named, key).cpu(), codebook(kind)):
        raise ModelError(f"{key} is not the codebook {kind}", remedy="quantise the original model again")
