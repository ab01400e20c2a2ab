"""A job: all that a run works on, built from the resolved configuration before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lorakit import hardware
from lorakit.adapters.attach import adapter_layers, attach, count_parameters
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.binding import text_fingerprint
from lorakit.config.resolve import Resolved
from lorakit.data.encode import DataSummary, Row
from lorakit.data.prepare import Encoder
from lorakit.data.store import lengths_of
from lorakit.data.templates import Template
from lorakit.errors import ModelError
from lorakit.evals.evaluate import HeldOut, hold_out
from lorakit.evals.objective import batching
from lorakit.log import logger
from lorakit.lowrank.budget import RankSchedule
from lorakit.models.load import check_vocabulary, dense_weights, load_model, load_tokenizer
from lorakit.models.patch import can_pack
from lorakit.models.sources import ModelSource, locate
from lorakit.training.loop import Plan
from lorakit.training.order import Grouping, total_steps
from lorakit.training.reading import policy_of, template_of
from lorakit.training.rows import run_rows
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
    template: Template
    rows: Sequence[Row]
    data: DataSummary
    held_out: HeldOut | None
    system: str | None  # the system message that all training rows share
    source: ModelSource
    plan: Plan
    text: Mapping[str, str | None]  # what the adapter remembers of vocabulary and chat template


def build(settings: Resolved) -> Job:
    """Load model, tokenizer and rows, attach the adapter and fix the numbers; nothing is trained or written.

    The adapter's B is zero, so that the model still answers as the base does, bit for bit.
    """
    torch.manual_seed(settings.seed)
    source = locate(settings.model_name_or_path, settings.model_revision)
    tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
    template = template_of(settings, tokenizer)
    found = run_rows(settings, Encoder(tokenizer, template, policy_of(settings)))
    rows, data = found.training.rows, found.training.data
    held_out = found.held_out and hold_out(
        tokenizer,
        found.held_out,
        template=template,
        cutoff_len=settings.cutoff_len,
        answers=settings.predict_with_generate,
    )
    model = load_model(
        source,
        precision=settings.precision,
        device=hardware.device(),
        trust_remote_code=settings.trust_remote_code,
        quantization=settings.quantization,
    )
    check_vocabulary(model, tokenizer)
    lengths = lengths_of(rows)
    if settings.packing and not can_pack(model, longest=max(lengths)):
        raise ModelError(
            f"packing: rows of a {model.config.model_type} model cannot be kept from seeing each other",
            remedy="remove packing; group_by_length: true also saves padding",
        )
    plan = _plan(settings, lengths)
    _attach(model, settings, plan.steps, source)
    with batching(model, tokenizer, rows) as collate:
        check_gradients_arrive(model, collate([rows[lengths.index(min(lengths))]]))
    logger.info(
        "%s rows, %s tokens (%s with loss), longest %s; truncated %s, dropped %s",
        data.rows, data.tokens, data.supervised_tokens, data.longest, data.truncated, data.dropped,
    )  # fmt: skip
    return Job(
        settings=settings,
        model=model,
        tokenizer=tokenizer,
        template=template,
        rows=rows,
        data=data,
        held_out=held_out or None,
        system=found.training.system,
        source=source,
        plan=plan,
        text=text_fingerprint(tokenizer),
    )


def _attach(model: PreTrainedModel, settings: Resolved, steps: int, source: ModelSource) -> None:
    dense_weight = dense_weights(source, model) if settings.init_lora_weights == "loftq" else None
    attach(model, adapter_config(settings, steps), seed=settings.seed, dense_weight=dense_weight)
    layers = adapter_layers(model).items()
    kinds = Counter((path.rpartition(".")[2], layer.store.shape) for path, layer in layers)
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


def _grouping(settings: Resolved) -> Grouping:
    return Grouping(
        size=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        capacity=settings.cutoff_len if settings.packing else None,
        budget=settings.max_tokens_per_batch,
        like_lengths=settings.group_by_length,
    )


def _plan(settings: Resolved, lengths: Sequence[int]) -> Plan:
    grouping = _grouping(settings)
    per_epoch = grouping.updates_per_epoch(lengths)
    steps = total_steps(per_epoch, epochs=settings.num_train_epochs, max_steps=settings.max_steps)
    return Plan(
        steps=steps,
        grouping=grouping,
        updates_per_epoch=per_epoch,
        schedule=settings.lr_scheduler_type,
        learning_rate=settings.learning_rate,
        warmup=warmup_steps(steps, ratio=settings.warmup_ratio, count=settings.warmup_steps),
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
    )
