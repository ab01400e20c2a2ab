"""``adapter_config.json``: PEFT's description of an adapter, to and from `LoRAConfig`.

What lorakit cannot reproduce exactly is refused by key, never dropped: an adapter that loads with one setting
ignored answers differently without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from lorakit.adapters.attach import adapter_layers, carriers
from lorakit.adapters.copies import ModuleCopies
from lorakit.adapters.spec import LoRAConfig
from lorakit.adapters.targets import candidates
from lorakit.errors import AdapterMismatchError, LorakitError
from lorakit.lowrank.budget import RankSchedule
from lorakit.lowrank.inits import find_initialiser

CONFIG_FILE = "adapter_config.json"
_MAX_RANK = 1 << 16
_MAX_TARGETS = 100_000
_MAX_PATTERNS = 5_000

_SCHEDULE = ("target_r", "total_step", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
# Keys that are read, and keys that do not change what the adapter computes, whatever their value.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora",
    "init_lora_weights", "rank_pattern", "alpha_pattern", "modules_to_save", "exclude_modules",
    "layers_to_transform", "init_r", *_SCHEDULE,
}  # fmt: skip
_DESCRIPTIVE = {
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "fan_in_fan_out", "layers_pattern", "loftq_config", "eva_config", "corda_config", "megatron_core",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# PEFT's names of starts. These set the adapter alone; others (loftq, corda …) change the base weight, too.
_STARTS = {
    None: "kaiming", True: "kaiming", False: "kaiming", "eva": "kaiming", "gaussian": "gaussian",
    "orthogonal": "orthogonal", "pissa": "pissa", "olora": "olora",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {"bias": ("none",)}  # other keys: null, false or empty


def to_peft(
    model: nn.Module, name: str, *, base_model: str = "", revision: str | None = None
) -> dict[str, Any]:
    """The dictionary that PEFT writes for the adapter ``name``: targets, ranks and alphas spelled out."""
    layers = adapter_layers(model, name)
    config = next(iter(layers.values())).adapter(name).config
    factor = 2 if find_initialiser(config.init_lora_weights).anchored else 1  # written with its anchor
    alpha_factor = math.sqrt(factor) if config.use_rslora else factor
    ranks = {path: config.rank_at(path) for path in layers}
    alphas = {path: config.alpha_at(path) for path in layers}
    whole = [path for path, carrier in carriers(model, name).items() if isinstance(carrier, ModuleCopies)]
    described: dict[str, Any] = {
        "peft_type": "ADALORA" if config.method == "adalora" else "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": config.r * factor,
        "lora_alpha": _short(config.lora_alpha * alpha_factor),
        "lora_dropout": config.lora_dropout,
        "target_modules": short_targets(model, layers),
        "use_rslora": config.use_rslora,
        # PEFT runs the start before it reads the tensors, and its convolutions know these two alone.
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        "bias": "none",
        "fan_in_fan_out": all(layer.host.transposed for layer in layers.values()),
        "modules_to_save": whole or None,
        "rank_pattern": {f"^{path}": r * factor for path, r in ranks.items() if r != config.r},
        "alpha_pattern": {
            f"^{path}": _short(alpha * alpha_factor)
            for path, alpha in alphas.items()
            if alpha != config.lora_alpha
        },
        "use_dora": config.method == "dora",
    }
    if config.method == "adalora":
        schedule = config.schedule or RankSchedule(target_r=config.r, total_step=1)
        described |= {key: getattr(schedule, key) for key in _SCHEDULE}
        described |= {"init_r": config.r, "r": 8, "rank_pattern": None}
    return described


def short_targets(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Last name parts (``q_proj``) if they select exactly ``paths`` by PEFT's rule, else the paths."""
    wanted = set(paths)
    names = {path.rpartition(".")[2] for path in wanted}
    matched = {path for path in candidates(model) if path.rpartition(".")[2] in names}
    return sorted(names if matched == wanted else wanted)


def from_peft(raw: dict[str, Any], place: str, *, anchored: str | None = None) -> LoRAConfig:
    """The settings that PEFT's dictionary describes.

    Args:
        raw: the dictionary.
        place: where it was read, for errors.
        anchored: the start of an adapter that lorakit wrote with its anchor, at twice its rank.

    Raises:
        AdapterMismatchError: another kind of adapter, or a setting that cannot be reproduced (each named).
    """
    kind = raw.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise AdapterMismatchError(f"peft_type is {kind!r:.80}; LORA and ADALORA are supported", place=place)
    refused = [f"{key} = {value!r:.80}" for key, value in raw.items() if not _harmless(key, value)]
    if refused:
        shown = "; ".join(refused[:10])
        raise AdapterMismatchError(
            f"settings that lorakit does not know how to reproduce: {shown}", place=place
        )
    try:
        return _to_config(raw, anchored)
    except (LorakitError, ValueError, TypeError) as error:
        raise AdapterMismatchError(f"not a usable adapter description: {error}", place=place) from error


def _to_config(raw: dict[str, Any], anchored: str | None) -> LoRAConfig:
    adalora = raw["peft_type"] == "ADALORA"
    missing = [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    factor = 2 if anchored else 1
    rslora = raw.get("use_rslora", False)
    alpha_factor = math.sqrt(factor) if rslora else factor
    kept, gone = _adalora_ranks(raw) if adalora else (_ranks(raw.get("rank_pattern"), factor), ())
    return LoRAConfig(
        r=_rank("r", raw["init_r"] if adalora else raw["r"], factor),
        lora_alpha=_halved(raw["lora_alpha"], alpha_factor),
        lora_dropout=raw.get("lora_dropout", 0.0),
        target_modules="all" if raw["target_modules"] == "all-linear" else _names("target_modules", raw),
        use_rslora=rslora,
        init_lora_weights=anchored or _start(raw),
        method="adalora" if adalora else "lora",
        use_dora=bool(raw.get("use_dora", False)),
        rank_pattern=kept,
        alpha_pattern={
            k: _halved(v, alpha_factor) for k, v in _object("alpha_pattern", raw.get("alpha_pattern")).items()
        },
        modules_to_save=_names("modules_to_save", raw) or (),
        exclude_modules=_names("exclude_modules", raw) or gone,
        layers_to_transform=raw.get("layers_to_transform"),
        schedule=RankSchedule(**{key: raw[key] for key in _SCHEDULE if key in raw}) if adalora else None,
    )


def _adalora_ranks(raw: dict[str, Any]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The rank of each module (PEFT stores only the singular values that AdaLoRA kept), and those of rank 0."""
    ranks = {
        key.removeprefix("base_model.model.").removesuffix(".lora_E"): sum(map(bool, mask))
        for key, mask in _object("rank_pattern", raw.get("rank_pattern")).items()
    }
    return {f"^{path}": r for path, r in ranks.items() if r}, tuple(path for path, r in ranks.items() if not r)


def _ranks(pattern: Any, factor: int) -> dict[str, int]:
    return {
        key: _rank(f"rank_pattern[{key}]", r, factor) for key, r in _object("rank_pattern", pattern).items()
    }


def _object(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, dict) or len(value or ()) > _MAX_PATTERNS:
        raise ValueError(f"{key} must be an object of at most {_MAX_PATTERNS} entries")
    return value or {}


def _rank(key: str, value: Any, factor: int) -> Any:
    if isinstance(value, int) and value > _MAX_RANK:
        raise ValueError(f"{key} = {value!s:.20} is beyond {_MAX_RANK}")
    if factor == 1:
        return value
    if not isinstance(value, int) or value % factor:
        raise ValueError(f"{key} = {value!r:.80} is not twice the rank of a PiSSA or OLoRA adapter")
    return value // factor


def _names(key: str, raw: dict[str, Any]) -> Any:
    value = raw.get(key)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of names or a regular expression")
    if len(value) > _MAX_TARGETS:
        raise ValueError(f"{key} has {len(value)} entries, more than {_MAX_TARGETS}")
    return value


def _start(raw: dict[str, Any]) -> str:
    start = raw.get("init_lora_weights", True)
    return _STARTS.get(start, start)


def _harmless(key: str, value: Any) -> bool:
    if key == "layers_pattern":
        return value in (
            None,
            "layers",
            "h",
            "blocks",
        )  # the number behind such a name is the first in the path
    if key == "init_lora_weights":
        return value is None or isinstance(value, bool) or value in _STARTS
    neutral = value in (None, False, {}, [], "") or value in _NEUTRAL.get(key, ())
    return key in _READ or key in _DESCRIPTIVE or neutral


def _halved(value: Any, factor: float) -> Any:
    return value / factor if isinstance(value, int | float) and factor != 1 else value


def _short(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
