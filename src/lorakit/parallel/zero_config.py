"""A user's DeepSpeed JSON, completed: ``auto`` filled in, what contradicts the run refused. No torch here.

The run has its own loop, optimizer, schedule, clipping and precision. A JSON file may say them again, as files
for other programs do, but not otherwise: every difference is refused with both values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import UsageError

_PASSED = {  # top-level keys that are DeepSpeed's business alone
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "comms_logger", "memory_breakdown", "dump_state",
}  # fmt: skip
_OURS = {  # said by the run; the file may agree
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "steps_per_print",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
_ADAMW = {"Adam", "AdamW"}  # with DeepSpeed's defaults both decouple the weight decay


@dataclass(frozen=True)
class RunNumbers:
    """What the run does, as far as a DeepSpeed file may say it, too.

    Attributes:
        micro_batch: rows in a pass on one rank (``per_device_train_batch_size``).
        accumulation: passes of one rank in an update (``gradient_accumulation_steps``).
        ranks: number of processes.
        max_grad_norm: to which a gradient is clipped.
        precision: bf16, fp16 or fp32.
        optimizer: ``optim``.
        learning_rate: its highest.
        betas: of AdamW.
        epsilon: of AdamW.
        weight_decay: of the optimizer.
        hidden_size: of the model; the sizes of buffers follow from it.
    """

    micro_batch: int
    accumulation: int
    ranks: int
    max_grad_norm: float
    precision: str
    optimizer: str
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    hidden_size: int


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: it is not there, not JSON, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"deepspeed: cannot read {path}: {error}", remedy="give a JSON file") from error
    except json.JSONDecodeError as error:
        raise UsageError(
            f"deepspeed: not JSON: {error.msg}", place=f"{path}:{error.lineno}:{error.colno}"
        ) from error
    if not isinstance(found, dict):
        raise UsageError("deepspeed: the file must hold an object {…}", place=str(path))
    return found


def fill(user: Mapping[str, Any], run: RunNumbers, *, place: str | None = None) -> dict[str, Any]:
    """The settings for DeepSpeed's engine.

    Args:
        user: the file's content; it stays as it is.
        run: what the run does.
        place: the file's path, for messages.

    Raises:
        UsageError: naming everything that contradicts the run or cannot be honoured.
    """
    problems = [*_unknown(user), *_contradictions(user, run), *_zero_problems(user)]
    if problems:
        raise UsageError(
            "this DeepSpeed configuration does not fit the run:\n"
            + "\n".join(f"  {each}" for each in problems),
            place=place,
            remedy='write "auto" for what the run says itself, or change the key of the run',
        )
    zero = dict(user["zero_optimization"])
    sizes = {
        "reduce_bucket_size": run.hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * run.hidden_size**2),
        "stage3_param_persistence_threshold": 10 * run.hidden_size,
    }
    for key, size in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = size
    return {
        **{key: value for key, value in user.items() if key in _PASSED},
        "zero_optimization": zero,
        # The engine sees one micro-batch at a time, unclipped: the loop tells it which is an update's last.
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # with offload, too, the run's own optimizer steps, on the CPU
    }


def _unknown(user: Mapping[str, Any]) -> Iterator[str]:
    for key in user:
        if key not in _PASSED | _OURS:
            yield f"{key}: lorakit does not do this through DeepSpeed; remove it"


def _contradictions(user: Mapping[str, Any], run: RunNumbers) -> Iterator[str]:
    said = {
        "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", run.micro_batch),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", run.accumulation),
        "train_batch_size": ("rows of an update", run.micro_batch * run.accumulation * run.ranks),
        "gradient_clipping": ("max_grad_norm", run.max_grad_norm),
        "fp16.enabled": ("fp16", run.precision == "fp16"),
        "bf16.enabled": ("bf16", run.precision == "bf16"),
        "optimizer.params.lr": ("learning_rate", run.learning_rate),
        "optimizer.params.betas": ("adam_beta1, adam_beta2", list(run.betas)),
        "optimizer.params.eps": ("adam_epsilon", run.epsilon),
        "optimizer.params.weight_decay": ("weight_decay", run.weight_decay),
        "zero_force_ds_cpu_optimizer": ("lorakit", False),
    }
    for path, (key, ours) in said.items():
        theirs = _at(user, path)
        if theirs not in (None, "auto", ours):
            yield f"{path} is {json.dumps(theirs)}, the run's {key} is {json.dumps(ours)}"
    kind = _at(user, "optimizer.type")
    if kind is not None and not (kind in _ADAMW and run.optimizer == "adamw_torch"):
        yield f"optimizer.type is {kind}, the run's optim is {run.optimizer}"
    params = _at(user, "scheduler.params") or {}
    if "scheduler" in user and set(params.values()) - {"auto"}:
        yield 'scheduler: the learning rate follows lr_scheduler_type; remove the section, or write "auto"'


def _zero_problems(user: Mapping[str, Any]) -> Iterator[str]:
    stage = _at(user, "zero_optimization.stage")
    if stage not in (1, 2, 3):
        yield f"zero_optimization.stage is {json.dumps(stage)}, it must be 1, 2 or 3"
    for part in ("offload_optimizer", "offload_param"):
        device = _at(user, f"zero_optimization.{part}.device")
        if device not in (None, "none", "cpu"):
            yield f"zero_optimization.{part}.device is {json.dumps(device)}, it can be none or cpu"
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        if _at(user, f"zero_optimization.{key}") not in (None, 1, -1):
            yield f"zero_optimization.{key}: parts within a machine are not supported; remove it"


def _at(settings: Any, path: str) -> Any:
    """The value at ``a.b.c``, None if it or anything on the way is missing."""
    for key in path.split("."):
        settings = settings.get(key) if isinstance(settings, Mapping) else None
    return settings
