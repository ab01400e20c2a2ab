"""What an adapter is, as a frozen value: `LoRAConfig`."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from lorakit.adapters.inits import INITIALISERS
from lorakit.errors import UsageError

Initialiser = Literal["kaiming", "gaussian"]
T = TypeVar("T")
Targets = str | tuple[str, ...]  # "all", or module names

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, init=False)
class LoRAConfig:
    """Settings of one LoRA adapter. ``rank``/``r`` and ``alpha``/``lora_alpha`` are the same things.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: numerator of the scaling; ``2 · r`` if not given.
        lora_dropout: share of the adapter's input set to zero in training, 0 ≤ p < 1.
        target_modules: ``"all"`` (every linear layer but the output head), a list or comma string of names.
        use_rslora: scale by α/√r (arXiv 2312.03732) instead of α/r.
        init_lora_weights: how A starts (B is always zero).
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: Targets
    use_rslora: bool
    init_lora_weights: Initialiser

    def __init__(
        self,
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] | tuple[str, ...] = "all",
        use_rslora: bool = False,
        init_lora_weights: Initialiser = "kaiming",
        *,
        rank: int | None = None,
        alpha: float | None = None,
    ) -> None:
        rank = _one_of("r", r, "rank", rank, 8)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(f"r must be a whole number of at least 1, not {rank!r}")
        alpha = _one_of("lora_alpha", lora_alpha, "alpha", alpha, 2 * rank)
        if not _is_number(alpha) or not 0 < alpha <= sys.float_info.max:
            raise UsageError(f"lora_alpha must be a positive number, not {alpha!r:.80}")
        if not _is_number(lora_dropout) or not 0.0 <= lora_dropout < 1.0:
            raise UsageError(f"lora_dropout must be at least 0 and below 1, not {lora_dropout!r:.80}")
        if not isinstance(use_rslora, bool):
            raise UsageError(f"use_rslora must be true or false, not {use_rslora!r:.80}")
        if init_lora_weights not in INITIALISERS:
            raise UsageError(
                f"unknown initialiser {init_lora_weights!r:.80}",
                remedy=f"choose one of {', '.join(INITIALISERS)}",
            )
        values = {
            "r": rank,
            "lora_alpha": float(alpha),
            "lora_dropout": float(lora_dropout),
            "target_modules": parse_targets(target_modules),
            "use_rslora": use_rslora,
            "init_lora_weights": init_lora_weights,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen from here on

    @property
    def rank(self) -> int:
        """`r` by its long name."""
        return self.r

    @property
    def alpha(self) -> float:
        """`lora_alpha` by its short name."""
        return self.lora_alpha

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return scaling(self.r, self.lora_alpha, use_rslora=self.use_rslora)


def scaling(r: int, lora_alpha: float, *, use_rslora: bool = False) -> float:
    """α/r (arXiv 2106.09685, §4.1), or α/√r for rank-stabilised LoRA (arXiv 2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def parse_targets(targets: str | list[str] | tuple[str, ...]) -> Targets:
    """``"all"``, or a tuple of names from a list or a comma string; ``UsageError`` if none is left."""
    names = targets.split(",") if isinstance(targets, str) else targets
    names = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not names:
        raise UsageError("target_modules is empty", remedy='name modules such as q_proj,v_proj, or write "all"')
    return "all" if names == ("all",) else names


def check_adapter_name(name: str) -> str:
    """Return ``name`` if it may name an adapter (it becomes part of tensor and folder names)."""
    if not _NAME.fullmatch(name) or name in dir(nn.ModuleDict):
        raise UsageError(
            f"{name!r} cannot name an adapter",
            remedy="use up to 64 letters, digits, - and _, starting with a letter or digit",
        )
    return name


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(first_name: str, first: T | None, second_name: str, second: T | None, default: T) -> T:
    if first is not None and second is not None and first != second:
        raise UsageError(f"{first_name}={first} and {second_name}={second} mean the same and differ")
    return first if first is not None else second if second is not None else default
