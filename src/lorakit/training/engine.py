"""From a configuration to what trains: plan, schedule, optimizer, and how the ranks share the work."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit import __version__
from lorakit.checkpoint.resume import settings_of
from lorakit.config.resolve import PASS_TOKENS, Resolved
from lorakit.config.rules import HIGHER_IS_BETTER
from lorakit.data.collate import Batch
from lorakit.data.encode import Row
from lorakit.data.order import Grouping, total_steps
from lorakit.data.store import lengths_of
from lorakit.evals.batch_size import find_optimal_batch_size, longest_rows, same_update
from lorakit.evals.objective import batch_loss
from lorakit.log import logger
from lorakit.models.liger import liger
from lorakit.models.memory import switched
from lorakit.models.patch import can_pack
from lorakit.optim.build import build_optimizer
from lorakit.optim.check import optimizer_spec
from lorakit.optim.schedule import Schedule, warmup_steps
from lorakit.parallel.make import Kind, make_strategy
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.parallel.zero_config import RunNumbers, fill, read
from lorakit.training.loop import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pass_tokens(settings: Resolved, model: PreTrainedModel) -> int | None:
    """How many tokens share a pass if nobody says which rows do; an update keeps its rows.

    On a GPU more tokens are faster; there micro-batches are passes, as the user sized them.
    """
    if settings.says_passes or not can_pack(model):
        return None
    if settings.pass_tokens is not None:
        return settings.pass_tokens or None
    return PASS_TOKENS if model.device.type == "cpu" else None


def make_plan(
    settings: Resolved, lengths: Sequence[int], ranks: int, batch: tuple[int, int], tokens: int | None = None
) -> Plan:
    """The numbers of the run, for rows of these lengths and so many processes.

    ``batch``: rows in a micro-batch, and micro-batches of one process in an update. ``tokens``: of a pass.
    """
    grouping = Grouping(
        size=batch[0],
        accumulation=batch[1] * ranks,
        capacity=settings.cutoff_len if settings.packing else None,
        budget=settings.max_tokens_per_batch,
        like_lengths=settings.group_by_length,
    )
    per_epoch = grouping.updates_per_epoch(lengths)
    steps = total_steps(per_epoch, epochs=settings.num_train_epochs, max_steps=settings.max_steps)
    every = {"no": None, "epoch": per_epoch}
    unfreeze = settings.unfreeze_after
    return Plan(
        steps=steps,
        grouping=grouping,
        updates_per_epoch=per_epoch,
        schedule=make_schedule(settings, steps),
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        log_first=settings.logging_first_step,
        save_steps=every.get(settings.save_strategy, settings.save_steps),
        eval_steps=every.get(settings.eval_strategy, settings.eval_steps),
        first_eval=settings.eval_delay,
        higher_is_better=settings.metric_for_best_model in HIGHER_IS_BETTER,
        patience=settings.early_stopping_steps,
        keep_best=settings.load_best_model_at_end,
        unfreeze_after=None if unfreeze is None else math.ceil(unfreeze * steps),
        on_nonfinite=settings.on_nonfinite,
        max_nonfinite=settings.max_nonfinite_updates,
        on_save_error=settings.on_save_error,
        pass_tokens=tokens,
    )


def make_schedule(settings: Resolved, steps: int) -> Schedule:
    """The course of the learning rate over so many updates."""
    return Schedule(
        kind=settings.lr_scheduler_type,
        peak=settings.learning_rate,
        steps=steps,
        warmup=warmup_steps(steps, ratio=settings.warmup_ratio, count=settings.warmup_steps),
        start_factor=settings.warmup_start_factor,
        settings=settings.lr_scheduler_kwargs or {},
    )


def find_batch(
    settings: Resolved,
    model: PreTrainedModel,
    rows: Sequence[Row],
    grouping: Grouping,
    collate: Callable[[Sequence[Row]], Batch],
    poll: Callable[[], None],
) -> tuple[int, int]:
    """The largest micro-batch that fits, and how many of them make an update of as many rows as before.

    ``grouping`` is that of one process, before the search.
    """
    lengths, rows_of_update = lengths_of(rows), grouping.size * grouping.accumulation
    plain = settings.model_copy(update={"torch_compile": False})  # each try would compile anew
    with switches(plain, model):
        most = find_optimal_batch_size(
            model,
            settings.max_memory_gb,
            make_batch=lambda count: collate([rows[i] for i in longest_rows(lengths, grouping, count)]),
            loss_fn=lambda model, batch: batch_loss(model, batch) / len(batch.targets_N),
            max_batch_size=rows_of_update,
            poll=poll,
        )
    batch = same_update(rows_of_update, most)
    logger.info("auto_find_batch_size: %d × %d rows make an update", *batch)
    return batch


@contextlib.contextmanager
def switches(settings: Resolved, model: PreTrainedModel) -> Iterator[None]:
    """What of the model trades time for memory, and whose kernels compute, within a block."""
    every = settings.gradient_checkpointing_every if settings.gradient_checkpointing else None
    offload, compiled = settings.offload_activations, settings.torch_compile
    with (
        liger(model) if settings.enable_liger_kernel else contextlib.nullcontext(),
        switched(model, recompute_every=every, offload=offload, compiled=compiled),
    ):
        yield


def share_work(settings: Resolved, model: PreTrainedModel, world: World) -> Strategy:
    """How the ranks share the work on what trains in ``model``.

    Raises:
        UsageError: DeepSpeed's settings contradict the run.
    """
    kind: Kind = "deepspeed" if settings.deepspeed else "fsdp" if settings.fsdp else "ddp"
    if world.size == 1 and kind == "ddp":
        kind = "none"
    zero = _zero_settings(settings, model, world) if kind == "deepspeed" else None
    optimizer = build_optimizer(model, optimizer_spec(settings))
    return make_strategy(kind, model, optimizer, world, deepspeed=zero)


def _zero_settings(settings: Resolved, model: PreTrainedModel, world: World) -> Mapping[str, Any]:
    """The user's DeepSpeed settings, completed."""
    given, spec = settings.deepspeed, optimizer_spec(settings)
    run = RunNumbers(
        micro_batch=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        ranks=world.size,
        max_grad_norm=settings.max_grad_norm,
        precision=settings.precision,
        optimizer=spec.name,
        learning_rate=spec.rate,
        betas=spec.betas,
        epsilon=spec.epsilon,
        weight_decay=spec.weight_decay,
        hidden_size=model.config.get_text_config().hidden_size,
    )
    if isinstance(given, str):
        return fill(read(Path(given)), run, place=given)
    return fill(given or {}, run)


def identity(settings: Resolved, facts: Mapping[str, Any]) -> dict[str, str]:
    """What all ranks of a run must agree on."""
    return {
        "lorakit": __version__,
        "torch": torch.__version__,
        **{key: repr(value) for key, value in settings_of(settings).items()},
        **{f"content of {name}": str(value) for name, value in facts.items()},
    }
