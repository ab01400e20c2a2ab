"""How a base model is quantised, as a plain value: what the configuration says, what an adapter remembers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lorakit.hardware import Precision

Bits = Literal[4, 8]
Kind = Literal["nf4", "fp4", "int8"]
Method = Literal["native", "bitsandbytes"]


@dataclass(frozen=True)
class Quantization:
    """How the frozen linear layers of a model are kept.

    Attributes:
        kind: nf4 or fp4 (four bits, blocks of 64 weights), or int8 (rows).
        double: whether the constants of four bits are themselves kept in eight (QLoRA, arXiv 2305.14314).
        compute: number format of products with the weights; the model's own if None.
        method: whose layers compute: lorakit's, or those of bitsandbytes. The numbers are the same.
        threshold: with int8, inputs of at least this magnitude are not rounded (LLM.int8); 0 for none.
        integer: with int8, whether to multiply on integers where that is fast and accurate.
        skip: names of layers that stay dense, besides the output head.
    """

    kind: Kind = "nf4"
    double: bool = True
    compute: Precision | None = None
    method: Method = "native"
    threshold: float = 0.0
    integer: bool = True
    skip: tuple[str, ...] = ()

    @property
    def bits(self) -> Bits:
        """Bits of one weight, its share of the constants not counted."""
        return 8 if self.kind == "int8" else 4

    def __str__(self) -> str:
        by = "" if self.method == "native" else f" of {self.method}"
        return f"{self.kind}{' with double quantisation' if self.double and self.bits == 4 else ''}{by}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `quantization_from` reads it again."""
        return {**asdict(self), "skip": list(self.skip)}


def quantization_from(value: Mapping[str, Any]) -> Quantization:
    """What ``to_dict`` wrote; ``ValueError`` naming the entry that is wrong."""
    checks: dict[str, Callable[[Any], bool]] = {
        "kind": lambda v: v in get_args(Kind),
        "double": lambda v: isinstance(v, bool),
        "compute": lambda v: v is None or v in get_args(Precision),
        "method": lambda v: v in get_args(Method),
        "integer": lambda v: isinstance(v, bool),
        "threshold": lambda v: type(v) in (int, float) and v >= 0,
        "skip": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
    }
    for key, fits in checks.items():
        if key not in value or not fits(value[key]):
            raise ValueError(f"{key} is {value.get(key)!r:.80}")
    known = {key: value[key] for key in checks}
    return Quantization(**{**known, "threshold": float(known["threshold"]), "skip": tuple(known["skip"])})
