"""A training run, told on one page: configuration in, adapter and evidence out.

load → resolve → check the folder → build → (evaluate the base) → fit → save → evaluate → report
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapters.attach import rank_allocator
from lorakit.checkpoint.manager import LoRAManager
from lorakit.checkpoint.peft_format import save_adapter
from lorakit.config.load import load, load_mapping
from lorakit.config.resolve import resolve
from lorakit.errors import Interrupted, ModelError
from lorakit.evals.evaluate import Evaluation, evaluate
from lorakit.evals.objective import batching
from lorakit.log import MetricsFile, logger
from lorakit.models.quantized import quantization_of
from lorakit.training.display import Display, make_display
from lorakit.training.folder import RunFolder
from lorakit.training.job import Job, build
from lorakit.training.loop import Hooks, fit
from lorakit.training.optim import adamw
from lorakit.training.record import describe, fingerprint, publish


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    report: Path
    before: Evaluation | None
    after: Evaluation | None


def train(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunResult:
    """Train one adapter as a YAML file, or a mapping of the same keys, says.

    Args:
        config: path of the file, or the keys themselves (paths relative to the current directory).
        overrides: ``key=value`` texts that win over ``config``.

    Raises:
        ConfigError, DataError, ModelError, ConflictError, DivergedError, StorageError: see `lorakit.errors`.
        Interrupted: stopped by a signal; the adapter as it was then is saved.
    """
    started = time.time()
    if isinstance(config, Mapping):
        settings = resolve(load_mapping(config, Path.cwd(), overrides))
    else:
        settings = resolve(load(config, overrides))
    for warning in settings.warnings:
        logger.warning("warning: %s", warning)
    folder, overwrite = RunFolder(Path(settings.output_dir)), settings.overwrite_output_dir
    folder.check(overwrite=overwrite)
    job = build(settings)
    folder.begin(settings.to_yaml(), overwrite=overwrite)
    with MetricsFile(folder.metrics) as metrics:
        before = _evaluate(job, metrics, step=0, wanted=settings.eval_on_start)
        base = fingerprint(job.model)
        stopped = _fit(job, folder, metrics)
        _save(job, folder.adapter)
        if fingerprint(job.model) != base:
            raise ModelError("training changed the base weights: the adapter cannot be trusted")
        wanted = settings.do_eval and stopped is None
        after = _evaluate(job, metrics, step=job.plan.steps, wanted=wanted)
    status = "finished" if stopped is None else "interrupted"
    report = publish(folder, describe(job, before, after, started=started, status=status))
    if stopped is not None:
        raise Interrupted(f"stopped by signal {stopped}; the adapter is in {folder.adapter}", signum=stopped)
    return RunResult(folder.path, folder.adapter, report, before, after)


def _fit(job: Job, folder: RunFolder, metrics: MetricsFile) -> int | None:
    """Train; returns the signal that stopped it, if one did."""
    settings, plan = job.settings, job.plan
    optimizer = adamw(
        job.model,
        rate=plan.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        ratio=settings.loraplus_lr_ratio,
    )
    budget = rank_allocator(job.model) if settings.use_adalora else None
    with batching(job.model, job.tokenizer, job.rows) as collate, make_display(plan.steps) as display:
        return fit(
            job.model,
            job.rows,
            optimizer,
            plan,
            collate=collate,
            hooks=Hooks(
                on_step=display.advance,
                on_log=lambda entry: _log(entry, metrics, display),
                on_save=lambda step: _save(job, folder.checkpoint(step)),
            ),
            budget=budget,
        )


def _log(entry: dict[str, Any], metrics: MetricsFile, display: Display) -> None:
    metrics.write("train", **entry)
    display.log(entry)


def _save(job: Job, path: Path) -> None:
    kept = job.settings.quantization or quantization_of(job.model)
    save_adapter(
        job.model,
        path,
        base_model=job.settings.model_name_or_path,
        revision=job.settings.model_revision,
        notes={
            "system": job.system,
            "template": job.template.notes(),
            "text": job.text,
            "quantization": kept and kept.to_dict(),
        },
        texts=job.template.files(),
    )


def _evaluate(job: Job, metrics: MetricsFile, *, step: int, wanted: bool) -> Evaluation | None:
    """Score the held-out rows with whatever the model is now, adapters merged for speed."""
    if not wanted or job.held_out is None:
        return None
    settings, manager = job.settings, LoRAManager(job.model)
    start, what = time.monotonic(), "adapter" if step else "base model"
    if quantization_of(job.model) is None:  # merging would round the update away
        manager.merge_lora_weights()
    evaluation = evaluate(
        job.model,
        job.tokenizer,
        job.held_out,
        batch_size=settings.per_device_eval_batch_size,
        max_new_tokens=settings.max_new_tokens if settings.predict_with_generate else None,
        on_batch=lambda done, total: logger.info("evaluating the %s: %d/%d rows", what, done, total),
    )
    manager.unmerge_lora_weights()
    metrics.write("eval", step=step, seconds=time.monotonic() - start, **evaluation.scores())
    return evaluation
