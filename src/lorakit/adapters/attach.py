"""Put adapters on a model and take them off: the functions most users start with."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.adapters.carrier import Carrier
from lorakit.adapters.copies import ModuleCopies
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.routing import Route
from lorakit.adapters.spec import LoRAConfig, MethodName, check_adapter_name
from lorakit.adapters.targets import select
from lorakit.errors import ConflictError, UsageError
from lorakit.lowrank.budget import RankAllocator, Triplet
from lorakit.lowrank.inits import Origin
from lorakit.quant.store import quantized_weights, refuse_lossy


def add_lora_to_model(  # noqa: PLR0913 - the public signature of the library, all keywords
    model: nn.Module,
    r: int = 8,
    lora_alpha: float | None = None,
    *,
    lora_dropout: float = 0.0,
    target_modules: str | Iterable[str] = "all",
    use_rslora: bool = False,
    use_dora: bool = False,
    method: MethodName = "lora",
    init_lora_weights: str = "kaiming",
    lora_fa: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: str | Iterable[str] = (),
    exclude_modules: str | Iterable[str] = (),
    layers_to_transform: str | int | Iterable[int] | None = None,
    adapter_name: str = "default",
    seed: int | None = None,
    dense_weight: Callable[[str], Tensor] | None = None,
) -> nn.Module:
    """Freeze ``model`` and put an adapter on its target layers, in place; returns the model.

    The output does not change until the first training step, unless the start is ``loftq``. With ``seed`` the
    adapter's start does not depend on, or touch, torch's global random state. `LoRAConfig` says what each
    setting means. ``loftq`` needs ``dense_weight``: from a module's path its weight before quantisation.

    Raises:
        TargetError: targets that match nothing or cannot carry an adapter; the model is untouched.
    """
    config = LoRAConfig(
        r, lora_alpha, lora_dropout, target_modules, use_rslora, init_lora_weights, method=method,
        use_dora=use_dora, lora_fa=lora_fa, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern,
        modules_to_save=modules_to_save, exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
    )  # fmt: skip
    attach(model, config, adapter_name, seed=seed, dense_weight=dense_weight)
    return model


def attach(
    model: nn.Module,
    config: LoRAConfig,
    name: str = "default",
    *,
    seed: int | None = None,
    dense_weight: Callable[[str], Tensor] | None = None,
) -> None:
    """Add the adapter ``name`` described by ``config`` and make it the active one.

    Raises:
        TargetError, ConflictError, UsageError: it cannot be added (the second: the name is taken, or the
            adapters are merged; the third: loftq lacks ``dense_weight``); the model is untouched.
    """
    check_adapter_name(name)
    selection = select(model, config)
    present = carriers(model)
    refuse_merged(present)
    if any(name in carrier.adapters for carrier in present.values()):
        raise ConflictError(f"an adapter called {name!r} is already there", remedy="choose another name")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    made: list[tuple[nn.Module, Carrier, nn.Module]] = []
    for path, (module, host) in selection.adapted.items():
        layer = present.get(path) or AdapterLayer(module, host).train(module.training)
        if not isinstance(layer, AdapterLayer):
            raise ConflictError("another adapter trains it whole", remedy="detach it first", place=path)
        dense = dense_weight and functools.partial(dense_weight, path)
        made.append((module, layer, layer.make_adapter(path, config, Origin(generator, dense))))
    for path, module in selection.whole.items():
        copies = present.get(path) or ModuleCopies(module).train(module.training)
        if not isinstance(copies, ModuleCopies):
            raise ConflictError("another adapter sits on this module", remedy="detach it first", place=path)
        made.append((module, copies, copies.make_copy()))
    freeze_backbone_params(model)  # nothing can fail from here on
    for module, carrier, adapter in made:
        carrier.adapters[name] = adapter
        if carrier not in present.values():
            _replace(model, module, carrier)
    activate(model, name)


def merge(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put the updates of the adapters ``names`` (the active ones if not given) into the base weights."""
    chosen = None if names is None else tuple(names)
    for name in chosen or ():
        carriers(model, name)
    found = carriers(model)
    if any(carrier.route.rows is not None for carrier in found.values()) and chosen is None:
        raise ConflictError("the rows use different adapters", remedy="name the adapters to merge")
    if chosen is not None and len(chosen) > 1:
        _refuse_sum(model, chosen)
    refuse_merged(found)
    for path, layer in adapter_layers(model).items():
        if layer.present(layer.route.names if chosen is None else chosen):
            refuse_lossy(layer.store, f"module {path}")
    for carrier in found.values():
        carrier.merge(None if chosen is None else carrier.present(chosen))


def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit."""
    for carrier in carriers(model).values():
        carrier.unmerge()


def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter: each original module object is back in its place, unmerged."""
    unmerge(model)
    for carrier in carriers(model).values():
        _replace(model, carrier, carrier.base)
    return model


def activate(model: nn.Module, *names: str) -> None:
    """Route every row through the adapters ``names``; without names, through the base alone."""
    found = carriers(model)
    refuse_merged(found)
    _set_route(model, Route(names))


@contextlib.contextmanager
def route(model: nn.Module, rows: Sequence[str | Iterable[str] | None]) -> Iterator[None]:
    """Within the block row i of a batch uses ``rows[i]``: an adapter's name, several, or None for the base."""
    before = next((carrier.route for carrier in carriers(model).values()), Route())
    _set_route(model, Route.by_row(rows))
    try:
        yield
    finally:
        for carrier in carriers(model).values():
            carrier.route = before


def carriers(model: nn.Module, name: str | None = None) -> dict[str, Carrier]:
    """What carries adapters (or the adapter ``name``) by path, in the model's order.

    Raises:
        UsageError: no module carries ``name``; the known names are listed.
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, Carrier)}
    if name is None:
        return found
    chosen = {path: carrier for path, carrier in found.items() if name in carrier.adapters}
    if not chosen:
        known = ", ".join(adapter_names(model))
        raise UsageError(f"there is no adapter called {name!r}", remedy=f"attached adapters: {known or 'none'}")
    return chosen


def adapter_layers(model: nn.Module, name: str | None = None) -> dict[str, AdapterLayer]:
    """The model's adapter layers (those with the adapter ``name``) by path, in order."""
    return {path: c for path, c in carriers(model, name).items() if isinstance(c, AdapterLayer)}


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all attached adapters, in the order they came."""
    return tuple(dict.fromkeys(name for carrier in carriers(model).values() for name in carrier.adapters))


def rank_allocator(model: nn.Module, name: str = "default") -> RankAllocator:
    """What takes ranks away from the AdaLoRA adapter ``name``: call its `update` after each step."""
    adapters = {path: layer.adapter(name) for path, layer in adapter_layers(model, name).items()}
    schedule = next(iter(adapters.values())).config.schedule
    if schedule is None:
        raise UsageError(
            f"the adapter {name!r} has no rank schedule", remedy="LoRAConfig(schedule=RankSchedule(…))"
        )
    triplets = {path: Triplet(a.lora_A, a.get_parameter("lora_E"), a.lora_B) for path, a in adapters.items()}
    return RankAllocator(schedule, triplets)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Unmerge and take the adapter ``name`` off; carriers without adapters become their base modules again."""
    for carrier in carriers(model).values():
        carrier.unmerge()
        carrier.remove_adapter(name)
        if not carrier.adapters:
            _replace(model, carrier, carrier.base)


def freeze_backbone_params(model: nn.Module, freeze: bool = True) -> None:
    """Freeze every parameter that is not an adapter's; ``freeze=False`` makes everything trainable.

    Adapters always train, but for the frozen A of LoRA-FA. A module of which an adapter trains a copy, and
    numbers that have no gradient (quantised weights), stay frozen.
    """
    found = carriers(model).values()
    packed = quantized_weights(model)
    ours = {id(p) for carrier in found for p in carrier.adapters.parameters()}
    idle = {id(p) for carrier in found if isinstance(carrier, ModuleCopies) for p in carrier.base.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            usable = parameter.is_floating_point() and id(parameter) not in idle and id(parameter) not in packed
            parameter.requires_grad_(not freeze and usable)
    for carrier in found:
        for parameter in carrier.trainable():
            parameter.requires_grad_(True)


def count_parameters(model: nn.Module) -> dict[str, int | float]:
    """``{"trainable": …, "total": …, "percent": …}``; shared parameters count once, quantised ones as dense."""
    parameters = [p for name, p in model.named_parameters() if "._unmerged" not in name]
    packed = quantized_weights(model)
    total = sum(packed.get(id(p), p.numel()) for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return {"trainable": trainable, "total": total, "percent": 100 * trainable / max(total, 1)}


def _set_route(model: nn.Module, chosen: Route) -> None:
    """Hand the route to every carrier, if each of its adapters is there and they can be used together."""
    for name in chosen.used:
        carriers(model, name)
    together = [chosen.names] if chosen.rows is None else chosen.groups()
    for names in together:
        if len(names) > 1:
            _refuse_sum(model, names)
    for carrier in carriers(model).values():
        carrier.route = chosen


def _refuse_sum(model: nn.Module, names: tuple[str, ...]) -> None:
    for path, layer in adapter_layers(model).items():
        here = [layer.adapter(name) for name in layer.present(names)]
        if len(here) > 1 and not all(adapter.method.additive for adapter in here):
            raise ConflictError(
                "DoRA rescales the whole weight, so it cannot be summed with another adapter",
                place=f"module {path}",
                remedy="activate one adapter, or merge one before adding the other",
            )


def refuse_merged(found: Mapping[str, Carrier]) -> None:
    """A merged layer computes with its merged weight alone: what changes its adapters would do nothing."""
    if any(carrier.merged for carrier in found.values()):
        raise ConflictError("the adapters are merged", remedy="call unmerge_lora_weights() first")


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` everywhere ``old`` is registered: a module may have several parents."""
    for parent in [m for m in model.modules() if not isinstance(m, Carrier)]:
        for key, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, key, new)
