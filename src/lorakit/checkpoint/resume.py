"""Going on with a run: from which checkpoint, whether it belongs to these settings, and how exactly.

R0  bit for bit: the same machine type, versions, threads and ranks
R1  the same trajectory, up to rounding: something of these differs
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lorakit import __version__, hardware
from lorakit.checkpoint.snapshot import newest_good, read_snapshot, snapshots
from lorakit.checkpoint.state import State
from lorakit.config.resolve import Resolved
from lorakit.config.schema import TrainConfig
from lorakit.errors import ModelError, UsageError
from lorakit.log import logger
from lorakit.ops import native

# Keys that say where things are, what is shown and what is kept, but not what is trained. Data, base and
# tokenizer are compared by content, not by name.
_HARMLESS = frozenset((
    "model_name_or_path", "model_revision", "trust_remote_code", "dataset", "dataset_dir", "streaming",
    "preprocessing_num_workers", "dataloader_num_workers", "overwrite_cache", "tokenized_path",
    "output_dir", "overwrite_output_dir", "adapter_name_or_path", "resume_from_checkpoint", "logging_steps",
    "logging_first_step", "logging_dir", "plot_loss", "report_to", "run_name", "save_strategy",
    "save_steps", "save_total_limit", "on_save_error", "save_fallback_dir", "on_nonfinite",
    "max_nonfinite_updates", "ddp_timeout", "eval_dataset", "eval_strategy", "eval_steps", "eval_delay",
    "do_eval", "eval_on_start", "per_device_eval_batch_size", "predict_with_generate", "max_new_tokens",
    "load_best_model_at_end", "metric_for_best_model", "early_stopping_steps", "deepspeed", "fsdp",
    "forgetting_text",
))  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A checkpoint to go on from, read and found whole.

    ``changed`` names the keys that were allowed to differ from its own.
    """

    path: Path
    state: State
    changed: tuple[str, ...] = ()

    @property
    def values(self) -> Mapping[str, Any]:
        """What is not a tensor."""
        return self.state.values

    @property
    def batch(self) -> tuple[int, int]:
        """Rows in a micro-batch, and micro-batches of a process in an update."""
        size, accumulation = self.values["batch"]
        return size, accumulation

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.values["progress"]["step"])


def find_source(run: Path, wanted: str | bool | None) -> Source | None:
    """The checkpoint that ``wanted`` names: a path, or True for the newest good one in ``run``, if any.

    Raises:
        ModelError: the named one is not there; DamagedError: it is not what was written.
    """
    if not wanted:
        return None
    if wanted is not True:
        path = Path(wanted)
        if snapshots(path):  # a run's folder
            return newest_source(path, logger.warning) or _none_good(path)
        return Source(path, read_snapshot(path))
    found = newest_source(run, logger.warning)
    if found is None:
        if snapshots(run):
            _none_good(run)
        logger.info("nothing to resume in %s: starting from the beginning", run)
    return found


def newest_source(run: Path, tell: Callable[[str], None]) -> Source | None:
    """The newest checkpoint in ``run`` that is whole, if any; ``tell`` hears what is wrong with newer ones."""
    path, damaged = newest_good(run)
    for note in damaged:
        tell(f"WARNING: {note}")
    return Source(path, read_snapshot(path)) if path else None


def _none_good(run: Path) -> Source:
    raise ModelError(
        "none of the checkpoints can be used",
        place=str(run),
        remedy="start again with overwrite_output_dir: true, or in another output_dir",
    )


def settings_of(settings: Resolved) -> dict[str, Any]:
    """The configuration as JSON values."""
    values: dict[str, Any] = json.loads(settings.model_dump_json(include=set(TrainConfig.model_fields)))
    return values


def check_settings(source: Source, settings: Resolved, allowed: Collection[str]) -> Source:
    """Refuse settings that lead elsewhere than those of the checkpoint, but for the keys ``allowed``.

    Returns:
        ``source``, with those of the keys that do differ.

    Raises:
        UsageError: with a table of all that differs.
    """
    saved, now = source.values["settings"], settings_of(settings)
    known = {**saved, **now}
    unknown = sorted(set(allowed) - set(known))
    if unknown:
        raise UsageError(f"--allow-change: no key is called `{unknown[0]}`", remedy="see docs/configuration.md")
    differing = [
        key for key in known if key not in _HARMLESS and saved.get(key) != now.get(key, saved.get(key))
    ]
    refused = [key for key in differing if key not in allowed]
    if refused:
        wide = max(map(len, refused))
        table = "\n".join(f"  {key:<{wide}}  {saved.get(key)!r} → {now.get(key)!r}" for key in refused)
        raise UsageError(
            f"the checkpoint belongs to other settings, which would lead elsewhere:\n{table}",
            place=str(source.path),
            remedy=f"set them back, or add {' '.join(f'--allow-change {key}' for key in refused)}",
        )
    for key in differing:
        logger.warning("changed by --allow-change: %s %r → %r", key, saved.get(key), now.get(key))
    return replace(source, changed=tuple(differing))


def check_facts(source: Source, facts: Mapping[str, Any], allowed: Collection[str]) -> Source:
    """Refuse other data, another base or another tokenizer than the checkpoint's, whatever their names are.

    Returns:
        ``source``, with the keys ``allowed`` of those that do differ.

    Raises:
        ModelError: naming what differs.
    """
    keys, changed = {"data": "dataset", "base": "model_name_or_path"}, list(source.changed)
    for name, value in facts.items():
        key = keys.get(name, "template")
        if source.values["facts"].get(name) == value:
            continue
        if key not in allowed:
            raise ModelError(
                f"the checkpoint was made with another {name.replace('_', ' ')} (compared by content)",
                place=str(source.path),
                remedy=f"use the one of then, or add --allow-change {key} if you mean it",
            )
        changed.append(key)
    return replace(source, changed=tuple(dict.fromkeys(changed)))


def environment(ranks: int) -> dict[str, Any]:
    """What decides whether sums are rounded in the same way."""
    return {
        "lorakit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": hardware.processor_name(),
        "device": torch.cuda.get_device_name() if hardware.device() == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "instructions": os.environ.get("ATEN_CPU_CAPABILITY") or torch.backends.cpu.get_cpu_capability(),
        "passes": native.library() is not None,
        "ranks": ranks,
    }


def grade(source: Source, ranks: int) -> str:
    """How exact going on is, as a line for the log."""
    if source.changed:
        return f"on another course than before, for {', '.join(source.changed)} changed"
    saved, now = source.values["environment"], environment(ranks)
    differing = [f"{key} {saved.get(key)} → {value}" for key, value in now.items() if saved.get(key) != value]
    if not differing:
        return "R0, bit for bit as if it had never stopped"
    return f"R1, the same trajectory up to rounding ({', '.join(differing)})"
