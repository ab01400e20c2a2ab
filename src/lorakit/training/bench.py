"""How fast a configuration trains here, and what has the time.

The updates are those of the run, made by its own loop; nothing is written. The bound is every product with a
frozen weight, there and back, alone on as many tokens: the roofline of a run whose other work is free.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lorakit import hardware
from lorakit.adapters.attach import rank_allocator
from lorakit.errors import UsageError
from lorakit.evals.objective import batching
from lorakit.models.decoder import by_parts
from lorakit.ops import native
from lorakit.ops.loss import _PRODUCT
from lorakit.parallel.world import World
from lorakit.training.engine import share_work, switches
from lorakit.training.job import Job, build
from lorakit.training.loop import Hooks, Loop
from lorakit.training.progress import Progress
from lorakit.training.recipe import read_settings
from lorakit.training.scale import LossScale
from lorakit.training.signals import Stopped, StopRequest

_ALONE = World()
_PROFILED = 2  # updates
_PARTS = {  # of an update, by what the names of its operations begin with
    "frozen layers and adapters": (
        "aten::mm",
        "aten::addmm",
        "aten::_int_mm",
        "_Projections",
        "_FrozenLinear",
        "_LoRALinear",
    ),
    "attention": ("_PackedAttention", "aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_scaled_dot"),
    "norms and gates": ("_RMSNorm", "_Gated", "aten::silu", "aten::gelu", "aten::rsqrt", "aten::native_layer"),
    "loss": ("_LinearCrossEntropy", "_CrossEntropy", "aten::_log_softmax", "aten::logsumexp"),
    "optimizer": ("aten::_fused_adam", "aten::_foreach", "Optimizer."),
}


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        updates: that were timed, after a first one.
        tokens_per_second: median over updates, padding not counted.
        bound_tokens_per_second: of the frozen weights' products alone.
        share: the one over the other.
        parts: share of an update's computing time by part.
        batch_share: share of the time that making batches takes.
        peak_gb: largest memory so far.
        advice: what limits the speed, most important first.
    """

    updates: int
    tokens_per_second: float
    bound_tokens_per_second: float
    share: float
    parts: dict[str, float]
    batch_share: float
    peak_gb: float
    advice: list[str]


def bench(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, seconds: float = 60.0
) -> Speed:
    """Train for so many ``seconds`` as the configuration says, keep nothing, and tell how fast that was.

    Raises:
        UsageError: the run shares its work among processes.
        ConfigError, DataError, ModelError, MemoryLimitError: as `train`.
    """
    settings = read_settings(config, overrides)
    if settings.fsdp or settings.deepspeed:
        raise UsageError("bench measures one process", remedy="leave fsdp and deepspeed out: fsdp= deepspeed=")
    job = build(settings)
    meter = _Meter(job, time.monotonic() + seconds)
    with switches(settings, job.model), batching(job.model, job.tokenizer, job.rows) as collate:
        meter.train(collate)
        parts = meter.profile(collate)
    rates = meter.rates()
    bound = _bound(job)
    rate = statistics.median(rates)
    making = meter.loop_seconds and meter.data_seconds / meter.loop_seconds
    peak = round(hardware.memory_peak() / 1e9, 3)
    found = Speed(len(rates), rate, bound, rate / bound, parts, making, peak, [])
    return replace(found, advice=_advice(job, found))


class _Meter(StopRequest):
    """A run whose updates are timed, and that stops itself."""

    def __init__(self, job: Job, end: float) -> None:
        super().__init__()
        self.job, self._end, self._last = job, end, 0
        self._strategy = share_work(job.settings, job.model, _ALONE)
        self._progress = Progress(scale=LossScale() if job.settings.precision == "fp16" else None)
        self.times, self.tokens = [time.monotonic()], [0]
        self.data_seconds = self.loop_seconds = 0.0

    def poll(self, world: World = _ALONE) -> None:
        """Leave when the time is over and two updates are timed, or the updates asked for are made."""
        done = self._progress.step
        if (self._last and done >= self._last) or (
            not self._last and done > 2 and time.monotonic() > self._end
        ):
            raise Stopped(0)
        super().poll(world)

    def train(self, collate: Callable[..., Any]) -> None:
        """Updates until the time is over, or the run."""
        plan = replace(
            self.job.plan, logging_steps=1, save_steps=None, eval_steps=None, patience=None, unfreeze_after=None
        )
        hooks = Hooks(
            on_step=lambda step, loss: self.times.append(time.monotonic()),
            on_log=self._log,
            on_note=lambda note: None,
            save=lambda: None,
            evaluate=lambda step: None,
            on_refused=lambda facts: None,
            roll_back=lambda: None,
            unfreeze=lambda: None,
        )
        budget = rank_allocator(self.job.model) if self.job.settings.use_adalora else None
        loop = Loop(
            self._strategy, self.job.rows, plan, self._progress,
            collate=collate, hooks=hooks, stop=self, budget=budget,
        )  # fmt: skip
        try:
            loop.run()
        except Stopped as stopped:
            if stopped.signum:
                raise

    def _log(self, entry: dict[str, Any]) -> None:
        self.tokens.append(self._progress.tokens)
        self.data_seconds += entry["data_seconds"]
        self.loop_seconds = self.times[-1] - self.times[0]

    def rates(self) -> list[float]:
        """Tokens a second of each update but the first, which prepares."""
        times, tokens = pairwise(self.times), pairwise(self.tokens)
        rates = [(t - s) / (b - a) for (a, b), (s, t) in zip(times, tokens, strict=True)]
        return rates[1:] or rates

    def profile(self, collate: Callable[..., Any]) -> dict[str, float]:
        """Shares of the computing time of two more updates, whose decoder layers are computed part by part."""
        times, tokens = self.times[:], self.tokens[:]
        self._last = self._progress.step + _PROFILED
        with by_parts(), profile(activities=[ProfilerActivity.CPU]) as seen:
            self.train(collate)
        self.times, self.tokens = times, tokens
        spent = {part: 0.0 for part in (*_PARTS, "other")}
        for event in seen.key_averages():
            part = next((part for part, names in _PARTS.items() if event.key.startswith(names)), "other")
            spent[part] += event.self_cpu_time_total
        return {part: time / sum(spent.values()) for part, time in spent.items()}


def _bound(job: Job) -> float:
    """Tokens a second of every product with a frozen weight, there and back, on a pass's worth of tokens."""
    run = frozen_products(job.model)
    lengths = [len(row.ids) for row in job.rows[:64]]
    supervised = sum(row.supervised for row in job.rows[:64]) / sum(lengths)
    tokens = job.plan.pass_tokens or max(1, round(statistics.mean(lengths) * job.plan.grouping.size))
    took = []
    for _ in range(3):
        start = time.perf_counter()
        run(tokens, round(tokens * supervised))
        took.append(time.perf_counter() - start)
    return tokens / min(took)


def frozen_products(model: nn.Module) -> Callable[[int, int], None]:
    """A function that makes x Wᵀ and g W of every linear layer, on some tokens; the head's on labelled ones."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    weights = [(_shape(layer), layer is head) for layer in model.modules() if isinstance(layer, nn.Linear)]
    like = next(p for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    kept: dict[tuple[int, int], Tensor] = {}

    def run(tokens: int, labelled: int) -> None:
        for shape, is_head in weights:
            if shape not in kept:
                kept[shape] = torch.randn(shape, dtype=torch.float32).to(like)
            W = kept[shape]
            if not is_head:
                torch.mm(_operand(tokens, shape[1], like), W.T)
                torch.mm(_operand(tokens, shape[0], like), W)
                continue
            for some in _operand(labelled, shape[1], like).split(max(1, _PRODUCT // shape[0])):
                torch.mm(some @ W.T, W)

    return run


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _operand(rows: int, width: int, like: Tensor) -> Tensor:
    return torch.ones(rows, width, dtype=like.dtype, device=like.device)


def _advice(job: Job, found: Speed) -> list[str]:
    settings, lines = job.settings, []
    if job.model.device.type == "cpu" and native.library() is None:
        lines.append("C++ passes are off: install g++, or unset LORAKIT_NATIVE (`lorakit env` says which)")
    if settings.precision == "fp32" and hardware.supports("bf16"):
        lines.append("fp32 products are several times slower than bf16's here: precision=bf16")
    if found.batch_share > 0.1:
        lines.append(f"making batches takes {found.batch_share:.0%} of the time")
    if settings.gradient_checkpointing:
        lines.append("gradient_checkpointing computes every forward pass twice; leave it out if memory allows")
    part, most = max(((p, s) for p, s in found.parts.items() if p != "other"), key=lambda pair: pair[1])
    lines.append(f"the largest part is {part}, {most:.0%} of an update")
    if found.share > 0.6:
        lines.append("most of the time are products with frozen weights: fewer tokens, or quantization_bit=8")
    return lines
