"""What an adapter is, as a frozen value: `LoRAConfig`."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from lorakit.errors import UsageError
from lorakit.lowrank.budget import RankSchedule
from lorakit.lowrank.inits import find_initialiser
from lorakit.patterns import Names, block_numbers, first_match, parse_names

MethodName = Literal["lora", "dora", "adalora"]
Targets = str | tuple[str, ...]  # "all", a regular expression, or module names
Pattern = tuple[tuple[str, Any], ...]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, init=False)
class LoRAConfig:
    """Settings of one adapter. ``rank``/``r`` and ``alpha``/``lora_alpha`` are the same things.

    Args:
        r: rank of the update, at least 1. AdaLoRA starts here.
        lora_alpha: numerator of the scaling; ``2 · r`` if not given.
        lora_dropout: share of the adapter's input set to zero in training, 0 ≤ p < 1.
        target_modules: ``"all"`` (every linear layer but the output head), a list or comma string of names, or
            one regular expression for whole module paths.
        use_rslora: scale by α/√r (arXiv 2312.03732) instead of α/r.
        init_lora_weights: how the adapter starts; see `lorakit.lowrank.inits`.
        method: lora, dora (``use_dora=True`` is the same) or adalora.
        lora_fa: keep A frozen (LoRA-FA, arXiv 2308.03303).
        rank_pattern: name or regular expression → another r for the modules it selects; the first match counts.
        alpha_pattern: the same for lora_alpha.
        modules_to_save: modules that are trained whole and saved with the adapter (a new head, embeddings).
        exclude_modules: names or one regular expression of modules to leave out.
        layers_to_transform: numbers of the blocks to adapt: a list, one number, or text such as ``"0-3,8"``.
        schedule: AdaLoRA's rank budget.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: Targets
    use_rslora: bool
    init_lora_weights: str
    method: MethodName
    lora_fa: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    modules_to_save: tuple[str, ...]
    exclude_modules: Targets
    layers_to_transform: tuple[int, ...] | None
    schedule: RankSchedule | None

    def __init__(  # noqa: PLR0913 - every setting of an adapter by its name in the field
        self,
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: Names = "all",
        use_rslora: bool = False,
        init_lora_weights: str = "kaiming",
        *,
        rank: int | None = None,
        alpha: float | None = None,
        method: MethodName = "lora",
        use_dora: bool = False,
        lora_fa: bool = False,
        rank_pattern: Mapping[str, int] | Pattern | None = None,
        alpha_pattern: Mapping[str, float] | Pattern | None = None,
        modules_to_save: Names = (),
        exclude_modules: Names = (),
        layers_to_transform: str | int | Iterable[int] | None = None,
        schedule: RankSchedule | None = None,
    ) -> None:
        r = _rank("r", _one_of("r", r, "rank", rank, 8))
        values = {
            "r": r,
            "lora_alpha": _alpha("lora_alpha", _one_of("lora_alpha", lora_alpha, "alpha", alpha, 2 * r)),
            "lora_dropout": _share("lora_dropout", lora_dropout),
            "target_modules": parse_targets(target_modules),
            "use_rslora": _switch("use_rslora", use_rslora),
            "init_lora_weights": find_initialiser(init_lora_weights).name,
            "method": _method(method, _switch("use_dora", use_dora)),
            "lora_fa": _switch("lora_fa", lora_fa),
            "rank_pattern": _pattern("rank_pattern", rank_pattern, _rank),
            "alpha_pattern": _pattern("alpha_pattern", alpha_pattern, _alpha),
            "modules_to_save": parse_names("modules_to_save", modules_to_save),
            "exclude_modules": parse_names("exclude_modules", exclude_modules),
            "layers_to_transform": block_numbers(layers_to_transform),
            "schedule": schedule,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen from here on
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.method == "adalora":
            for key, neutral in (("use_rslora", False), ("lora_fa", False), ("init_lora_weights", "kaiming")):
                if getattr(self, key) != neutral:
                    raise UsageError(f"AdaLoRA has its own {key}", remedy=f"leave {key} out")
        elif self.schedule is not None:
            raise UsageError("a rank schedule belongs to method adalora", remedy='set method="adalora"')
        ranks = (self.r, *(r for _, r in self.rank_pattern))
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in ranks):
            raise UsageError("the orthogonal start needs an even rank", remedy="choose an even r")

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
        """The factor of the update, where no pattern says otherwise."""
        return scaling(self.r, self.lora_alpha, use_rslora=self.use_rslora)

    def rank_at(self, path: str) -> int:
        """The rank of the module ``path``."""
        return first_match(self.rank_pattern, path) or self.r

    def alpha_at(self, path: str) -> float:
        """The lora_alpha of the module ``path``."""
        return first_match(self.alpha_pattern, path) or self.lora_alpha

    def scaling_at(self, path: str) -> float:
        """The factor of the update on the module ``path``; AdaLoRA keeps that of its first rank."""
        r = self.r if self.method == "adalora" else self.rank_at(path)
        return scaling(r, self.alpha_at(path), use_rslora=self.use_rslora)


def scaling(r: int, lora_alpha: float, *, use_rslora: bool = False) -> float:
    """α/r (arXiv 2106.09685, §4.1), or α/√r for rank-stabilised LoRA (arXiv 2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def parse_targets(targets: Names) -> Targets:
    """``"all"``, a regular expression, or a tuple of names; ``UsageError`` if none is left."""
    names = parse_names("target_modules", targets)
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


def _method(method: Any, use_dora: bool) -> Any:
    if method not in get_args(MethodName):
        raise UsageError(f"unknown method {method!r:.80}", remedy=f"choose {', '.join(get_args(MethodName))}")
    if use_dora and method == "adalora":
        raise UsageError("use_dora and method adalora exclude each other", remedy="drop one of them")
    return "dora" if use_dora else method


def _rank(key: str, value: Any) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return int(_checked(key, value, whole and value >= 1, "a whole number of at least 1"))


def _alpha(key: str, value: Any) -> float:
    return float(
        _checked(key, value, _is_number(value) and 0 < value <= sys.float_info.max, "a positive number")
    )


def _share(key: str, value: Any) -> float:
    return float(_checked(key, value, _is_number(value) and 0.0 <= value < 1.0, "at least 0 and below 1"))


def _switch(key: str, value: Any) -> bool:
    return bool(_checked(key, value, isinstance(value, bool), "true or false"))


def _checked(key: str, value: Any, fits: bool, wanted: str) -> Any:
    if not fits:
        raise UsageError(f"{key} must be {wanted}, not {value!r:.80}")
    return value


def _pattern(key: str, value: Any, check: Any) -> Pattern:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else tuple(value or ())
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise UsageError(f"{key} must map module names to numbers, not {value!r:.80}")
    return tuple((name, check(f"{key}[{name}]", number)) for name, number in pairs)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_of(first_name: str, first: Any, second_name: str, second: Any, default: Any) -> Any:
    if first is not None and second is not None and first != second:
        raise UsageError(f"{first_name}={first} and {second_name}={second} mean the same and differ")
    return first if first is not None else second if second is not None else default
