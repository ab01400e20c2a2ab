"""`plan`: bytes, seconds and numbers of a training, from a configuration or the name of a model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import hardware
from lorakit.errors import UsageError
from lorakit.modelinfo.facts import ModelFacts
from lorakit.modelinfo.find import find_facts
from lorakit.patterns import block_numbers, parse_names
from lorakit.planning.adapters import by_target, trainable
from lorakit.planning.advise import Advice, review
from lorakit.planning.deploy import Deployment, deployments
from lorakit.planning.fit import Fit, fit, parse_size
from lorakit.planning.memory import Memory, adapter_file, loading_bytes, memory
from lorakit.planning.setup import Setup, setup_of, strategy_of
from lorakit.planning.time import Time, find_rates, time
from lorakit.planning.waterfall import Step, waterfall

if TYPE_CHECKING:
    from lorakit.config.resolve import Resolved


@dataclass(frozen=True)
class Plan:
    """What a training will take.

    Attributes:
        facts: the model.
        setup: the settings that count.
        trainable: numbers that train; ``by_target`` of the modules of each name.
        memory: bytes on each device, by category.
        loading: bytes while the base is loaded, where that is known.
        without_checkpointing, with_checkpointing: bytes in all, either way.
        adapter_bytes: of ``adapter_model.safetensors``.
        time: of one update.
        updates: of the whole run, where the configuration says it (``max_steps``).
        waterfall: from a plain training to a sparing one.
        deployments: which programs load the adapter.
        fit: what fits into the limit that was asked for.
        notes: what the numbers rest on.
        advice: where the configuration is outside of what the guides give.
    """

    facts: ModelFacts
    setup: Setup
    trainable: int
    by_target: dict[str, int]
    memory: Memory
    loading: int
    without_checkpointing: int
    with_checkpointing: int
    adapter_bytes: int
    time: Time
    updates: int | None
    waterfall: tuple[Step, ...]
    deployments: tuple[Deployment, ...]
    fit: Fit | None
    notes: tuple[str, ...]
    advice: tuple[Advice, ...] = ()

    @property
    def percent(self) -> float:
        """Share of the numbers that trains: of the model and the adapters beside it."""
        beside = 0 if self.setup.method == "full" else self.trainable
        return 100 * self.trainable / (self.facts.parameters + beside)

    @property
    def reduction(self) -> float:
        """How many numbers the model has for each one that trains."""
        return self.facts.parameters / self.trainable

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain values, bytes and seconds."""
        blocks = self.facts.blocks
        return {
            "model": {
                "name": self.facts.name,
                "family": self.facts.family,
                "source": self.facts.source,
                "parameters": self.facts.parameters,
                "active_parameters": self.facts.active_parameters,
                "tied": self.facts.tied,
                "context": self.facts.context,
                "blocks": asdict(blocks) if blocks else None,
                "modules": [{**asdict(m), "blocks": None, "count": m.count} for m in self.facts.modules],
            },
            "setup": asdict(self.setup),
            "effective_batch": self.setup.effective_batch,
            "trainable": self.trainable,
            "by_target": self.by_target,
            "percent": self.percent,
            "reduction": self.reduction,
            "memory": {**self.memory.categories(), "total": self.memory.total},
            "loading": self.loading,
            "without_checkpointing": self.without_checkpointing,
            "with_checkpointing": self.with_checkpointing,
            "adapter_bytes": self.adapter_bytes,
            "time": {**asdict(self.time), "updates": self.updates},
            "waterfall": [
                {"name": s.name, "total": s.memory.total, **s.memory.categories()} for s in self.waterfall
            ],
            "deployments": [asdict(each) for each in self.deployments],
            "fit": asdict(self.fit) if self.fit else None,
            "notes": list(self.notes),
            "advice": [asdict(each) for each in self.advice],
        }


def plan(
    config: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    limit: str | int | None = None,
    gflops: float | None = None,
    **settings: Any,
) -> Plan:
    """Work out what a training takes; nothing is downloaded but, for an unknown hub id, its config.json.

    Args:
        config: a YAML file, or the keys themselves.
        overrides: ``key=value`` texts that win over ``config``.
        model: instead of ``config``, or of its model: a folder, a file of weights, a hub id, a name such as
            ``llama-3-8b``, or one matrix such as ``4096x4096``.
        limit: bytes, or a text such as ``16GB``, into which it is to fit.
        gflops: rate of this machine's matrix products, if it was not measured.
        settings: fields of `Setup` that win over the configuration: ``rank=16, bits=4, length=1024``; names in
            ``targets``, ``exclude`` and ``whole`` also as a comma string.

    Raises:
        ConfigError: the configuration cannot be run.
        ModelError: the model is not known, or carries no such adapter.
        UsageError: settings that there are not, or that make no sense.
    """
    if config is None and model is None:
        raise UsageError("there is nothing to plan", remedy="give a configuration, or model='llama-3-8b'")
    here: dict[str, Any] = {
        "device": hardware.device(),
        "passes": hardware.pass_compiler() is not None,
        "units": hardware.matrix_units(),
    }
    setup, resolved = Setup(**here), None
    if config is not None:
        resolved = _resolved(config, overrides)
        setup = replace(setup_of(resolved), **here)
    if model is not None:
        facts = find_facts(model)
    else:
        assert resolved is not None
        facts = find_facts(resolved.model_name_or_path, resolved.model_revision)
    if settings.get("ranks", 1) != 1:
        settings = {"strategy": strategy_of(resolved) if resolved else "ddp", **settings}
    setup = _changed(setup, settings, facts)
    if resolved and not resolved.says_passes and settings.keys().isdisjoint(("batch", "accumulation")):
        setup = setup.in_shared_passes(facts, resolved.pass_tokens)
    found = make_plan(facts, setup, limit=_bytes(limit), gflops=gflops)
    if resolved is None:
        return found
    return replace(
        found,
        updates=resolved.max_steps,
        notes=(*found.notes, *_told(resolved, found.setup)),
        advice=review(facts, found.setup, resolved.learning_rate),
    )


def make_plan(
    facts: ModelFacts,
    setup: Setup,
    *,
    limit: int | None = None,
    gflops: float | None = None,
) -> Plan:
    """The plan for a model and a setup; see `plan`."""
    totals = [memory(facts, replace(setup, checkpointing=on)).total for on in (False, True)]
    return Plan(
        facts=facts,
        setup=setup,
        trainable=trainable(facts, setup),
        by_target=by_target(facts, setup),
        memory=memory(facts, setup),
        loading=loading_bytes(facts, setup),
        without_checkpointing=totals[0],
        with_checkpointing=totals[1],
        adapter_bytes=adapter_file(facts, setup),
        time=time(facts, setup, find_rates(setup, gflops)),
        updates=None,
        waterfall=waterfall(facts, setup) if facts.blocks and facts.head else (),
        deployments=deployments(setup),
        fit=fit(facts, setup, limit) if limit else None,
        notes=tuple(_notes(facts, setup)),
    )


def _resolved(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Resolved:
    from lorakit.config.load import load, load_mapping  # a model's name alone has its answer sooner
    from lorakit.config.resolve import resolve

    if isinstance(config, Mapping):
        return resolve(load_mapping(config, Path.cwd(), overrides))
    return resolve(load(config, overrides))


def _told(settings: Resolved, setup: Setup) -> Iterator[str]:
    """What else the configuration says that the numbers depend on."""
    if (settings.deepspeed or settings.fsdp) and setup.ranks == 1:
        yield f"of one process: {strategy_of(settings)} shares the work among several (ranks=…)"
    if settings.auto_find_batch_size:
        yield "the run will look for the largest batch itself (auto_find_batch_size)"
    if settings.adapter_name_or_path is not None:
        yield "rank and targets are the configuration's; in the run those of adapter_name_or_path hold"
    if setup.unfreezes:
        yield "memory is that of the second stage, in which the base trains (unfreeze_after); time of the first"


def _notes(facts: ModelFacts, setup: Setup) -> list[str]:
    notes = []
    if facts.blocks is None and facts.family == "unknown":
        notes.append("only the tensors of this model are known: activations count the adapters' inputs alone")
    elif facts.blocks is None and facts.family != "matrix":
        notes.append("activations of convolutions are an estimate")
    if facts.blocks and facts.blocks.active:
        notes.append("experts: activations as if tokens were spread evenly; adapters cannot sit on experts")
    if setup.device == "cuda":
        notes.append("nothing of this was measured on a GPU; the framework's share differs by card and driver")
    if setup.row is None and setup.attention_of(facts) == "packed":
        notes.append(f"rows are taken to be {setup.length} tokens long: shorter ones need less (row=…)")
    if setup.labelled == 1.0 and facts.vocabulary:
        notes.append("all tokens are taken to carry loss: fewer need less (labelled=…)")
    return notes


def _changed(setup: Setup, settings: Mapping[str, Any], facts: ModelFacts) -> Setup:
    known = [field.name for field in fields(Setup)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"a plan has no setting {name!r:.60}", remedy=remedy)
    values: dict[str, Any] = {name: _READ.get(name, _as_it_is)(value) for name, value in settings.items()}
    if facts.blocks and not facts.blocks.causal and facts.context and "length" not in values:
        values["length"] = min(setup.length, facts.context)
    return replace(setup, **values)


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    names = parse_names("targets", value)
    return (names,) if isinstance(names, str) else names


def _as_it_is(value: Any) -> Any:
    return value


_READ: dict[str, Callable[[Any], Any]] = {
    "targets": _names,
    "exclude": _names,
    "whole": _names,
    "layers": block_numbers,
    "rank_pattern": lambda value: tuple(dict(value).items()),
}


def _bytes(limit: str | int | None) -> int | None:
    return parse_size(limit) if isinstance(limit, str) else limit
