"""Which modules carry an adapter and how many numbers it has: the same rules as `lorakit.adapters.targets`.

LoRA on a weight [out, in] at rank r has r·(out + in) numbers (arXiv 2106.09685, §4.2); DoRA adds one for each
output (arXiv 2402.09353), AdaLoRA one for each rank (arXiv 2303.10512).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.errors import TargetError
from lorakit.modelinfo.facts import ModelFacts, Module
from lorakit.patterns import first_match, is_expression, matching
from lorakit.planning.setup import Pattern, Setup

_FLOAT32 = 4
_CARRIERS = ("linear", "embedding", "conv")
_ENTRY, _PREFIX = (
    90,
    len("base_model.model."),
)  # bytes of a tensor's entry in a safetensors header, and of its name


@dataclass(frozen=True)
class Adapted:
    """Adapters of one rank on one kind of module, and in how many blocks."""

    module: Module
    rank: int
    count: int


def lora_parameters(out: int, features: int, rank: int) -> int:
    """Numbers in A [rank, in] and B [out, rank]."""
    return rank * (out + features)


def adapted(facts: ModelFacts, setup: Setup) -> list[Adapted]:
    """The modules that carry an adapter; none if the whole model trains.

    Raises:
        TargetError: a name that matches nothing, or a module that cannot carry one.
    """
    if setup.method == "full":
        return []
    found = _chosen(facts, setup.targets, setup.exclude, setup.layers, setup.whole, setup.rank_pattern)
    return [Adapted(module, rank or setup.rank, count) for module, rank, count in found]


@functools.lru_cache(maxsize=64)  # a search for what fits asks for the same a hundred times
def _chosen(
    facts: ModelFacts,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    layers: tuple[int, ...] | None,
    whole: tuple[str, ...],
    pattern: Pattern,
) -> tuple[tuple[Module, int | None, int], ...]:
    """Module, its own rank if a pattern says one, and how often."""
    modules = {path: module for module in facts.modules for path in module.paths()}
    if targets == ("all",):
        chosen = {path for path, m in modules.items() if m.kind == "linear" and path != facts.head}
    else:
        chosen = _matches(modules, targets, "target")
        if any(map(is_expression, targets)):  # which runs over modules alone: experts are parameters of one
            chosen = {path for path in chosen if modules[path].kind != "experts"}
    for names, key in ((exclude, "exclude_modules"), (whole, "modules_to_save")):
        chosen -= _matches(modules, names, key)
    kept = [path for path in modules if path in chosen and _in_layers(path, layers)]
    if not kept:
        raise TargetError("no module is left to adapt", remedy=_near("", modules))
    for path in kept:
        if modules[path].kind not in _CARRIERS:
            raise TargetError(f"{path} cannot carry an adapter", remedy=_near("", modules))
    groups = Counter((modules[path], first_match(pattern, path) if pattern else None) for path in kept)
    return tuple((module, rank, count) for (module, rank), count in groups.items())


def trained_whole(facts: ModelFacts, setup: Setup) -> dict[str, Module]:
    """The modules that are trained whole beside the adapters."""
    if not setup.whole:
        return {}
    modules = {path: module for module in facts.modules for path in module.paths()}
    wanted = _matches(modules, setup.whole, "modules_to_save")
    return {path: module for path, module in modules.items() if path in wanted}


def numbers(chosen: Iterable[Adapted], setup: Setup) -> tuple[int, int]:
    """Numbers in the adapters, and how many of them train."""
    total = trained = 0
    for each in chosen:
        out, features = each.module.matrix
        more = {"dora": out, "adalora": each.rank}.get(setup.method, 0)
        both = lora_parameters(out, features, each.rank)
        total += each.count * (both + more)
        trained += each.count * ((each.rank * out if setup.frozen_a else both) + more)
    return total, trained


def copied(facts: ModelFacts, setup: Setup) -> int:
    """Numbers in the copies of modules that are trained whole."""
    return sum(module.size + module.extra for module in trained_whole(facts, setup).values())


def trainable(facts: ModelFacts, setup: Setup) -> int:
    """How many numbers train."""
    if setup.method == "full":
        return facts.parameters
    return numbers(adapted(facts, setup), setup)[1] + copied(facts, setup)


def by_target(facts: ModelFacts, setup: Setup) -> dict[str, int]:
    """How many numbers train on the modules of each name."""
    found: Counter[str] = Counter()
    for each in adapted(facts, setup):
        found[each.module.path.rpartition(".")[2]] += numbers([each], setup)[1]
    for path, module in trained_whole(facts, setup).items():
        found[path.rpartition(".")[2]] += module.size + module.extra
    return dict(found)


def file_bytes(facts: ModelFacts, setup: Setup) -> int:
    """About how large ``adapter_model.safetensors`` becomes: float32 numbers and a header of names."""
    chosen = adapted(facts, setup)
    total = numbers(chosen, setup)[0] + copied(facts, setup)
    tensors = 3 if setup.method in ("dora", "adalora") else 2
    names = sum(each.count * (len(each.module.path) + _PREFIX + _ENTRY) for each in chosen)
    return _FLOAT32 * total + tensors * names


def _matches(modules: dict[str, Module], names: tuple[str, ...], what: str) -> set[str]:
    wanted: set[str] = set()
    for name in names:
        found = matching(name, modules)
        if not found:
            raise TargetError(
                f"{what} {name!r:.80} matches no module of the model", remedy=_near(name, modules)
            )
        wanted.update(found)
    return wanted


def _in_layers(path: str, layers: tuple[int, ...] | None) -> bool:
    if layers is None:
        return True
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return number is not None and int(number[1]) in layers


def _near(name: str, modules: dict[str, Module]) -> str:
    counts = Counter(p.rpartition(".")[2] for p, m in modules.items() if m.kind in _CARRIERS)
    last = "" if is_expression(name) else name.rpartition(".")[2]
    near = difflib.get_close_matches(last, counts, n=3, cutoff=0.5) or [n for n, _ in counts.most_common(8)]
    listed = ", ".join(f"{n} ({counts[n]} modules)" for n in near)
    return f'did you mean {listed}? "all" takes every linear layer' if listed else "the model has no such layer"
