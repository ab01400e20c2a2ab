"""A job: all that a run works on, built from the resolved configuration before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import hardware
from lorakit.adapters.attach import adapter_layers, attach, count_parameters
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.binding import fingerprint, text_fingerprint, weights_fingerprint
from lorakit.checkpoint.peft_format import load_adapter
from lorakit.config.resolve import Resolved
from lorakit.data.configured import policy_of, template_of
from lorakit.data.encode import DataSummary, Row
from lorakit.data.prepare import Encoder
from lorakit.data.run_rows import run_rows
from lorakit.data.store import lengths_of, rows_fingerprint
from lorakit.data.templates import Template
from lorakit.errors import ModelError, UsageError
from lorakit.evals.evaluate import HeldOut, hold_out
from lorakit.evals.objective import batching
from lorakit.evals.probes import NeutralText, neutral_text
from lorakit.log import logger
from lorakit.lowrank.budget import RankSchedule
from lorakit.models.load import check_vocabulary, dense_weights, load_model, load_tokenizer
from lorakit.models.patch import can_pack
from lorakit.models.quantized import quantization_of
from lorakit.models.sources import ModelSource, locate
from lorakit.training.engine import find_batch, make_plan, pass_tokens
from lorakit.training.loop import Plan
from lorakit.training.progress import seed_everything
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
    neutral: NeutralText | None  # what forgetting is measured on
    system: str | None  # the system message that all training rows share
    source: ModelSource
    plan: Plan
    text: Mapping[str, str | None]  # what the adapter remembers of vocabulary and chat template
    content: str  # sha256 of the rows
    base: str  # sha256 of the base's weights
    bound_to: Mapping[str, Any]  # what an adapter remembers of its base
    reading: Mapping[str, Any]  # what became of the rows of the files

    def facts(self) -> dict[str, Any]:
        """What the run's course depends on besides settings, by content."""
        return {"data": self.content, "base": self.base, **self.text}

    def notes(self, *, base_trained: bool = False) -> dict[str, Any]:
        """What is saved with the adapter; on the original base it is refused if the base was trained, too."""
        base = {**self.bound_to, "weights": "trained"} if base_trained else self.bound_to
        kept = self.settings.quantization or quantization_of(self.model)  # asked for, or the file's own
        return {
            "base_model": self.settings.model_name_or_path,
            "revision": self.settings.model_revision,
            "notes": {
                "system": self.system,
                "template": self.template.notes(),
                "text": self.text,
                "base": base,
                "quantization": kept and kept.to_dict(),
            },
            "texts": self.template.files(),
        }


def build(
    settings: Resolved,
    ranks: int = 1,
    poll: Callable[[], None] = lambda: None,
    batch: tuple[int, int] | None = None,
) -> Job:
    """Load model, tokenizer and rows, attach the adapter and fix the numbers; nothing is trained or written.

    A new adapter's B is zero, so that the model still answers as the base does, bit for bit. ``poll`` is called
    between the parts, and leaves if somebody asked for it. ``batch`` is what `find_batch` found at an earlier
    start of the run.
    """
    seed_everything(settings.seed)
    poll()
    source = locate(settings.model_name_or_path, settings.model_revision)
    tokenizer = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
    template = template_of(settings, tokenizer)
    found = run_rows(settings, Encoder(tokenizer, template, policy_of(settings)), poll)
    poll()
    rows, data = found.training.rows, found.training.data
    logger.info(
        "%s rows, %s tokens (%s with loss), longest %s; truncated %s, dropped %s",
        data.rows, data.tokens, data.supervised_tokens, data.longest, data.truncated, data.dropped,
    )  # fmt: skip
    cut, answers = settings.cutoff_len, settings.predict_with_generate
    held_out = found.held_out and hold_out(
        tokenizer, found.held_out, template=template, cutoff_len=cut, answers=answers
    )
    neutral = settings.forgetting_text and neutral_text(settings.forgetting_text, tokenizer, template)
    poll()
    model = _load(settings, source)
    poll()
    check_vocabulary(model, tokenizer)
    base, bound_to = weights_fingerprint(model), fingerprint(model)
    lengths = lengths_of(rows)
    _check(settings, model, ranks)
    search = settings.auto_find_batch_size and batch is None
    if batch is None or not settings.auto_find_batch_size:
        batch = (settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    plan = make_plan(settings, lengths, ranks, batch, pass_tokens(settings, model))
    _attach(model, settings, plan.steps, source)
    with batching(model, tokenizer, rows) as collate:
        check_gradients_arrive(model, collate([rows[lengths.index(min(lengths))]]))
        if search:
            batch = find_batch(settings, model, rows, plan.grouping, collate, poll)
            plan = make_plan(settings, lengths, ranks, batch)
    return Job(
        settings=settings, model=model, tokenizer=tokenizer, template=template, rows=rows, data=data,
        held_out=held_out or None, neutral=neutral or None, system=found.training.system, source=source,
        plan=plan,
        text=text_fingerprint(tokenizer), content=rows_fingerprint(rows), base=base, bound_to=bound_to,
        reading=found.training.facts,
    )  # fmt: skip


def _load(settings: Resolved, source: ModelSource) -> PreTrainedModel:
    return load_model(
        source,
        precision=settings.precision,
        device="cpu" if settings.deepspeed or settings.fsdp else hardware.device(),  # they place it themselves
        trust_remote_code=settings.trust_remote_code,
        quantization=settings.quantization,
    )


def _check(settings: Resolved, model: PreTrainedModel, ranks: int) -> None:
    """Refuse what model or ranks do not allow."""
    if settings.packing and not can_pack(model):
        raise ModelError(
            f"packing: rows of a {model.config.model_type} model cannot be kept from seeing each other",
            remedy="remove packing; group_by_length: true also saves padding",
        )
    if settings.auto_find_batch_size and ranks > 1:
        raise UsageError("auto_find_batch_size: several processes would find several sizes", remedy="use one")


def _attach(model: PreTrainedModel, settings: Resolved, steps: int, source: ModelSource) -> None:
    if settings.adapter_name_or_path is None:
        dense_weight = dense_weights(source, model) if settings.init_lora_weights == "loftq" else None
        attach(model, adapter_config(settings, steps), seed=settings.seed, dense_weight=dense_weight)
    else:
        load_adapter(model, Path(settings.adapter_name_or_path))
        logger.info("going on with the adapter in %s: its rank and targets hold", settings.adapter_name_or_path)
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
