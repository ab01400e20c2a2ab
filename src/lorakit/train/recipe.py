"""A training run, told on one page: configuration in, adapter and evidence out.

load → resolve → claim the folder → build → (evaluate the base) → attach → fit → save → evaluate → report
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit import hardware
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.manager import LoRAManager
from lorakit.checkpoint.peft_format import save_adapter
from lorakit.config.load import load, load_mapping
from lorakit.config.resolve import Resolved, resolve
from lorakit.data.encode import DataSummary, Row, encode_all
from lorakit.data.formats import read_samples
from lorakit.data.sample import Sample, shared_system
from lorakit.errors import Interrupted, ModelError
from lorakit.evals.evaluate import Evaluation, evaluate
from lorakit.log import MetricsFile, logger
from lorakit.models.load import check_vocabulary, load_model, load_tokenizer
from lorakit.models.objective import batching
from lorakit.models.sources import ModelSource, locate
from lorakit.train.display import Display, make_display
from lorakit.train.folder import RunFolder
from lorakit.train.loop import Hooks, Plan, fit
from lorakit.train.optim import adamw
from lorakit.train.order import total_steps
from lorakit.train.record import describe, fingerprint, publish
from lorakit.train.schedule import warmup_steps
from lorakit.train.step import check_gradients_arrive

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """All that a run works on, built from the configuration."""

    settings: Resolved
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    data: DataSummary
    held_out: list[Sample]
    system: str | None  # the system message that all training rows share
    source: ModelSource
    plan: Plan


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
    run = load_mapping(config, Path.cwd()) if isinstance(config, Mapping) else load(config, overrides)
    settings = resolve(run)
    for warning in settings.warnings:
        logger.warning("warning: %s", warning)
    folder = RunFolder.claim(
        Path(settings.output_dir), settings.to_yaml(), overwrite=settings.overwrite_output_dir
    )
    with MetricsFile(folder.metrics) as metrics:
        job = build(settings)
        before = _evaluate(job, metrics, step=0, wanted=settings.eval_on_start)
        base = fingerprint(job.model)
        _attach(job)
        stopped = _fit(job, folder, metrics)
        _save(job, folder.adapter)
        if fingerprint(job.model) != base:
            raise ModelError("training changed the base weights: the adapter cannot be trusted")
        after = None
        if stopped is None:
            after = _evaluate(job, metrics, step=job.plan.steps, wanted=settings.do_eval)
    status = "finished" if stopped is None else "interrupted"
    report = publish(folder, describe(job, before, after, started=started, status=status))
    if stopped is not None:
        raise Interrupted(f"stopped by signal {stopped}; the adapter is in {folder.adapter}", signum=stopped)
    return RunResult(folder.path, folder.adapter, report, before, after)


def build(settings: Resolved) -> Job:
    """Load model, tokenizer and rows, and fix the numbers of the run; nothing is trained or written."""
    torch.manual_seed(settings.seed)
    samples = read_samples(settings.dataset, settings.max_samples)
    held_out = read_samples(settings.eval_dataset, settings.max_samples) if settings.eval_dataset else []
    source = locate(settings.model_name_or_path, settings.model_revision)
    tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
    rows, data = encode_all(tokenizer, samples, settings.cutoff_len)
    model = load_model(
        source,
        precision=settings.precision,
        device=hardware.device(),
        trust_remote_code=settings.trust_remote_code,
    )
    check_vocabulary(model, tokenizer)
    logger.info(
        "%s rows, %s tokens (%s with loss), longest %s; truncated %s, dropped %s",
        data.rows, data.tokens, data.supervised_tokens, data.longest, data.truncated, data.dropped,
    )  # fmt: skip
    return Job(
        settings=settings,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        data=data,
        held_out=held_out,
        system=shared_system(samples),
        source=source,
        plan=_plan(settings, len(rows)),
    )


def _plan(settings: Resolved, rows: int) -> Plan:
    steps = total_steps(
        rows, settings.effective_batch, epochs=settings.num_train_epochs, max_steps=settings.max_steps
    )
    return Plan(
        steps=steps,
        micro_batch=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        schedule=settings.lr_scheduler_type,
        learning_rate=settings.learning_rate,
        warmup=warmup_steps(steps, ratio=settings.warmup_ratio, count=settings.warmup_steps),
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
    )


def _attach(job: Job) -> None:
    settings = job.settings
    config = LoRAConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target,
        use_rslora=settings.use_rslora,
    )
    attach(job.model, config, seed=settings.seed)
    if settings.gradient_checkpointing:
        job.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _fit(job: Job, folder: RunFolder, metrics: MetricsFile) -> int | None:
    """Train; returns the signal that stopped it, if one did."""
    settings, plan = job.settings, job.plan
    optimizer = adamw(
        job.model,
        rate=plan.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    with batching(job.model, job.tokenizer, job.rows) as collate, make_display(plan.steps) as display:
        check_gradients_arrive(job.model, collate([min(job.rows, key=lambda row: len(row.ids))]))
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
        )


def _log(entry: dict[str, Any], metrics: MetricsFile, display: Display) -> None:
    metrics.write("train", **entry)
    display.log(entry)


def _save(job: Job, path: Path) -> None:
    save_adapter(
        job.model,
        path,
        base_model=job.settings.model_name_or_path,
        revision=job.settings.model_revision,
        notes={"system": job.system},
    )


def _evaluate(job: Job, metrics: MetricsFile, *, step: int, wanted: bool) -> Evaluation | None:
    """Score the held-out rows with whatever the model is now, adapters merged for speed."""
    if not wanted:
        return None
    settings, manager = job.settings, LoRAManager(job.model)
    start, what = time.monotonic(), "adapter" if step else "base model"
    manager.merge_lora_weights()
    evaluation = evaluate(
        job.model,
        job.tokenizer,
        job.held_out,
        cutoff_len=settings.cutoff_len,
        batch_size=settings.per_device_eval_batch_size,
        max_new_tokens=settings.max_new_tokens if settings.predict_with_generate else None,
        on_batch=lambda done, total: logger.info("evaluating the %s: %d/%d rows", what, done, total),
    )
    manager.unmerge_lora_weights()
    metrics.write("eval", step=step, seconds=time.monotonic() - start, **evaluation.scores())
    return evaluation
