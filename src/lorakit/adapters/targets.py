"""Which modules get an adapter. Names that match nothing are an error that lists near ones."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.adapters.carrier import Carrier
from lorakit.adapters.hosts import Host, experts, host_for, host_of
from lorakit.adapters.spec import LoRAConfig, Targets
from lorakit.errors import TargetError
from lorakit.log import logger
from lorakit.lowrank.inits import find_initialiser
from lorakit.patterns import is_expression, matching
from lorakit.quant.interop import view_of
from lorakit.quant.store import quantized_weights, store_of


@dataclass(frozen=True)
class Selection:
    """The modules to adapt with their hosts, and those to train whole, by path in the model's order."""

    adapted: dict[str, tuple[nn.Module, Host]]
    whole: dict[str, nn.Module]


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """The modules that ``config`` asks for.

    A name matches a module whose path is it or ends in ``.name``. ``"all"`` means every linear layer but the
    output head. A module that already carries adapters counts as its base.

    Raises:
        TargetError: a name that matches nothing, or a module that cannot carry the adapter.
    """
    modules = candidates(model)
    whole = _whole(modules, config)
    chosen = _all(model, modules) if config.target_modules == "all" else _named(model, modules, config)
    excluded = _matches(modules, config.exclude_modules, "exclude_modules") if config.exclude_modules else set()
    inside = tuple(f"{path}." for path in whole)
    kept = [p for p in chosen if p not in excluded and p not in whole and not (inside and p.startswith(inside))]
    kept = _in_layers(kept, config.layers_to_transform)
    if not kept:
        raise TargetError("no module is left to adapt", remedy="loosen exclude_modules or layers_to_transform")
    for key, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for name, _ in pattern:
            if not matching(rf"(.*\.)?({name})" if is_expression(name) else name, kept):
                raise TargetError(
                    f"{key}[{name}] matches none of the adapted modules", remedy=_near(name, modules)
                )
    return Selection({path: (modules[path], _host(modules[path], path, config)) for path in kept}, whole)


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path, carriers replaced by their bases and their insides left out."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, Carrier):
            inside = (*inside, f"{path}.")
            found[path] = module.base
        elif path:
            found[path] = module
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, where the model can tell (transformers models can)."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if isinstance(head, Carrier):
        return head.base
    return head if isinstance(head, nn.Module) else None


def _all(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    head = output_head(model)
    chosen = [p for p, m in modules.items() if m is not head and (host := host_for(m)) and host.linear]
    left_out = [p for p, m in modules.items() if isinstance(m, nn.MultiheadAttention) or experts(m)]
    if left_out:
        logger.warning(
            "'all' leaves out %s modules that cannot carry an adapter, such as %s (%s)",
            len(left_out), left_out[0], type(modules[left_out[0]]).__name__,
        )  # fmt: skip
    if not chosen:
        raise TargetError("the model has no linear layer", remedy=_near("", modules))
    return chosen


def _named(model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig) -> list[str]:
    wanted = _matches(modules, config.target_modules, "target")
    if isinstance(config.target_modules, str):  # an expression may run over modules that hold others
        wanted = {path for path in wanted if host_for(modules[path]) or not any(modules[path].children())}
    return [path for path in modules if path in wanted]


def _host(module: nn.Module, path: str, config: LoRAConfig) -> Host:
    host = host_of(module, path, config.rank_at(path))
    start = find_initialiser(config.init_lora_weights)
    if view := view_of(module):
        view.parts()  # refuses what cannot be read
    whole = start.whole or config.method == "adalora"
    if whole and getattr(module, "groups", 1) > 1:
        what = "AdaLoRA" if config.method == "adalora" else f"the start {config.init_lora_weights}"
        raise TargetError(
            f"{what} needs a whole matrix, this {type(module).__name__} has {module.groups} groups",
            place=f"module {path}",
            remedy="use plain LoRA with init_lora_weights kaiming, or leave it out of the targets",
        )
    shape = tuple(host.matrix(torch.empty(store_of(module).shape, device="meta")).shape)
    if start.leading and config.rank_at(path) > min(shape):
        raise TargetError(
            f"rank {config.rank_at(path)} is more than a matrix of {shape} has",
            place=f"module {path}",
            remedy="lower r (rank_pattern does for one module)",
        )
    return host


def _whole(modules: dict[str, nn.Module], config: LoRAConfig) -> dict[str, nn.Module]:
    if not config.modules_to_save:
        return {}
    wanted = _matches(modules, config.modules_to_save, "modules_to_save")
    for path in wanted:
        if not any(True for _ in modules[path].parameters()):
            raise TargetError("a module without parameters cannot be trained whole", place=f"module {path}")
        if quantized_weights(modules[path]):
            raise TargetError(
                "a quantised module cannot be trained whole: its numbers have no gradient",
                place=f"module {path}",
                remedy="keep it dense (llm_int8_skip_modules), or put an adapter on it",
            )
        if any(path.startswith(f"{other}.") for other in wanted):
            raise TargetError("it lies inside another of modules_to_save", place=f"module {path}")
    return {path: module for path, module in modules.items() if path in wanted}


def _matches(modules: dict[str, nn.Module], targets: Targets, what: str) -> set[str]:
    wanted: set[str] = set()
    ends: dict[str, list[str]] = {}
    for path in modules:
        parts = path.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), []).append(path)
    for name in (targets,) if isinstance(targets, str) else targets:
        matches = matching(name, modules) if is_expression(name) or name[:1] == "^" else ends.get(name)
        if not matches:
            raise TargetError(
                f"{what} {name!r:.80} matches no module of the model", remedy=_near(name, modules)
            )
        wanted.update(matches)
    return wanted


def _in_layers(paths: list[str], layers: tuple[int, ...] | None) -> list[str]:
    """Those that lie in the numbered blocks: the first number in a path is its block's."""
    if layers is None:
        return paths
    number = {path: int(found[1]) for path in paths if (found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", path))}
    missing = sorted(set(layers) - set(number.values()))
    if missing:
        there = f"{min(number.values())}-{max(number.values())}" if number else "none"
        raise TargetError(
            f"layers_to_transform names layer {missing[0]}, which has no target",
            remedy=f"layers there: {there}",
        )
    return [path for path in paths if number.get(path) in layers]


def _near(name: str, modules: dict[str, nn.Module]) -> str:
    """Names that could have been meant, with how many modules each would match."""
    for path, module in modules.items():
        if any(name == p for p, _ in module.named_parameters(recurse=False)) and experts(module):
            return f"it is a parameter of module {path}: {experts(module)}"
    counts = Counter(path.rpartition(".")[2] for path, module in modules.items() if host_for(module))
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(last, counts, n=3, cutoff=0.5) or [n for n, _ in counts.most_common(8)]
    listed = ", ".join(f"{n} ({counts[n]} modules)" for n in near)
    return f'did you mean {listed}? "all" takes every linear layer' if listed else "the model has no such layer"
