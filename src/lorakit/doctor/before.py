"""Before a training: would this configuration run here? The run's own code is asked; nothing trains.

A step that fails does not end the examination: what does not depend on it is still looked at.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit import hardware
from lorakit.config.load import load
from lorakit.config.resolve import Resolved, resolve
from lorakit.errors import ConflictError, DataError, LorakitError, MemoryLimitError, StorageError
from lorakit.files import cache_folder, low_space
from lorakit.optim.check import check_numbers
from lorakit.planning.fit import fit
from lorakit.planning.plan import Plan, plan
from lorakit.report.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.survey import Tokens

State = Literal["good", "warning", "bad", "skipped"]

_ROWS = 2000  # that are encoded; `lorakit preview` looks at all
_FULL = 0.9  # of the memory
_ADAM = 4  # a checkpoint has the adapter twice, and AdamW's two moments


@dataclass(frozen=True)
class Check:
    """One step: its name, how it went, what was seen, and lines that would help."""

    name: str
    state: State
    detail: str
    remedies: tuple[str, ...] = ()
    exit_code: int = 0  # of a bad one


@dataclass(frozen=True)
class Examination:
    """All steps, in order."""

    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """That of the first bad step, else 0."""
        return next((check.exit_code for check in self.checks if check.state == "bad"), 0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"checks": [dataclasses.asdict(check) for check in self.checks], "exit_code": self.exit_code}


@dataclass
class _Seen:
    """What a step found out for those after it."""

    tokenizer: PreTrainedTokenizerBase | None = None
    tokens: Tokens | None = None


def examine(config: Path, overrides: Sequence[str] = ()) -> Examination:
    """Go through what a training of ``config`` needs.

    Raises:
        ConfigError: the file itself is wrong, as `lorakit validate` would say.
    """
    settings = resolve(load(config, overrides))
    seen = _Seen()
    steps: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("configuration", lambda: _configuration(settings)),
        ("machine", lambda: _machine(settings)),
        ("output_dir", lambda: _folder(settings)),
        ("model", lambda: _model(settings, seen)),
        ("data", lambda: _data(settings, seen)),
        ("memory", lambda: _memory_and_disk(settings, config, overrides, seen.tokens)),
    ]
    checks: list[Check] = []
    for name, step in steps:
        try:
            checks.extend(step())
        except LorakitError as error:
            remedies = (error.remedy,) if error.remedy else ()
            checks.append(Check(name, "bad", error.message, remedies, error.exit_code))
    return Examination(tuple(checks))


def _configuration(settings: Resolved) -> Iterator[Check]:
    check_numbers(settings)
    check_trackers(settings.report_to)
    for warning in settings.warnings:
        yield Check("configuration", "warning", warning)
    yield Check("configuration", "good", f"{len(settings.origins)} keys, {settings.precision}")


def _machine(settings: Resolved) -> Iterator[Check]:
    from lorakit.doctor.machine import old_packages

    old = old_packages()
    if old:
        yield Check("machine", "bad", f"too old: {', '.join(old)}", (f"pip install {' '.join(old)}",), 2)
    if settings.deepspeed and importlib.util.find_spec("deepspeed") is None:
        yield Check("machine", "bad", "deepspeed is not installed", ("pip install deepspeed",), 2)
    if settings.torch_compile and hardware.device() == "cpu" and hardware.compiler() is None:
        yield Check("machine", "bad", "torch_compile needs a C++ compiler", ("torch_compile=false",), 2)
    yield Check("machine", "good", f"{hardware.device()}, {hardware.processor_name()}, {settings.precision}")


def _folder(settings: Resolved) -> Iterator[Check]:
    from lorakit.training.folder import RunFolder

    path = Path(settings.output_dir)
    goes_on = bool(settings.resume_from_checkpoint) or settings.overwrite_output_dir
    if not path.exists():
        yield Check("output_dir", "good", f"{path} is new")
        return
    try:
        RunFolder(path).check(overwrite=goes_on)
    except ConflictError as error:
        name = path.with_name(f"{path.name}-2")
        remedies = (f"output_dir={name}", "overwrite_output_dir=true")
        yield Check("output_dir", "bad", error.message, remedies, error.exit_code)
        return
    yield Check("output_dir", "good", f"{path} can be used")


def _memory_and_disk(
    settings: Resolved, config: Path, overrides: Sequence[str], tokens: Tokens | None
) -> Iterator[Check]:
    """By the planner, for rows as long as those of the data are."""
    known: dict[str, Any] = {}
    if tokens and not settings.packing and settings.max_tokens_per_batch is None:
        known = {"length": tokens.longest, "labelled": tokens.trained / tokens.total}
    try:
        planned = plan(config, overrides, **known)
    except LorakitError as error:
        yield Check("memory", "skipped", f"there is no plan for this model: {error.message}")
        return
    yield _memory(planned, surely=tokens is not None)
    yield _disk(settings, _ADAM * planned.adapter_bytes)


def _memory(planned: Plan, *, surely: bool) -> Check:
    limit, needed = hardware.memory_limit(), max(planned.memory.total, planned.loading)
    rows = f"rows of {planned.setup.length} tokens"
    said = f"{needed / 1e9:.2f} GB planned for {rows}, {limit / 1e9:.2f} GB there are"
    if needed <= _FULL * limit:
        return Check("memory", "good", said)
    ladder = fit(planned.facts, planned.setup, int(_FULL * limit)).ladder
    remedies = tuple(lever.line.replace(", ", " ").replace(": ", "=") for lever in ladder)
    state: State = "bad" if surely and needed > limit else "warning"
    return Check("memory", state, said, remedies, MemoryLimitError.exit_code)


def _disk(settings: Resolved, checkpoint: int) -> Check:
    place = Path(settings.output_dir)
    while not place.exists():
        place = place.parent
    warning = low_space(place, ((settings.save_total_limit or 2) + 1) * checkpoint)
    if warning:
        remedies = ("save_total_limit=1",) if settings.save_total_limit != 1 else ()
        return Check("disk", "bad", warning, remedies, StorageError.exit_code)
    free = shutil.disk_usage(place).free
    return Check("disk", "good", f"{free / 1e9:.1f} GB free, {checkpoint / 1e6:.1f} MB a checkpoint")


def _model(settings: Resolved, seen: _Seen) -> Iterator[Check]:
    from lorakit.data.configured import template_of
    from lorakit.data.probe import check_template
    from lorakit.models.load import load_tokenizer
    from lorakit.models.sources import local_folder, locate

    source = locate(settings.model_name_or_path, settings.model_revision)
    remote = settings.trust_remote_code
    local_folder(source, weights=False, trust_remote_code=remote)  # asks the hub, if it must
    tokenizer = load_tokenizer(source, trust_remote_code=remote)
    yield Check("model", "good", f"{source.name} ({source.kind}), {len(tokenizer):,} tokens")
    template = template_of(settings, tokenizer)
    end = check_template(tokenizer, template)
    seen.tokenizer = tokenizer
    yield Check("template", "good", f"{template.name}, answers end with {tokenizer.decode([end])!r}")


def _data(settings: Resolved, seen: _Seen) -> Iterator[Check]:
    """The first rows, read and encoded as training would."""
    from lorakit.data.configured import data_sets, held_out_samples, policy_of, template_of, training_stream
    from lorakit.data.encode import encode_batch
    from lorakit.data.survey import survey

    stream = training_stream(settings, data_sets(settings, settings.dataset))
    samples = list(islice(stream, _ROWS))
    held_out = held_out_samples(settings.model_copy(update={"max_samples": _ROWS}))
    rows = f"{'the first ' if len(samples) == _ROWS else ''}{len(samples):,} rows"
    rows += f", {len(held_out):,} held out" if held_out else ""
    if seen.tokenizer is None:
        yield Check("data", "good", f"{rows}; not encoded, for want of a tokenizer and a template")
        return
    template, policy = template_of(settings, seen.tokenizer), policy_of(settings)
    encoded = list(zip(samples, encode_batch(seen.tokenizer, samples, policy, template), strict=True))
    encode_batch(seen.tokenizer, held_out, policy, template)
    found = survey(encoded, held_out, bad=stream.counts.bad, cutoff_len=settings.cutoff_len)
    for warning in found.warnings():
        yield Check("data", "warning", warning, ("lorakit preview shows the rows",))
    if not found.waterfall.kept:
        error = DataError(f"no row is left to train on: {found.waterfall}")
        yield Check("data", "bad", error.message, (), error.exit_code)
        return
    tokens = seen.tokens = found.tokens
    said = f"{tokens.total:,} tokens ({tokens.trained:,} with loss), longest row {tokens.longest:,}"
    yield Check(
        "data", "good", f"{rows}, {said}; encoded, they go to {settings.tokenized_path or cache_folder()}"
    )
