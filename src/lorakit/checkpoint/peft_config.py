"""``adapter_config.json``: PEFT's description of an adapter, to and from `LoRAConfig`.

What lorakit cannot reproduce exactly is refused by key, never dropped: an adapter that loads with one setting
ignored answers differently without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.adapters.spec import LoRAConfig
from lorakit.adapters.targets import candidates
from lorakit.errors import AdapterMismatchError, LorakitError

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 1 << 20
_MAX_RANK = 1 << 16

# Keys that do not change what the adapter computes, whatever their value.
_DESCRIPTIVE = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "init_lora_weights", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora",
    "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "megatron_core",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Starts that set the adapter alone. Others (pissa, olora, loftq …) take something out of the base weight, too.
_HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
_NEUTRAL: dict[str, tuple[Any, ...]] = {"bias": ("none",)}  # other keys: null, false or empty


def to_peft(
    config: LoRAConfig, *, targets: Iterable[str], base_model: str, revision: str | None
) -> dict[str, Any]:
    """The dictionary that PEFT writes for such an adapter, with the targets spelled out."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(config.lora_alpha) if config.lora_alpha.is_integer() else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(targets),
        "use_rslora": config.use_rslora,
        "init_lora_weights": True if config.init_lora_weights == "kaiming" else config.init_lora_weights,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def short_targets(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Last name parts (``q_proj``) if they select exactly ``paths`` by PEFT's rule, else the paths."""
    wanted = set(paths)
    names = {path.rpartition(".")[2] for path in wanted}
    matched = {path for path in candidates(model) if path.rpartition(".")[2] in names}
    return sorted(names if matched == wanted else wanted)


def read_peft(folder: Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """The adapter's settings and the raw dictionary.

    Raises:
        AdapterMismatchError: no such file, not JSON, another kind of adapter, or a setting that lorakit cannot
            reproduce (each named).
    """
    path = folder / CONFIG_FILE
    raw = _read_object(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterMismatchError(f"peft_type is {kind!r}; only LORA is supported", place=str(path))
    refused = [f"{key} = {value!r:.80}" for key, value in raw.items() if not _harmless(key, value)]
    if refused:
        raise AdapterMismatchError(
            f"settings that lorakit does not know how to reproduce: {'; '.join(refused)}", place=str(path)
        )
    try:
        return _to_config(raw), raw
    except (LorakitError, ValueError) as error:
        raise AdapterMismatchError(f"not a usable adapter description: {error}", place=str(path)) from error


def _to_config(raw: dict[str, Any]) -> LoRAConfig:
    missing = [key for key in ("r", "lora_alpha", "target_modules") if raw.get(key) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given")
    rank, start = raw["r"], raw.get("init_lora_weights", True)
    if isinstance(rank, int) and rank > _MAX_RANK:
        raise ValueError(f"r = {rank} is beyond {_MAX_RANK}")
    targets = raw["target_modules"]
    if isinstance(targets, str) and targets != "all-linear":
        raise ValueError(f"target_modules is the regular expression {targets!r:.80}; write a list of names")
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    ):
        raise ValueError("target_modules must be a list of names")
    return LoRAConfig(
        r=rank,
        lora_alpha=raw["lora_alpha"],
        lora_dropout=raw.get("lora_dropout", 0.0),
        target_modules="all" if targets == "all-linear" else targets,
        use_rslora=raw.get("use_rslora", False),
        init_lora_weights="gaussian" if start == "gaussian" else "kaiming",
    )


def _harmless(key: str, value: Any) -> bool:
    if key in {"layers_to_transform", "layers_pattern"}:
        return value is None
    if key == "init_lora_weights":
        return value in _HARMLESS_STARTS
    return key in _DESCRIPTIVE or value in (None, False, {}, [], "") or value in _NEUTRAL.get(key, ())


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise AdapterMismatchError(
            f"cannot read {path.name}: {error.strerror}",
            place=str(path.parent),
            remedy="name an adapter folder (adapter_config.json and adapter_model.safetensors) or a run folder",
        ) from error
    if len(data) > _MAX_BYTES:
        raise AdapterMismatchError(
            f"larger than {_MAX_BYTES} bytes: not an adapter description", place=str(path)
        )
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterMismatchError(f"not JSON: {error}", place=str(path)) from error
    if not isinstance(value, dict):
        raise AdapterMismatchError("not a JSON object", place=str(path))
    return value
