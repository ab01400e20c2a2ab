"""Put adapters on a model and take them off: the functions most users start with."""

from __future__ import annotations

import torch
from torch import nn

from lorakit.adapters.hosts import host_of
from lorakit.adapters.inits import initialise
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.routing import Route
from lorakit.adapters.spec import Initialiser, LoRAConfig, check_adapter_name
from lorakit.adapters.targets import select
from lorakit.errors import ConflictError, UsageError


def add_lora_to_model(  # noqa: PLR0913 - the public signature of the library, all keywords
    model: nn.Module,
    r: int = 8,
    lora_alpha: float | None = None,
    *,
    lora_dropout: float = 0.0,
    target_modules: str | list[str] | tuple[str, ...] = "all",
    use_rslora: bool = False,
    init_lora_weights: Initialiser = "kaiming",
    adapter_name: str = "default",
    seed: int | None = None,
) -> nn.Module:
    """Freeze ``model`` and put a LoRA adapter on its target layers, in place; returns the model.

    The output does not change until the first training step: B starts at zero. With ``seed`` the start of A
    does not depend on, or touch, torch's global random state.

    Raises:
        TargetError: targets that match nothing or cannot carry an adapter; the model is untouched.
    """
    config = LoRAConfig(r, lora_alpha, lora_dropout, target_modules, use_rslora, init_lora_weights)
    attach(model, config, adapter_name, seed=seed)
    return model


def attach(model: nn.Module, config: LoRAConfig, name: str = "default", *, seed: int | None = None) -> None:
    """Add the adapter ``name`` described by ``config`` and make it the active one.

    Raises:
        TargetError, ConflictError: it cannot be added (the second: the name is taken, or the adapters are
            merged); the model is untouched.
    """
    check_adapter_name(name)
    chosen = select(model, config.target_modules)
    present = adapter_layers(model)
    _refuse_merged(present)
    if any(name in layer.adapters for layer in present.values()):
        raise ConflictError(f"an adapter called {name!r} is already there", remedy="choose another name")
    freeze_backbone_params(model)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for path, module in chosen.items():
        layer = present.get(path) or _wrap(model, path, module)
        adapter = layer.add_adapter(name, config)
        start = torch.empty(adapter.lora_A.shape)
        initialise(config.init_lora_weights, start, generator)
        adapter.lora_A.data.copy_(start)  # made on the CPU, so that every device starts alike
    activate(model, name)


def detach(model: nn.Module) -> nn.Module:
    """Remove every adapter: each original module object is back in its place, unmerged."""
    for path, layer in adapter_layers(model).items():
        layer.unmerge()
        model.set_submodule(path, layer.base)
    return model


def activate(model: nn.Module, *names: str) -> None:
    """Route every row through the adapters ``names``; without names, through the base alone."""
    for name in names:
        carriers(model, name)
    layers = adapter_layers(model)
    _refuse_merged(layers)
    for layer in layers.values():
        layer.route = Route(tuple(name for name in names if name in layer.adapters))


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The model's adapter layers by path, in order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, AdapterLayer)}


def carriers(model: nn.Module, name: str) -> dict[str, AdapterLayer]:
    """The layers that carry the adapter ``name``; ``UsageError`` with the known names if none does."""
    layers = adapter_layers(model)
    found = {path: layer for path, layer in layers.items() if name in layer.adapters}
    if not found:
        known = ", ".join(dict.fromkeys(n for layer in layers.values() for n in layer.adapters))
        raise UsageError(f"there is no adapter called {name!r}", remedy=f"attached adapters: {known or 'none'}")
    return found


def remove_adapter(model: nn.Module, name: str) -> None:
    """Unmerge and take the adapter ``name`` off; layers without adapters become their base modules again."""
    for path, layer in adapter_layers(model).items():
        layer.unmerge()
        layer.remove_adapter(name)
        if not layer.adapters:
            model.set_submodule(path, layer.base)


def freeze_backbone_params(model: nn.Module, freeze: bool = True) -> None:
    """Freeze every parameter that is not an adapter's; ``freeze=False`` makes everything trainable."""
    own = {id(p) for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(not freeze)


def count_parameters(model: nn.Module) -> dict[str, int | float]:
    """``{"trainable": …, "total": …, "percent": …}``; shared parameters count once."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trainable": trainable, "total": total, "percent": 100 * trainable / max(total, 1)}


def _refuse_merged(layers: dict[str, AdapterLayer]) -> None:
    """A merged layer computes with its merged weight alone: what changes its adapters would do nothing."""
    if any(layer.merged for layer in layers.values()):
        raise ConflictError("the adapters are merged", remedy="call unmerge_lora_weights() first")


def _wrap(model: nn.Module, path: str, module: nn.Module) -> AdapterLayer:
    layer = AdapterLayer(module, host_of(module, path))
    layer.train(module.training)
    model.set_submodule(path, layer)
    return layer
