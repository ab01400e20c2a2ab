"""Trackers: a run's metrics sent to TensorBoard, Weights & Biases or MLflow, if ``report_to`` names them.

Each tracker works on a thread of its own and whatever happens there, training goes on: a tracker that fails is
opened anew a minute later, one that hangs is left behind at the end. What it misses is in ``metrics.jsonl``.

Names are ``train/loss``, ``train/learning_rate``, ``eval/loss`` …, the step is the number of updates. A resumed
run goes on in its old place: what lies beyond its checkpoint is hidden (TensorBoard) or not sent twice.
Weights & Biases and MLflow are told where to send by environment variables of their own: WANDB_PROJECT and
WANDB_MODE, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME, among others.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lorakit.errors import UsageError
from lorakit.files import write_json
from lorakit.log import logger

_WAITING = 1000  # entries that may wait for a slow tracker; beyond that, the newest are lost
_PAUSE = 60.0  # seconds between two warnings, and until a tracker that failed is tried again
_PATIENCE = 30.0  # seconds that a tracker gets to finish after the run
_IDS = "trackers.json"
_REMEMBERING = threading.Lock()
_NOT_METRICS = {"step", "steps"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed; imports none of them.

    Raises:
        UsageError: with what to install.
    """
    unknown = [name for name in names if name not in _OPENERS]
    if unknown:
        raise UsageError(f"there is no tracker {unknown[0]!r}", remedy=f"known are {', '.join(_OPENERS)}")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"report_to: {', '.join(missing)} is not installed",
            remedy=f"pip install {' '.join(missing)}, or take it out of report_to",
        )


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run.

    Attributes:
        folder: of the run; what a tracker writes and remembers goes there.
        name: as it is shown.
        config: the settings, as JSON values.
        done: updates done before this start of the run.
        logging_dir: folder of TensorBoard's files, one folder in it for each run; in ``folder`` if not given.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    done: int = 0
    logging_dir: Path | None = None

    def recall(self, tracker: str) -> str | None:
        """The id that this run has with a tracker, if it was there before."""
        return self._ids().get(tracker)

    def remember(self, tracker: str, run: str) -> None:
        """Keep that id for when the run is resumed."""
        with _REMEMBERING:
            write_json(self.folder / _IDS, self._ids() | {tracker: run})

    def _ids(self) -> dict[str, str]:
        path = self.folder / _IDS
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found


class Trackers:
    """The open trackers of a run."""

    def __init__(self, feeds: Sequence[_Feed]) -> None:
        self._feeds = feeds

    def log(self, event: str, entry: Mapping[str, Any]) -> None:
        """Send the numbers of a line of the metrics file, one of them its ``step``; never waits or fails."""
        values = {
            f"{event}/{key}": float(value)
            for key, value in entry.items()
            if key not in _NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for feed in self._feeds if values else ():
            feed.put(int(entry["step"]), values)


@contextmanager
def open_trackers(names: Sequence[str], run: TrackedRun) -> Iterator[Trackers]:
    """Within the block, what is logged goes to the trackers ``names``; no names on all ranks but the first.

    Raises:
        UsageError: as `check_trackers`.
    """
    check_trackers(names)
    if not run.done:  # what was tracked under these ids is another run's
        (run.folder / _IDS).unlink(missing_ok=True)
    feeds = [_Feed(name, run) for name in names]
    status = "failed"
    try:
        yield Trackers(feeds)
        status = "finished"
    finally:
        deadline = time.monotonic() + _PATIENCE
        for feed in feeds:
            feed.finish(status)
        for feed in feeds:
            feed.wait(deadline)


class _Sink(Protocol):
    """An open tracker."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, status: str) -> None: ...


class _Feed:
    """The line to one tracker: entries wait here until its thread has sent them."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name, self._run = name, run
        self._entries: queue.Queue[tuple[int, Mapping[str, float]] | str] = queue.Queue()
        self._sink: _Sink | None = None
        self._broken = self._warned = -math.inf  # when that last happened, by the monotonic clock
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        if self._entries.qsize() < _WAITING:
            self._entries.put((step, values))
        else:
            self._complain("it is too slow")

    def finish(self, status: str) -> None:
        self._entries.put(status)

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("warning: %s has not finished; what it lacks is in metrics.jsonl", self._name)

    def _work(self) -> None:
        """Send until there is a status instead of an entry."""
        while not isinstance(entry := self._entries.get(), str):
            if self._sink is None and time.monotonic() - self._broken >= _PAUSE:
                self._attempt(self._open)
            if self._sink is not None:
                self._attempt(functools.partial(self._send, self._sink, *entry))
        if self._sink is not None:
            self._attempt(functools.partial(self._sink.close, entry))

    def _open(self) -> None:
        self._sink = _OPENERS[self._name](self._run)

    def _send(self, sink: _Sink, step: int, values: Mapping[str, float]) -> None:
        sink.write(step, values)
        self._run = replace(self._run, done=step)  # where it goes on if it has to be opened anew

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracker's library raises, training goes on
            self._sink, self._broken = None, time.monotonic()
            self._complain(" ".join(f"{type(error).__name__}: {error}".split()))

    def _complain(self, cause: str) -> None:
        """Warn, once a minute."""
        if time.monotonic() - self._warned >= _PAUSE:
            self._warned = time.monotonic()
            logger.warning("warning: %s fails, metrics.jsonl has what it misses: %s", self._name, cause)


class _TensorBoard:
    """Event files, which hide what earlier ones in their folder hold beyond the checkpoint, or all of it."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard" if run.logging_dir is None else run.logging_dir / run.name
        self._writer = SummaryWriter(str(folder), purge_step=run.done + 1 if run.done else 0)
        lines = "\n".join(f"    {key}: {value}" for key, value in run.config.items())
        self._writer.add_text("config", lines, run.done)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases, which takes no step twice."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        known = run.recall("wandb")
        # Silent, or it would ask for a key on the terminal in the middle of training.
        wandb.setup(settings=wandb.Settings(silent=True))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lorakit"),
            name=run.name,
            dir=str(run.folder),
            config=dict(run.config),
            id=known,
            resume="allow" if known else None,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=_PATIENCE, finish_timeout=_PATIENCE
            ),
        )
        run.remember("wandb", self._run.id)
        logger.info("wandb: %s", self._run.url or f"wandb sync {Path(self._run.dir).parent}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.starting_step:
            self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class _Mlflow:
    """A run of MLflow."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        known = run.recall("mlflow")
        if known:
            self._client.update_run(known, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lorakit")
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            known = self._client.create_run(number, run_name=run.name).info.run_id
            run.remember("mlflow", known)
            params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in run.config.items()]
            for start in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(known, params=params[start : start + _MOST_PARAMS])
        self._id = known
        logger.info("mlflow: run %s", known)
        self._there = {name: self._last(name) for name in self._client.get_run(known).data.metrics}

    def _last(self, metric: str) -> int:
        return max(point.step for point in self._client.get_metric_history(self._id, metric))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            Metric(name, value, now, step) for name, value in values.items() if step > self._there.get(name, -1)
        ]
        self._client.log_batch(self._id, metrics=new)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, status.upper())


_MOST_PARAMS = 100  # in one call
_LONGEST_PARAM = 500  # characters, of the smallest servers
_OPENERS: dict[str, Callable[[TrackedRun], _Sink]] = {  # each is called as the package that it needs
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
