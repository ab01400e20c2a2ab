"""A run directory read back as one typed, frozen value.

Report and model card are made from this alone, so both can be remade long after the run, on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lorakit.errors import UsageError
from lorakit.log import read_metrics


@dataclass(frozen=True)
class TrainPoint:
    """One logged training step."""

    step: int
    loss: float | None = None
    epoch: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    memory_gb: float | None = None
    seconds: float | None = None
    data_seconds: float | None = None


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation; step 0 is the base model."""

    step: int
    rows: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None
    field_f1: float | None = None


_Point = TypeVar("_Point", TrainPoint, EvalPoint)


@dataclass(frozen=True)
class ModelInfo:
    """The base model; ``hub_id`` is what the model hub calls it, or the model it was made from."""

    name: str
    kind: str | None = None
    hub_id: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class TargetInfo:
    """The adapted modules that share a name and a shape."""

    name: str
    modules: int
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class AdapterInfo:
    """What was trained."""

    r: int
    lora_alpha: float
    scaling: float
    trainable: int
    total: int
    percent: float
    targets: tuple[TargetInfo, ...] = ()


@dataclass(frozen=True)
class DataInfo:
    """One data set in numbers."""

    rows: int
    files: tuple[str, ...] = ()
    tokens: int | None = None
    supervised_tokens: int | None = None
    longest: int | None = None
    truncated: int | None = None
    dropped: int | None = None
    too_long: int | None = None
    masked: int | None = None
    whole_tokens: int | None = None
    padding: float | None = None


@dataclass(frozen=True)
class ErrorPoint:
    """What ended a run before its time, after update ``step``."""

    step: int
    code: str
    message: str


@dataclass(frozen=True)
class DataSets:
    """Training data, and the held-out rows if there were any."""

    train: DataInfo | None = None
    eval: DataInfo | None = None


@dataclass(frozen=True)
class Sample:
    """One held-out prompt and what was written for it; None = not generated."""

    prompt: str
    reference: str | None = None
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class RankInfo:
    """How much of its ranks the adapter uses; see `lorakit.evals.probes`."""

    modules: int
    r: int
    effective: float
    rank_99: int
    recommended: int


@dataclass(frozen=True)
class ForgettingInfo:
    """Perplexity of base and adapter on a text that has nothing to do with the task."""

    text: str
    tokens: int
    base: float | None
    adapter: float | None


@dataclass(frozen=True)
class RunInfo:
    """``run.json``: what the run says about itself."""

    model: ModelInfo
    lorakit: str | None = None
    command: str | None = None
    started: str | None = None
    seconds: float | None = None
    status: str | None = None
    adapter: AdapterInfo | None = None
    data: DataSets = DataSets()
    environment: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    base_unchanged: bool | None = None
    ranks: RankInfo | None = None
    forgetting: ForgettingInfo | None = None


@dataclass(frozen=True)
class RunRecord:
    """Everything a run directory tells about its run.

    ``config`` is the text of the resolved configuration with its origin comments, ``settings`` its values.
    """

    path: Path
    info: RunInfo
    config: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    train: tuple[TrainPoint, ...] = ()
    evals: tuple[EvalPoint, ...] = ()
    notes: tuple[str, ...] = ()
    errors: tuple[ErrorPoint, ...] = ()

    @classmethod
    def read(cls, run_dir: Path, *, unfinished: bool = False) -> RunRecord:
        """Parse the files of a run directory; ``UsageError`` if it is none or does not parse.

        ``unfinished``: a run that has not come to its end, and has no ``run.json`` yet, will do, too.
        """
        missing = "config.resolved.yaml" if unfinished else "run.json"
        if not any((run_dir / name).is_file() for name in ("run.json", missing)):
            raise UsageError(
                f"{run_dir} is not the directory of a run: it holds no {missing}",
                remedy="name the output_dir of a training run",
            )
        try:
            config = _text(run_dir / "config.resolved.yaml")
            settings = _SETTINGS.validate_python(YAML(typ="safe", pure=True).load(config) or {})
            info = {"model": {"name": str(settings.get("model_name_or_path"))}}
            if (run_dir / "run.json").is_file():
                info = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
            metrics = run_dir / "metrics.jsonl"
            events = read_metrics(metrics) if metrics.is_file() else []
            return cls(
                path=run_dir,
                info=_RUN.validate_python(info),
                config=config,
                settings=settings,
                train=_latest(_TRAIN.validate_python([e for e in events if e.get("event") == "train"])),
                evals=_latest(_EVALS.validate_python([e for e in events if e.get("event") == "eval"])),
                notes=_NOTES.validate_python([e.get("text") for e in events if e.get("event") == "note"]),
                errors=_ERRORS.validate_python([e for e in events if e.get("event") == "error"]),
            )
        except (OSError, ValueError, YAMLError) as error:
            raise UsageError(f"cannot read the run {run_dir}: {_reason(error)}") from error

    @property
    def before(self) -> EvalPoint | None:
        """The evaluation of the base model."""
        return next((point for point in self.evals if point.step == 0), None)

    @property
    def after(self) -> EvalPoint | None:
        """The last evaluation of the adapter."""
        return next((point for point in reversed(self.evals) if point.step > 0), None)


_RUN = pydantic.TypeAdapter(RunInfo)
_SETTINGS = pydantic.TypeAdapter(dict[str, Any])
_TRAIN = pydantic.TypeAdapter(tuple[TrainPoint, ...])
_EVALS = pydantic.TypeAdapter(tuple[EvalPoint, ...])
_NOTES = pydantic.TypeAdapter(tuple[str, ...])
_ERRORS = pydantic.TypeAdapter(tuple[ErrorPoint, ...])


def _latest(points: tuple[_Point, ...]) -> tuple[_Point, ...]:
    """Points in order of steps; a resumed run repeats some, and the last word counts."""
    kept: list[_Point] = []
    for point in points:
        while kept and kept[-1].step >= point.step:
            kept.pop()
        kept.append(point)
    return tuple(kept)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _reason(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
