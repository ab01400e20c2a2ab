"""Which modules get an adapter. Names that match nothing are an error that lists near ones."""

from __future__ import annotations

import difflib
from collections import Counter

from torch import nn

from lorakit.adapters.hosts import HOSTS, host_of
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.spec import Targets
from lorakit.errors import TargetError


def select(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The modules to adapt, by path, in the model's order.

    A name matches a module whose path is it or ends in ``.name``. ``"all"`` means every layer of a supported
    kind but the output head. A module that already carries adapters counts as its base.

    Raises:
        TargetError: a name that matches nothing, a module of an unsupported kind, or one whose weight
            another module shares.
    """
    modules = candidates(model)
    if targets == "all":
        head = output_head(model)
        chosen = {p: m for p, m in modules.items() if type(m) in HOSTS and m is not head}
        if not chosen:
            raise TargetError("the model has no layer that can carry an adapter")
    else:
        chosen = _by_name(modules, tuple(targets))
    _refuse_shared(model, chosen)
    return chosen


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path, adapter layers replaced by their bases and their insides left out."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, AdapterLayer):
            inside = (*inside, f"{path}.")
            found[path] = module.base
        elif path:
            found[path] = module
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, where the model can tell (transformers models can)."""
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if isinstance(head, AdapterLayer):
        return head.base
    return head if isinstance(head, nn.Module) else None


def _by_name(modules: dict[str, nn.Module], names: tuple[str, ...]) -> dict[str, nn.Module]:
    wanted = set()
    for name in names:
        matches = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not matches:
            raise TargetError(f"target {name!r} matches no module of the model", remedy=_near(name, modules))
        for path in matches:
            host_of(modules[path], path)
        wanted.update(matches)
    return {path: module for path, module in modules.items() if path in wanted}


def _near(name: str, modules: dict[str, nn.Module]) -> str:
    """Names that could have been meant, with how many modules each would match."""
    counts = Counter(path.rpartition(".")[2] for path, module in modules.items() if type(module) in HOSTS)
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(last, counts, n=3, cutoff=0.5) or [n for n, _ in counts.most_common(8)]
    listed = ", ".join(f"{n} ({counts[n]} modules)" for n in near)
    return f'did you mean {listed}? "all" takes every linear layer' if listed else "the model has no such layer"


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    for path, module in chosen.items():
        shared = [owner for owner in owners[id(module.weight)] if owner.rpartition(".")[0] != path]
        shared = [owner for owner in shared if owner != f"{path}.base.weight"]
        if shared:
            raise TargetError(
                f"its weight is shared with {shared[0]}, so an adapter on one would change both when merged",
                place=f"module {path}",
                remedy="leave it out of the targets",
            )
