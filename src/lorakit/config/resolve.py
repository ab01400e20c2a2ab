"""Resolving: every value that was left open is worked out, and each value tells where it came from.

The result, written as YAML, is an ordinary configuration that resolves to the same values from any folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from lorakit import hardware
from lorakit.config.load import Run
from lorakit.config.presets import ALPHA_MODES, TARGET_SETS
from lorakit.config.problems import Problem, config_error, printable
from lorakit.config.quantization import Kind, Quantization
from lorakit.config.quantization_rules import asked_bits
from lorakit.config.schema import TrainConfig
from lorakit.config.source import Setting, near_names
from lorakit.config.yaml_text import scalar

_COMMENT_COLUMN = 60
_HUB_DATA = re.compile(r"\w[\w-]*/\w[\w-]*(\.\d[\w-]*)*", re.ASCII)  # owner/name, without a file's suffix
_REGISTRY = "dataset_info.json"
_OTHER_SPELLINGS = (  # of values that stand elsewhere
    "preset",
    "disable_gradient_checkpointing",
    "neat_packing",
    "greater_is_better",
    "load_in_4bit",
    "load_in_8bit",
    "use_qlora",
)
PASS_TOKENS = 1024  # of a pass on a CPU: products are as fast as with more, and activations are small
_PRECISIONS: dict[str, hardware.Precision] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Resolved(TrainConfig):
    """A configuration with every value worked out: what the rest of the program receives.

    ``origins`` tells for each value where it came from: a line, the command line, a default, a derivation.
    """

    model_config = ConfigDict(defer_build=True)  # its values are checked ones: no validator is built for them

    preset: None = None
    lora_alpha: float
    dataset_dir: str
    do_eval: bool
    eval_strategy: Literal["no", "steps", "epoch"]
    greater_is_better: None = None
    packing: bool
    neat_packing: None = None
    bf16: bool
    fp16: bool
    disable_gradient_checkpointing: None = None
    load_in_4bit: None = None
    load_in_8bit: None = None
    use_qlora: None = None
    quantization: Quantization | None  # of the base
    precision: hardware.Precision
    effective_batch: int  # sequences in one update
    origins: Mapping[str, str]
    warnings: tuple[str, ...]

    @property
    def says_passes(self) -> bool:
        """Whether the user says which rows share a pass, so that `pass_tokens` does not."""
        return bool(self.packing or self.max_tokens_per_batch or self.auto_find_batch_size)

    def to_yaml(self) -> str:
        """The values as plain YAML keys, one a line, each with its origin as a comment."""
        values = dict(self)
        lines = [
            (f"{key}: {scalar(values[key])}", self.origins[key])
            for key in TrainConfig.model_fields
            if key not in _OTHER_SPELLINGS
        ]
        column = min(max(len(line) for line, _ in lines), _COMMENT_COLUMN)
        return "".join(f"{line:<{column}}  # {printable(origin)}\n" for line, origin in lines)


def resolve(run: Run) -> Resolved:
    """Work out what the configuration leaves open.

    Raises:
        ConfigError: if this machine cannot do what a key asks for, or a model folder is missing.
    """
    config, settings = run.config, run.settings
    values = dict(config)
    origins = {key: settings[key].origin if key in settings else "default" for key in values}
    problems: list[Problem] = []
    warnings = list(run.warnings)

    _resolve_adapters(config, values, origins)
    if config.do_eval is None:
        values["do_eval"] = config.eval_dataset is not None or config.val_size > 0
        cause = "val_size" if config.val_size > 0 else "eval_dataset"
        origins["do_eval"] = f"derived: {cause} is {'' if values['do_eval'] else 'not '}given"
    if config.disable_gradient_checkpointing is not None and not config.gradient_checkpointing:
        values["gradient_checkpointing"] = not config.disable_gradient_checkpointing
        origins["gradient_checkpointing"] = origins["disable_gradient_checkpointing"]
    values["disable_gradient_checkpointing"] = None
    values |= {"packing": bool(config.packing or config.neat_packing), "neat_packing": None}
    if config.neat_packing is not None and config.packing is None:
        origins["packing"] = origins["neat_packing"]
    if config.max_tokens_per_batch is not None:
        origins["per_device_train_batch_size"] += ", unused: max_tokens_per_batch wins"
    if config.max_steps is not None:
        origins["num_train_epochs"] += ", unused: max_steps wins"
    if config.warmup_ratio > 0 and config.warmup_steps == 0:
        values["warmup_steps"], origins["warmup_steps"] = None, "derived: warmup_ratio is given"
    values["greater_is_better"] = None
    if config.eval_strategy is None:
        values["eval_strategy"] = "no" if config.eval_steps is None else "steps"
        origins["eval_strategy"] = f"derived: eval_steps is {'not ' if config.eval_steps is None else ''}given"
    if values["eval_strategy"] == "steps" and config.eval_steps is None:
        values["eval_steps"], origins["eval_steps"] = config.logging_steps, "derived: logging_steps"
    if config.unfreeze_after is not None and config.unfreeze_learning_rate is None:
        values["unfreeze_learning_rate"] = config.learning_rate / 10
        origins["unfreeze_learning_rate"] = "derived: learning_rate / 10"
    values["effective_batch"] = config.per_device_train_batch_size * config.gradient_accumulation_steps
    origins["effective_batch"] = "derived: per_device_train_batch_size × gradient_accumulation_steps"

    problems += _resolve_paths(run, values, origins)
    problems += _resolve_precision(run, values, origins, warnings)
    problems += _resolve_quantization(run, values, origins, warnings)
    if problems:
        raise config_error(problems, run.name)
    return Resolved.model_construct(**values, origins=origins, warnings=tuple(warnings))


def _resolve_adapters(config: TrainConfig, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Replace words for a strength and for sets of layers; what a preset says has become keys of its own."""
    values["preset"] = None
    if config.lora_alpha is None:
        values["lora_alpha"], origins["lora_alpha"] = 2.0 * config.lora_rank, "derived: 2 × lora_rank"
    elif isinstance(config.lora_alpha, str):
        values["lora_alpha"] = float(ALPHA_MODES[config.lora_alpha] * config.lora_rank)
        origins["lora_alpha"] += f": {config.lora_alpha}"
    sets = [name for name in config.lora_target if name in TARGET_SETS]  # of "all" none: letters
    if sets:
        values["lora_target"] = tuple(TARGET_SETS.get(name, name) for name in config.lora_target)
        origins["lora_target"] += f": {', '.join(sets)}"


def _resolve_paths(run: Run, values: dict[str, Any], origins: dict[str, str]) -> list[Problem]:
    """Make paths absolute; a model that looks like a path must exist."""
    settings = run.settings
    values["output_dir"] = str(_absolute(run.config.output_dir, settings["output_dir"].base))
    data_folder = run.base_dir
    if run.config.dataset_dir is not None:
        data_folder = _absolute(run.config.dataset_dir, settings["dataset_dir"].base)
    else:
        origins["dataset_dir"] = f"derived: folder of {run.file.name}" if run.file else "derived: base_dir"
    values["dataset_dir"] = str(data_folder)
    for key in ("tokenized_path", "adapter_name_or_path", "resume_from_checkpoint", "deepspeed", "logging_dir"):
        if isinstance(values[key], str):
            values[key] = str(_absolute(values[key], settings[key].base))
    if values["forgetting_text"] not in (None, "python"):
        values["forgetting_text"] = str(_absolute(values["forgetting_text"], settings["forgetting_text"].base))
    for key in ("dataset", "eval_dataset"):
        if values[key] is not None:
            base = settings[key].base if run.config.dataset_dir is None else data_folder
            values[key] = tuple(_data_name(name, base, data_folder) for name in values[key])

    setting = settings["model_name_or_path"]
    path = _absolute(run.config.model_name_or_path, setting.base)
    if _exists(path):
        values["model_name_or_path"] = str(path)
    elif _looks_like_path(run.config.model_name_or_path):
        return [_no_model(setting, path)]
    return []


def _data_name(name: str, base: Path, data_folder: Path) -> str:
    """Names in the registry and names that only the hub can know stay as they are; a path becomes absolute."""
    path = _absolute(name, base)
    if name in _registered(data_folder) or (_HUB_DATA.fullmatch(name) and not _exists(path)):
        return name
    return str(path)


def _registered(folder: Path) -> Set[str]:
    """The names in ``dataset_info.json``; what is wrong with that file is told when the rows are read."""
    try:
        entries = json.loads((folder / _REGISTRY).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return frozenset()
    return entries.keys() if isinstance(entries, dict) else frozenset()


def _no_model(setting: Setting, path: Path) -> Problem:
    near = near_names(path)
    hint = f"did you mean {' or '.join(near)}?" if near else "a hub id is written owner/name"
    return Problem(f"there is no model at {path}", setting.key, (setting.value_place,), hint)


def _resolve_precision(
    run: Run, values: dict[str, Any], origins: dict[str, str], warnings: list[str]
) -> list[Problem]:
    """Choose the number format from the keys and what the hardware can do."""
    config, best = run.config, _best_precision(run.config)
    precision, origin = best, f"derived: best on this {hardware.device()}"
    if config.unfreeze_after is not None:
        best, precision, origin = "fp32", "fp32", "derived: the base trains in the end (unfreeze_after)"
    if config.unfreeze_after is not None and (config.bf16 or config.fp16):
        key = "bf16" if config.bf16 else "fp16"
        message = f"`{key}` is true, but with `unfreeze_after` the base trains, which needs fp32 weights"
        return [Problem(message, key, (run.settings[key].value_place,), f"remove `{key}`")]
    if config.bf16 and not hardware.supports("bf16"):
        message = "`bf16` is true, but the hardware has no bf16 arithmetic"
        hint = f"remove the key to compute in {best}"
        return [Problem(message, "bf16", (run.settings["bf16"].value_place,), hint)]
    if config.bf16:
        precision, origin = "bf16", origins["bf16"]
    elif config.fp16 and hardware.supports("fp16"):
        precision, origin = "fp16", origins["fp16"]
    elif config.fp16:
        origin = f"derived: not fp16, as a CPU only emulates it ({origins['fp16']})"
        warnings.append(
            f"{origins['fp16']}: `fp16` is not used, as a CPU only emulates it: computing in {best}"
        )
    elif best == "fp32" and config.bf16 is False:
        origin = origins["bf16"]
    values |= {"precision": precision, "bf16": precision == "bf16", "fp16": precision == "fp16"}
    origins |= dict.fromkeys(("precision", "bf16", "fp16"), origin)
    return []


def _best_precision(config: TrainConfig) -> hardware.Precision:
    """The hardware's best, unless its key says false."""
    best = hardware.best_precision()
    return "fp32" if best == "bf16" and config.bf16 is False else best


def _resolve_quantization(
    run: Run, values: dict[str, Any], origins: dict[str, str], warnings: list[str]
) -> list[Problem]:
    """Gather the keys about quantisation in one value, or none."""
    config, bits = run.config, next(iter(asked_bits(run.config)), None)
    spellings = ("use_qlora", "load_in_4bit", "load_in_8bit")
    if bits is not None and config.quantization_bit is None:
        origins["quantization_bit"] = next(origins[key] for key in spellings if values[key])
    values |= {**dict.fromkeys(spellings), "quantization_bit": bits, "quantization": None}
    origins["quantization"] = "derived: the keys about quantisation"
    if bits is None:
        return []
    if config.quantization_method == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is None:
        place = run.settings["quantization_method"].value_place
        message = "`quantization_method: bitsandbytes` needs a package that is not installed"
        hint = "`pip install bitsandbytes`, or remove the key: lorakit's own layers hold the same numbers"
        return [Problem(message, "quantization_method", (place,), hint)]
    kind: Kind = "int8"
    if bits == 4:
        kind = values["quantization_type"] = config.quantization_type or "nf4"
        values["double_quantization"] = config.double_quantization is not False
    compute: hardware.Precision = _PRECISIONS.get(config.bnb_4bit_compute_dtype or "", values["precision"])
    if not hardware.supports(compute):
        origin, wanted = origins["bnb_4bit_compute_dtype"], config.bnb_4bit_compute_dtype
        warnings.append(
            f"{origin}: `bnb_4bit_compute_dtype: {wanted}` is not used, as this {hardware.device()} has no "
            f"such arithmetic: computing in {values['precision']}"
        )
        compute, origins["bnb_4bit_compute_dtype"] = values["precision"], f"derived: not {wanted} ({origin})"
    elif config.bnb_4bit_compute_dtype is None:
        origins["bnb_4bit_compute_dtype"] = "derived: the run's precision"
    values["bnb_4bit_compute_dtype"] = {short: name for name, short in _PRECISIONS.items()}[compute]
    values["quantization"] = Quantization(
        kind=kind,
        double=bits == 4 and values["double_quantization"],
        compute=compute,
        method=config.quantization_method,
        threshold=config.llm_int8_threshold or 0.0,
        integer=config.int8_compute is not False,
        skip=config.llm_int8_skip_modules or (),
    )
    return []


def _absolute(text: str, base: Path) -> Path:
    path = Path(text)
    with contextlib.suppress(RuntimeError):  # ~nobody stays as it is written
        path = path.expanduser()
    return Path(os.path.normpath(base / path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that is closed to us
        return False


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.lower().endswith(".gguf") or name.count("/") > 1
