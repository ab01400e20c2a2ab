"""Layers of a model that read the same input, computed together where each is known to be a plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.routing import BASE, Route
from lorakit.ops.linear import dropout_fits
from lorakit.ops.projections import Projection, projections
from lorakit.quant.modules import QuantLinear, keep


def together(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of linear layers, with adapters or without; hooks and all else that is special are kept."""
    found = group(*layers)
    if found is None or (found.p and not dropout_fits(x)):
        return tuple(layer(x) for layer in layers)
    ys = projections(x, found.projections, found.p)
    for y, come_back in zip(ys, found.come_back, strict=True):
        if come_back is not None and y.requires_grad:
            y.register_hook(come_back)
    return ys


class Group(NamedTuple):
    """What plain layers of one input compute, and what their outputs are to call in the backward pass."""

    projections: list[Projection]
    p: float  # dropout's probability
    come_back: list[Callable[[Tensor], None] | None]


def group(*layers: nn.Module) -> Group | None:
    """Layers that do nothing else than this."""
    passes = [layer.routed() if isinstance(layer, AdapterLayer) else (BASE, None) for layer in layers]
    plain = [_plain(layer, route) for layer, (route, _) in zip(layers, passes, strict=True)]
    found = [each for each in plain if each is not None]
    chances = {p for each, p in found if each.A is not None}
    if len(found) < len(layers) or len(chances) > 1:
        return None
    p = chances.pop() if chances else 0.0
    return Group([each for each, _ in found], p, [come_back for _, come_back in passes])


def _plain(layer: nn.Module, route: Route) -> tuple[Projection, float] | None:
    """The layer's product and its dropout, if it does nothing else."""
    hooks = [hook for hook in layer._forward_pre_hooks.values() if hook is not keep]
    if hooks or layer._forward_hooks or layer._backward_hooks or "forward" in vars(layer):
        return None
    if isinstance(layer, AdapterLayer):
        names = layer.present(route.names)
        special = layer.merged or route.rows is not None
        return None if special else layer.projection(names) if names else _plain(layer.base, BASE)
    if isinstance(layer, QuantLinear):
        return Projection(layer, layer.bias), 0.0
    if type(layer) is nn.Linear and not layer.weight.requires_grad:
        return Projection(layer.weight, layer.bias), 0.0
    return None
