"""New adapters out of attached ones: weighted combinations, plain LoRA out of any method, lower ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import adapter_layers, attach, carriers
from lorakit.adapters.copies import ModuleCopies
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.spec import LoRAConfig
from lorakit.errors import TargetError, UsageError
from lorakit.lowrank import combine as rules
from lorakit.lowrank.combine import Factors

Rule = Literal["cat", "linear", "svd", "ties", "dare", "dare_ties"]
_EXACT = ("cat", "linear")


def combine(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    rule: Rule = "cat",
    *,
    r: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> float:
    """Attach the adapter ``new_name``, the weighted combination of ``names``, and make it the active one.

    Args:
        model: carries the adapters; they stay as they are.
        names: the adapters, which may sit on different layers.
        weights: one number each.
        new_name: name of the result, a plain LoRA with scaling 1.
        rule: see `lorakit.lowrank.combine`; all but cat and linear give a dense update, which is then cut to
            rank ``r`` (the largest rank of ``names`` if not given).
        r: rank of the result for svd, ties and dare.
        density: share of values kept by ties and dare.
        seed: of what dare drops.

    Returns:
        The largest relative error ‖Δ − B A‖_F / ‖Δ‖_F that cutting to rank r made on a layer; 0 for cat.

    Raises:
        UsageError, TargetError: it cannot be built; the model is untouched.
    """
    if len(names) != len(weights) or not names:
        raise UsageError(
            f"{len(names)} adapters and {len(weights)} weights", remedy="give one weight for each adapter"
        )
    for name in names:
        refuse_whole(model, name)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Factors] = {}
    worst = 0.0
    for path, layer in adapter_layers(model).items():
        pairs = [
            (factors_of(layer, name, path), w)
            for name, w in zip(names, weights, strict=True)
            if name in layer.adapters
        ]
        if pairs:
            made[path], error = _combined(
                [f for f, _ in pairs], [w for _, w in pairs], rule, r, density, generator
            )
            worst = max(worst, error)
    attach_plain(model, made, new_name)
    return worst


def refuse_whole(model: nn.Module, name: str) -> None:
    """Refuse an adapter that trains copies of modules: they are no low-rank updates."""
    if any(isinstance(carrier, ModuleCopies) for carrier in carriers(model, name).values()):
        raise UsageError(f"{name!r} trains whole modules, which cannot be combined", remedy="leave it out")


def factors_of(layer: AdapterLayer, name: str, path: str) -> Factors:
    """A [r, in] and B [out, r] of the adapter ``name`` on one layer, whatever its host; removed ranks left out.

    Raises:
        UsageError, TargetError: its update is no product of two such matrices.
    """
    adapter = layer.adapter(name)
    if not adapter.method.additive:
        raise UsageError(
            f"{name!r} is a DoRA adapter, whose update is no product B A", remedy="merge it instead"
        )
    if getattr(layer.base, "groups", 1) > 1:
        raise TargetError("adapters of a convolution with groups cannot be combined", place=f"module {path}")
    A, B = (factor.detach().flatten(1) for factor in adapter.method.factors(adapter))
    kept = A.abs().sum(1) > 0  # AdaLoRA's removed ranks
    if adapter.method.name == "adalora" and kept.any():
        A, B = A[kept], B[:, kept]
    return Factors(A, B, adapter.scaling)


def attach_plain(model: nn.Module, made: dict[str, Factors], name: str) -> None:
    """Attach exactly these updates, by path, as a plain LoRA with scaling 1, and make it the active one."""
    ranks = {path: factors.A.shape[0] for path, factors in made.items()}
    pattern = {f"^{path}": rank for path, rank in ranks.items()}
    r = max(ranks.values())
    config = LoRAConfig(r, r, target_modules=tuple(ranks), rank_pattern=pattern, alpha_pattern=pattern)
    attach(model, config, name)
    _fill(adapter_layers(model, name), name, made)


def _combined(
    factors: list[Factors],
    weights: list[float],
    rule: Rule,
    r: int | None,
    density: float,
    generator: torch.Generator,
) -> tuple[Factors, float]:
    if rule in _EXACT:
        return (rules.cat if rule == "cat" else rules.linear)(factors, weights), 0.0
    r = r or max(f.A.shape[0] for f in factors)
    if rule == "svd":
        return rules.reduce_rank(rules.cat(factors, weights), r)
    deltas = [f.delta for f in factors]
    if rule == "ties":
        delta = rules.ties(deltas, weights, density)
    elif rule in ("dare", "dare_ties"):
        delta = rules.dare(deltas, weights, density, generator, elect_signs=rule == "dare_ties")
    else:
        raise UsageError(
            f"unknown rule {rule!r:.80}", remedy="choose cat, linear, svd, ties, dare or dare_ties"
        )
    return rules.svd(delta, r)


@torch.no_grad()
def _fill(layers: dict[str, AdapterLayer], name: str, made: dict[str, Factors]) -> None:
    for path, layer in layers.items():
        adapter, factors = layer.adapter(name), made[path]
        _copy(adapter.lora_A, factors.scaling * factors.A)
        _copy(adapter.lora_B, factors.B)


def _copy(target: Tensor, value: Tensor) -> None:
    assert math.prod(target.shape) == value.numel()
    target.copy_(value.reshape(target.shape))
