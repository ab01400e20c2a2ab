"""A training run, told on one page: configuration in, adapter and evidence out.

load → resolve → lock the folder → find what to go on from → build → (evaluate the base) → fit → save → evaluate
→ report
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.checkpoint.resume import Source, check_facts, check_settings, find_source
from lorakit.config.load import load, load_mapping
from lorakit.config.resolve import Resolved, resolve
from lorakit.errors import Interrupted
from lorakit.evals.evaluate import Evaluation
from lorakit.log import MetricsFile, logger
from lorakit.optim.check import check_numbers
from lorakit.parallel.world import World, check_same_everywhere, join
from lorakit.report.trackers import check_trackers, open_trackers
from lorakit.training.engine import identity, share_work
from lorakit.training.folder import RunFolder
from lorakit.training.job import build
from lorakit.training.record import finished_record
from lorakit.training.run import Run, tracked
from lorakit.training.signals import Stopped, StopRequest


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    adapter: Path
    report: Path
    before: Evaluation | None
    after: Evaluation | None


def train(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: str | Path | bool = False,
    allow_changes: Sequence[str] = (),
) -> RunResult:
    """Train one adapter as a YAML file, or a mapping of the same keys, says.

    Args:
        config: path of the file, or the keys themselves (paths relative to the current directory).
        overrides: ``key=value`` texts that win over ``config``.
        resume: a checkpoint to go on from, or True for the newest good one of ``output_dir``, if there is one;
            wins over ``resume_from_checkpoint``.
        allow_changes: keys that may differ from the checkpoint's although they change what is trained.

    Raises:
        ConfigError, DataError, ModelError, ConflictError, DivergedError, StorageError, MemoryLimitError: see
            `lorakit.errors`.
        Interrupted: stopped by a signal; the state as it was then is saved.
    """
    settings = read_settings(config, overrides)
    wanted = settings.resume_from_checkpoint
    if resume:
        wanted = True if resume is True else str(Path(resume).absolute())
    with StopRequest() as stop, join(settings.ddp_timeout) as world:
        try:
            return _train(settings, wanted, allow_changes, world, stop)
        except Stopped as stopped:
            raise Interrupted(
                "stopped before the first update: there is nothing to save", signum=stopped.signum
            ) from None


def read_settings(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Resolved:
    """A YAML file, or a mapping of its keys, resolved and checked; warnings are logged."""
    if isinstance(config, Mapping):
        settings = resolve(load_mapping(config, Path.cwd(), overrides))
    else:
        settings = resolve(load(config, overrides))
    check_numbers(settings)
    check_trackers(settings.report_to)
    for warning in settings.warnings:
        logger.warning("warning: %s", warning)
    return settings


def _train(
    settings: Resolved, wanted: str | bool | None, allowed: Sequence[str], world: World, stop: StopRequest
) -> RunResult:
    started, folder = time.time(), RunFolder(Path(settings.output_dir))
    with folder.lock() if world.first else contextlib.nullcontext():
        source = find_source(folder.path, wanted)
        if source is not None:
            source = check_settings(source, settings, allowed)
        # What a run left that was killed before its first checkpoint is nobody's result.
        overwrite = settings.overwrite_output_dir or (wanted is True and not folder.has_weights())
        here = source is not None and source.path.parent == folder.path
        if source is not None and here and (result := _finished(folder, source)):
            return result
        if world.first and not here:
            folder.check(overwrite=overwrite)
        job = build(settings, world.size, stop.poll, source.batch if source else None)
        check_same_everywhere(world, identity(settings, job.facts()))
        if source is not None:
            source = check_facts(source, job.facts(), allowed)
        if world.first:
            if source is not None and here:
                folder.go_on(settings.to_yaml(), source.step, source.values["metrics_bytes"])
            else:
                folder.begin(settings.to_yaml(), overwrite=overwrite)
        world.wait()
        with (
            MetricsFile(folder.metrics if world.first else None) as metrics,
            open_trackers(settings.report_to if world.first else (), tracked(job, folder, source)) as trackers,
        ):
            strategy = share_work(settings, job.model, world)
            return _finish(Run(job, folder, metrics, trackers, strategy, stop), source, started)


def _finished(folder: RunFolder, source: Source) -> RunResult | None:
    """The result of a run that has come to its end already, at ``source``, if nothing was changed since."""
    record = finished_record(folder, source.step)
    if record is None or source.changed:
        return None
    logger.info("the run is finished already, after %d updates: nothing to do", source.step)
    before, after = (each and Evaluation.from_json(each) for each in record["scores"])
    return RunResult(folder.path, folder.result(), folder.report, before, after)


def _finish(run: Run, source: Source | None, started: float) -> RunResult:
    settings, folder = run.job.settings, run.folder
    if source is not None:
        run.go_on(source)
    elif settings.eval_on_start:
        run.before = run.evaluate(step=0)
    after = None
    try:
        run.fit()
        run.take_best()
        run.save_result()
        after = run.evaluate(step=run.progress.step) if settings.do_eval else None
        run.probe()
    except Stopped as stopped:
        run.save_result()
        run.publish(after, started, "interrupted")
        raise Interrupted(
            f"stopped by signal {stopped.signum}; update {run.progress.step} is saved in {folder.path}",
            signum=stopped.signum,
            remedy="go on with `lorakit train CONFIG --resume auto`",
        ) from None
    run.check_base()
    report = run.publish(after, started, "finished")
    return RunResult(folder.path, run.result(), report, run.before, after)
