"""A run under way: what the loop asks of the outside, answered with a job, a folder and a metrics file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from lorakit.adapters.attach import freeze_backbone_params, rank_allocator
from lorakit.checkpoint.binding import weights_fingerprint
from lorakit.checkpoint.export import export_merged
from lorakit.checkpoint.manager import LoRAManager
from lorakit.checkpoint.peft_format import fill_adapter, save_adapter
from lorakit.checkpoint.resume import Source, environment, grade, newest_source, settings_of
from lorakit.checkpoint.snapshot import prune, read_snapshot, snapshot_bytes, write_snapshot
from lorakit.checkpoint.state import State
from lorakit.errors import DivergedError, LorakitError, MemoryLimitError, ModelError, StorageError
from lorakit.evals.evaluate import Evaluation, evaluate
from lorakit.evals.objective import batching
from lorakit.evals.probes import Forgetting, probe_forgetting
from lorakit.files import discard, low_space, write_json
from lorakit.log import MetricsFile, logger
from lorakit.models.memory import offloaded_state
from lorakit.models.patch import attention
from lorakit.models.quantized import quantization_of
from lorakit.parallel.strategy import Strategy
from lorakit.report.display import Display, make_display
from lorakit.report.trackers import TrackedRun, Trackers
from lorakit.training.engine import switches
from lorakit.training.folder import RunFolder
from lorakit.training.job import Job
from lorakit.training.loop import Hooks, Loop
from lorakit.training.progress import (
    Progress,
    allocator_state,
    allocator_values,
    random_state,
    restore_random_state,
)
from lorakit.training.record import describe, publish
from lorakit.training.scale import LossScale
from lorakit.training.signals import Stopped, StopRequest

_GENERATED = ("exact_match", "field_f1")
_EXCERPT = 300  # characters of a row in the record of an update that was not finite
_RANK_SEED = 1_000_003


class Run:
    """One run: its job, where its results go, and where it is.

    Every method that saves, evaluates or restores is called by all ranks alike; the first one writes.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        metrics: MetricsFile,
        trackers: Trackers,
        strategy: Strategy,
        stop: StopRequest,
    ) -> None:
        self.job, self.folder, self.strategy, self.stop = job, folder, strategy, stop
        self.metrics, self.trackers = metrics, trackers
        self.world = strategy.world
        self.budget = rank_allocator(job.model) if job.settings.use_adalora else None
        self.progress = Progress(scale=LossScale() if job.settings.precision == "fp16" else None)
        self.before: Evaluation | None = None  # the base model's scores
        self.forgetting: Forgetting | None = None
        self.source: Source | None = None
        self.grade: str | None = None
        self._display: Display = make_display(job.plan.steps, None if self.world.first else self._silence())
        self._unfrozen = False
        self._aside: Path | None = None  # the checkpoint in save_fallback_dir
        self._attention = job.model.config._attn_implementation  # for evaluations; `fit` packs
        if self.world.rank:  # each rank drops other activations
            torch.manual_seed(job.settings.seed + _RANK_SEED * self.world.rank)

    def fit(self) -> None:
        """Train; what it raises, `Loop.run` tells. The state is saved before an error leaves here."""
        job = self.job
        if self.world.first:  # a checkpoint has the weights, alone and in the state, and AdamW's two moments
            self._check_space(4 * sum(p.nbytes for p in job.model.parameters() if p.requires_grad))
        hooks = Hooks(
            on_step=self._display.advance,
            on_log=self._log,
            on_note=self._note,
            save=self.save,
            evaluate=self._watched,
            on_refused=self._dump,
            roll_back=self._roll_back,
            unfreeze=self._unfreeze,
        )
        with (
            self._offloaded(),
            switches(job.settings, job.model),
            batching(job.model, job.tokenizer, job.rows) as collate,
            self._display,
        ):
            loop = Loop(
                self.strategy, job.rows, job.plan, self.progress,
                collate=collate, hooks=hooks, stop=self.stop, budget=self.budget,
            )  # fmt: skip
            try:
                loop.run()
            except (Stopped, DivergedError, MemoryLimitError) as error:
                if isinstance(error, LorakitError):
                    self.metrics.write("error", step=self.progress.step, **error.to_dict())
                # Without memory in the middle of a sharded pass, the ranks are at different points.
                if self.strategy.recovers or not isinstance(error, MemoryLimitError):
                    self.save()
                raise

    def _offloaded(self) -> contextlib.AbstractContextManager[None]:
        wanted = self.job.settings.offload_optimizer
        return offloaded_state(self.strategy.optimizer) if wanted else contextlib.nullcontext()

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write a checkpoint of what is now, then delete what the limit does not leave.

        Raises:
            StorageError: the disk refuses, on every rank alike; older checkpoints stay.
        """
        state, failed = self._state(), None
        with self.strategy.whole():
            if self.world.first:
                try:
                    self._write(state)
                except StorageError as error:
                    failed = None if self._write_aside(state, error) else error.message
        (failed, *_) = self.world.gather(failed)
        if failed is not None:
            raise StorageError(failed, remedy="free some space; older checkpoints are untouched")

    def go_on(self, source: Source) -> None:
        """Take a run up again, and say how exactly."""
        self.load(source)
        self.source = source
        self.grade = grade(source, self.world.size)
        self._note(f"going on after update {self.progress.step} of {source.path}: {self.grade}")

    def load(self, source: Source) -> None:
        """Go on from a checkpoint: all of it, or an error before anything is changed."""
        state, values = source.state, source.values
        self.progress.load(values["progress"])
        if self._second_stage(self.progress.step):
            self._unfreeze()
        self.strategy.restore(state)
        if self.budget is not None:
            self.budget.load_state_dict(allocator_values(state.part("budget")))
        if values["before"] is not None:
            self.before = Evaluation.from_json(values["before"])
        if values["ranks"] == self.world.size:
            restore_random_state(state.part(f"rng{self.world.rank}"))
        else:
            torch.manual_seed(self.job.settings.seed + _RANK_SEED * self.world.rank + self.progress.step)

    def _state(self) -> State:
        state, grouping = self.strategy.collect(), self.job.plan.grouping
        if self.budget is not None:
            state.add("budget", allocator_state(self.budget.state_dict()))
        for rank, random in enumerate(self.world.gather(random_state())):
            state.add(f"rng{rank}", random)
        state.values |= {
            "progress": self.progress.to_json(),
            "settings": settings_of(self.job.settings),
            "facts": self.job.facts(),
            "environment": environment(self.world.size),
            "ranks": self.world.size,
            "batch": [grouping.size, grouping.accumulation // self.world.size],
            "before": self.before.to_json() if self.before else None,
        }
        return state

    def _write(self, state: State) -> None:
        settings, progress = self.job.settings, self.progress
        self._check_space(snapshot_bytes(state))
        state.values["metrics_bytes"] = self.metrics.settle()
        write_snapshot(self.folder.checkpoint(progress.step), state, self._fill)
        pinned = [self.folder.checkpoint(progress.best_step)] + ([self.source.path] if self.source else [])
        prune(self.folder.path, settings.save_total_limit, pinned)

    def _check_space(self, checkpoint: int) -> None:
        """Warn if two checkpoints of so many bytes do not fit: an old one goes after the new one is whole."""
        warning = low_space(self.folder.path, 2 * checkpoint)
        if warning:
            self._note(f"warning: {warning}")

    def _write_aside(self, state: State, refusal: StorageError) -> bool:
        """Write the checkpoint that the disk of the run refused into ``save_fallback_dir``, if there is one."""
        if self.job.settings.save_fallback_dir is None:
            return False
        place = Path(self.job.settings.save_fallback_dir, self.folder.path.resolve().name)
        target = place / self.folder.checkpoint(self.progress.step).name
        state.values["metrics_bytes"] = self.metrics.size()
        try:
            place.mkdir(parents=True, exist_ok=True)
            if target.exists() and target != self._aside:
                raise StorageError(f"{target} is another run's")
            write_snapshot(target, state, self._fill)
            if self._aside and self._aside != target:
                discard(self._aside)
        except (OSError, StorageError) as error:
            self._note(f"ALARM: nor can it be written to {place}: {error}")
            return False
        self._aside = target
        self._note(
            f"ALARM: {refusal.message}; the checkpoint is {target}: "
            "to go on from it, copy it into output_dir and give --resume auto"
        )
        return True

    def _fill(self, stage: Path) -> None:
        fill_adapter(self.job.model, stage, **self.job.notes(base_trained=self._unfrozen))
        (stage / self.folder.config.name).write_text(self.job.settings.to_yaml(), encoding="utf-8")

    def result(self) -> Path:
        """Where the result is: the adapter, or after a second stage the whole model."""
        return self.folder.model if self._unfrozen else self.folder.adapter

    def save_result(self) -> None:
        """Write the adapter; after a second stage the base has changed, and the model is written in the end."""
        with self.strategy.whole():
            if self.world.first and not self._unfrozen:
                save_adapter(self.job.model, self.folder.adapter, **self.job.notes())
        self.world.wait()

    def check_base(self) -> None:
        """Refuse to call a run good whose frozen weights changed.

        Raises:
            ModelError: they did.
        """
        whole = self.strategy.recovers and not self._unfrozen
        if whole and weights_fingerprint(self.job.model) != self.job.base:
            raise ModelError("training changed the base weights: the adapter cannot be trusted")

    def publish(self, after: Evaluation | None, started: float, status: str) -> Path:
        """Write what the run says about itself, and the merged model if a second stage trained all of it."""
        record = describe(self.job, self.before, after, started=started, status=status)
        record |= {"updates": self.progress.step, "resumed": self.grade}
        record["forgetting"] = self.forgetting and self.forgetting.to_json()
        if self.world.first:
            self.metrics.settle()  # what is published must not outlive what it tells
            if self._unfrozen and status == "finished":
                dtype = next(self.job.model.parameters()).dtype
                if self.folder.model.exists():
                    discard(self.folder.model)
                export_merged(self.job.model, self.job.tokenizer, self.folder.model, dtype=dtype)
            return publish(self.folder, self.result(), record)
        return self.folder.report

    def take_best(self) -> None:
        """Put the weights of the best evaluation in the model, if that is wanted and was not the last."""
        progress = self.progress
        if not self.job.settings.load_best_model_at_end or progress.best is None:
            return
        try:
            self.strategy.restore(read_snapshot(self.folder.checkpoint(progress.best_step)))
        except ModelError as error:  # a whole run must not be lost for it
            self._note(
                f"WARNING: the best checkpoint cannot be used, the last update is the result: {error.message}"
            )
        else:
            logger.info("the adapter of update %d is the best", progress.best_step)

    # ------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, *, step: int, merged: bool = True, answers: bool = True) -> Evaluation | None:
        """Score the held-out rows, if there are any, with what the model is now."""
        if self.job.held_out is None:
            return None
        settings, model = self.job.settings, self.job.model
        start, what = time.monotonic(), f"model of update {step}" if step else "base model"
        with self._merged(wanted=merged), attention(model, self._attention):
            evaluation = evaluate(
                model,
                self.job.tokenizer,
                self.job.held_out,
                batch_size=settings.per_device_eval_batch_size,
                max_new_tokens=settings.max_new_tokens if settings.predict_with_generate and answers else None,
                on_batch=lambda done, total: logger.info("evaluating the %s: %d/%d rows", what, done, total),
                poll=lambda: self.stop.poll(self.world),
            )
        scores = evaluation.scores()
        self._record("eval", {"step": step, "seconds": time.monotonic() - start, **scores})
        return evaluation

    def probe(self) -> None:
        """Measure base and adapter on the neutral text, if there is one."""
        job = self.job
        if job.neutral is None:
            return
        size = job.settings.per_device_eval_batch_size
        with attention(job.model, self._attention):
            self.forgetting = probe_forgetting(
                job.model, job.tokenizer, job.neutral, batch_size=size, poll=lambda: self.stop.poll(self.world)
            )

    @contextlib.contextmanager
    def _merged(self, *, wanted: bool) -> Iterator[None]:
        """Adapters merged for speed, where every rank has the whole model and rounding does not eat them."""
        if not (wanted and self.strategy.recovers and quantization_of(self.job.model) is None):
            yield
            return
        manager = LoRAManager(self.job.model)
        manager.merge_lora_weights()
        try:
            yield
        finally:
            manager.unmerge_lora_weights()

    def _watched(self, step: int) -> float | None:
        metric = self.job.settings.metric_for_best_model
        evaluation = self.evaluate(step=step, merged=False, answers=metric in _GENERATED)
        if evaluation is None:
            return None
        scores = evaluation.scores()
        self._display.note(f"update {step}: held-out loss {evaluation.loss:.4f}")
        (value, *_) = self.world.gather(scores.get(metric))
        return value

    # ----------------------------------------------------------------------------------------- other hooks

    def _record(self, event: str, entry: Mapping[str, Any]) -> None:
        self.metrics.write(event, **entry)
        self.trackers.log(event, entry)

    def _log(self, entry: dict[str, Any]) -> None:
        self._record("train", entry)
        self._display.log(entry)

    def _note(self, text: str) -> None:
        self.metrics.write("note", step=self.progress.step, text=text)
        self._display.note(text)

    def _dump(self, known: Mapping[str, Any]) -> None:
        """What is known of an update that was not finite, in a file of the run's folder."""
        tokenizer, rows = self.job.tokenizer, self.job.rows
        texts = {i: tokenizer.decode(rows[i].ids)[:_EXCERPT] for group in known["rows"] for i in group}
        norms = {name: repr(norm) for name, norm in known["norms"].items()}  # JSON has no word for NaN
        rank = f"-rank{self.world.rank}" if self.world.rank else ""
        path = self.folder.path / f"nonfinite-{known['step']}{rank}.json"
        with contextlib.suppress(StorageError):
            write_json(path, {**known, "norms": norms, "texts": texts})
            logger.warning("its rows and the norm of every gradient are in %s", path)

    def _roll_back(self) -> None:
        source = newest_source(self.folder.path, self._note)
        if source is None:
            raise DivergedError(
                "an update was not finite, and there is no checkpoint to go back to",
                remedy="lower learning_rate, or save more often (save_steps)",
            )
        self.load(source)

    def _second_stage(self, step: int) -> bool:
        after = self.job.plan.unfreeze_after
        return after is not None and step > after

    def _unfreeze(self) -> None:
        """Let the base train, too, at its own rate."""
        if self._unfrozen:
            return
        self._unfrozen = True
        settings, optimizer = self.job.settings, self.strategy.optimizer
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        freeze_backbone_params(self.job.model, False)
        new = [p for p in self.job.model.parameters() if p.requires_grad and id(p) not in known]
        factor = (settings.unfreeze_learning_rate or settings.learning_rate) / settings.learning_rate
        self.strategy.admit({"params": new, "factor": factor})
        self._note(f"second stage: the base trains, too, at {factor:g} times the learning rate")

    @staticmethod
    def _silence() -> TextIO:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


def tracked(job: Job, folder: RunFolder, source: Source | None) -> TrackedRun:
    """What a tracker is told of a run."""
    settings = job.settings
    return TrackedRun(
        folder=folder.path,
        name=settings.run_name or folder.path.name,
        config=settings_of(settings),
        done=source.step if source else 0,
        logging_dir=Path(settings.logging_dir) if settings.logging_dir else None,
    )
