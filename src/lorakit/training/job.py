"""A job: all that a run works on, built from the resolved configuration before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorakit import hardware
from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.config.resolve import Resolved
from lorakit.data.encode import DataSummary, Row, encode_all
from lorakit.data.formats import read_samples
from lorakit.data.sample import Sample, shared_system
from lorakit.evals.objective import batching
from lorakit.log import logger
from lorakit.models.load import check_vocabulary, load_model, load_tokenizer
from lorakit.models.sources import ModelSource, locate
from lorakit.training.loop import Plan
from lorakit.training.order import total_steps
from lorakit.training.schedule import warmup_steps
from lorakit.training.step import check_gradients_arrive

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


def build(settings: Resolved) -> Job:
    """Load model, tokenizer and rows, attach the adapter and fix the numbers; nothing is trained or written.

    The adapter's B is zero, so that the model still answers as the base does, bit for bit.
    """
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
    _attach(model, settings)
    with batching(model, tokenizer, rows) as collate:
        check_gradients_arrive(model, collate([min(rows, key=lambda row: len(row.ids))]))
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


def _attach(model: PreTrainedModel, settings: Resolved) -> None:
    config = LoRAConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_target,
        use_rslora=settings.use_rslora,
    )
    attach(model, config, seed=settings.seed)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


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
