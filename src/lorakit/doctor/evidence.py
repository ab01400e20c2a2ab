"""All that the rules look at, gathered once from the files of a run. Torch is loaded for the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.checkpoint.lock import holder
from lorakit.doctor.curve import Curve, curve_of
from lorakit.errors import AdapterMismatchError, LorakitError
from lorakit.modelinfo.find import local_folder
from lorakit.planning.plan import Plan, plan
from lorakit.report.record import DataInfo, ErrorPoint, EvalPoint, RunRecord, TrainPoint

if TYPE_CHECKING:
    from lorakit.checkpoint.inspect import Inspection, UpdateFacts

_LARGEST = 8  # updates that are compared with the weights they change


@dataclass(frozen=True)
class AdapterEvidence:
    """The trained adapter.

    Attributes:
        updates: of each module: norm of ΔW, its rank, its singular values.
        non_finite: tensors that hold NaN or infinity.
        weight_norms: ‖W‖ of the modules with the largest updates, where the base is a folder here.
        needed_rank: the smallest rank that keeps 99 % of Σσ² of all updates together.
        effective_rank: mean over the modules, see `lorakit.checkpoint.inspect`.
        unreadable: why it cannot be read, if so.
    """

    updates: tuple[UpdateFacts, ...] = ()
    non_finite: tuple[str, ...] = ()
    weight_norms: Mapping[str, float] = field(default_factory=dict)
    needed_rank: int = 0
    effective_rank: float = 0.0
    unreadable: str | None = None


@dataclass(frozen=True)
class Evidence:
    """What is known of a run. What a run does not tell is None or empty, and the rules about it are skipped."""

    record: RunRecord
    adapter: AdapterEvidence | None = None
    plan: Plan | None = None  # what it was to take, by `lorakit plan`
    running: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """The resolved configuration."""
        return self.record.settings

    @property
    def train(self) -> tuple[TrainPoint, ...]:
        """The log lines."""
        return self.record.train

    @property
    def evals(self) -> tuple[EvalPoint, ...]:
        """Evaluations of the adapter."""
        return tuple(point for point in self.record.evals if point.step > 0)

    @property
    def data(self) -> DataInfo | None:
        """The rows that were trained on."""
        return self.record.info.data.train

    @property
    def errors(self) -> tuple[ErrorPoint, ...]:
        """What ended the run, the last word of each start."""
        return self.record.errors

    @property
    def environment(self) -> Mapping[str, Any]:
        """The machine."""
        return self.record.info.environment

    @property
    def curve(self) -> Curve | None:
        """The loss, if there are points enough."""
        points = self.train
        return curve_of([p.step for p in points], [p.loss for p in points], [p.learning_rate for p in points])

    def number(self, key: str, default: float = 0.0) -> float:
        """A number of the configuration."""
        value = self.settings.get(key)
        return float(value) if isinstance(value, int | float) else default


def gather(run: Path, *, adapter: bool = True) -> Evidence:
    """Read a run directory, finished or not.

    Raises:
        UsageError: it is none, or its files do not parse.
    """
    record = RunRecord.read(run, unfinished=True)
    looked_at = _adapter(run, record) if adapter else None
    running = record.info.status is None and holder(run / "run.lock") is not None
    return Evidence(record, looked_at, _plan(record), running)


def _plan(record: RunRecord) -> Plan | None:
    try:
        return plan(record.path / "config.resolved.yaml")
    except LorakitError:  # the model has gone, or the planner does not know its kind
        return None


def _adapter(run: Path, record: RunRecord) -> AdapterEvidence | None:
    if not (run / "adapter").is_dir():
        return None
    from lorakit.checkpoint.inspect import inspect, probe_ranks

    try:
        found = inspect(run / "adapter")
    except AdapterMismatchError as error:
        return AdapterEvidence(unreadable=error.message)
    probe = probe_ranks(found.updates)
    return AdapterEvidence(
        updates=tuple(found.updates),
        non_finite=tuple(found.non_finite),
        weight_norms=_weight_norms(record.info.model.name, found),
        needed_rank=probe.recommended if probe else 0,
        effective_rank=probe.effective if probe else 0.0,
    )


def _weight_norms(model: str, found: Inspection) -> dict[str, float]:
    """‖W‖ of the modules with the largest updates; empty where the base is not a folder on this machine."""
    from safetensors import SafetensorError, safe_open
    from torch.linalg import vector_norm

    largest = sorted(found.updates, key=lambda update: -update.norm)[:_LARGEST]
    wanted = {f"{update.module}.weight": update.module for update in largest}
    norms = {}
    folder = local_folder(model)
    for path in folder.glob("*.safetensors") if folder else ():
        try:
            with safe_open(path, framework="pt") as file:
                for name in wanted.keys() & set(file.keys()):
                    norms[wanted[name]] = float(vector_norm(file.get_tensor(name).float()))
        except (OSError, SafetensorError):  # the base is damaged: there is nothing to compare with
            return {}
    return norms
