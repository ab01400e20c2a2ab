"""A job: all that a run works on, built from the resolved configuration before anything is trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorakit import hardware
from lorakit.adapters.attach import adapter_layers, attach, count_parameters
from lorakit.adapters.spec import LoRAConfig
from lorakit.config.resolve import Resolved
from lorakit.data.encode import DataSummary, Row, encode_all
from lorakit.data.formats import read_samples
from lorakit.data.sample import Sample, shared_system
from lorakit.evals.objective import batching
from lorakit.log import logger
from lorakit.lowrank.budget import RankSchedule
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
    plan = _plan(settings, len(rows))
    _attach(model, settings, plan.steps)
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
        plan=plan,
    )


def _attach(model: PreTrainedModel, settings: Resolved, steps: int) -> None:
    attach(model, adapter_config(settings, steps), seed=settings.seed)
    layers = adapter_layers(model).items()
    kinds = Counter((path.rpartition(".")[2], tuple(layer.weight.shape)) for path, layer in layers)
    counted = count_parameters(model)
    logger.info(
        "%s on %s; %s of %s parameters train (%.3g %%)",
        next(iter(layers))[1].adapter("default").method.name,
        ", ".join(f"{count} × {name} {list(shape)}" for (name, shape), count in kinds.items()),
        f"{counted['trainable']:,}", f"{counted['total']:,}", counted["percent"],
    )  # fmt: skip
    if settings.lora_fa:
        logger.info(
            "lora_fa is LoRA-FA: A stays frozen, B is trained (it has nothing to do with Flash Attention)"
        )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def adapter_config(settings: Resolved, steps: int) -> LoRAConfig:
    """The adapter that the configuration describes, for a training of ``steps`` updates."""
    start = settings.init_lora_weights
    if settings.pissa_init and start == "kaiming":
        start = "pissa" if settings.pissa_iter < 0 else f"pissa_niter_{settings.pissa_iter}"
    return LoRAConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_only(settings.lora_target),
        use_rslora=settings.use_rslora,
        init_lora_weights=start,
        method="adalora" if settings.use_adalora else "lora",
        use_dora=settings.use_dora,
        lora_fa=settings.lora_fa,
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        modules_to_save=settings.additional_target or (),
        exclude_modules=_only(settings.exclude_modules or ()),
        layers_to_transform=settings.layers_to_transform,
        schedule=_schedule(settings, steps) if settings.use_adalora else None,
    )


def _only(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """A tuple of one as text, which may be a regular expression."""
    return names[0] if isinstance(names, tuple) and len(names) == 1 else names


def _schedule(settings: Resolved, steps: int) -> RankSchedule:
    tinit, tfinal = settings.adalora_tinit, settings.adalora_tfinal
    return RankSchedule(
        target_r=settings.adalora_target_r or max(1, settings.lora_rank // 2),
        total_step=steps,
        tinit=steps // 10 if tinit is None else tinit,
        tfinal=steps // 5 if tfinal is None else tfinal,
        deltaT=settings.adalora_delta_t,
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
