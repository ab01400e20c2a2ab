"""Which tensors an adapter has on disk: PEFT's names and shapes for lorakit's parameters, both ways.

    base_model.model.<path>.lora_A.weight [r, in]     base_model.model.<path>.lora_B.weight [out, r]

Embeddings, AdaLoRA and DoRA have names of their own. Whole modules (``modules_to_save``) keep their own names.
PiSSA and OLoRA are written as the plain LoRA of rank 2r that they are on the original base, [A; A₀] and
[B, −B₀], so that every reader computes the same function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.adapters.attach import adapter_layers, carriers
from lorakit.adapters.copies import ModuleCopies
from lorakit.adapters.hosts import Host
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.methods import Adapter
from lorakit.adapters.spec import LoRAConfig
from lorakit.adapters.targets import Selection
from lorakit.errors import AdapterMismatchError

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Slot:
    """One tensor on disk: the adapter's parameter, its key and its shape there."""

    parameter: str
    key: str
    shape: tuple[int, ...]


def slots(path: str, module: nn.Module, host: Host, config: LoRAConfig, *, doubled: bool) -> list[Slot]:
    """The tensors of an adapter on one module; ``doubled``: written with its anchor, at rank 2r."""
    r = config.rank_at(path)
    A, B = host.shapes(module, r)
    groups, out = getattr(module, "groups", 1), B[0]
    A = (A[0], A[1] * groups, *A[2:])  # PEFT's A of a convolution sees all inputs
    if doubled:
        A, B = (2 * r, *A[1:]), (B[0], 2 * r, *B[2:])
    if config.method == "adalora":
        shapes = {"lora_A": (A[0], _numel(A[1:])), "lora_B": B[:2], "lora_E": (r, 1)}
        return [Slot(name, f"{PREFIX}{path}.{name}", shape) for name, shape in shapes.items()]
    stem = ("lora_embedding_{}", "lora_{}.weight")[host.name != "embedding"]
    found = [
        Slot("lora_A", f"{PREFIX}{path}.{stem.format('A')}", A),
        Slot("lora_B", f"{PREFIX}{path}.{stem.format('B')}", B),
    ]
    if config.method == "dora":
        shape = (1, out, *B[2:]) if host.name == "conv" else (out,)
        found.append(Slot("lora_magnitude_vector", f"{PREFIX}{path}.lora_magnitude_vector", shape))
    return found


def expected(selection: Selection, config: LoRAConfig, *, doubled: bool) -> dict[str, tuple[int, ...]]:
    """Key → shape of every tensor that such an adapter has on disk."""
    found = {
        slot.key: slot.shape
        for path, (module, host) in selection.adapted.items()
        for slot in slots(path, module, host, config, doubled=doubled)
    }
    for path, module in selection.whole.items():
        found |= {f"{PREFIX}{path}.{key}": tuple(t.shape) for key, t in module.state_dict().items()}
    return found


def collect(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of the adapter ``name`` as they are on disk: PEFT's keys and shapes, on the CPU."""
    found: dict[str, Tensor] = {}
    for path, layer, adapter in _adapters(model, name):
        doubled = adapter.anchor_A is not None
        values = dict(adapter.named_parameters())
        if doubled:
            values["lora_A"], values["lora_B"] = adapter.method.factors(adapter)  # type: ignore[assignment]
        for slot in slots(path, layer.base, layer.host, adapter.config, doubled=doubled):
            value = values[slot.parameter].detach()
            if slot.parameter == "lora_A":
                value = _widen(value, getattr(layer.base, "groups", 1))
            found[slot.key] = value.reshape(slot.shape).cpu().contiguous()
    for path, carrier in carriers(model, name).items():
        if isinstance(carrier, ModuleCopies):
            state = carrier.adapters[name].state_dict()
            found |= {f"{PREFIX}{path}.{key}": t.detach().cpu().contiguous() for key, t in state.items()}
    return found


@torch.no_grad()
def fill(model: nn.Module, name: str, tensors: dict[str, Tensor], *, doubled: bool) -> None:
    """Put tensors of the right keys and shapes into the attached adapter ``name``."""
    for path, layer, adapter in _adapters(model, name):
        for slot in slots(path, layer.base, layer.host, adapter.config, doubled=doubled):
            target, value = adapter.get_parameter(slot.parameter), tensors[slot.key]
            if slot.parameter == "lora_A":
                value = _narrow(value, getattr(layer.base, "groups", 1))
            axis = {"lora_A": 0, "lora_B": 1}.get(slot.parameter)
            if doubled and axis is not None:
                value, anchor = value.chunk(2, axis)
                anchor = (anchor if axis == 0 else -anchor).to(target)
                setattr(adapter, slot.parameter.replace("lora", "anchor"), anchor.contiguous())
            target.copy_(value.reshape(target.shape))
    for path, carrier in carriers(model, name).items():
        if isinstance(carrier, ModuleCopies):
            state = carrier.adapters[name].state_dict()
            for key, target in state.items():
                target.copy_(tensors[f"{PREFIX}{path}.{key}"])


def without_base(selection: Selection, tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """The tensors without PEFT's copies of adapted embeddings' weights, which must be this base's."""
    kept = dict(tensors)
    for path, (module, _) in selection.adapted.items():
        key = f"{PREFIX}{path}.base_layer.weight"
        copied = kept.pop(key, None)
        if copied is not None:
            W = module.weight
            assert isinstance(W, Tensor)
            if copied.shape != W.shape or not torch.equal(copied.to(W.dtype).cpu(), W.detach().cpu()):
                raise AdapterMismatchError(
                    f"it brings its own base weight for {path}, which differs from this model's",
                    place=place,
                    remedy="load it on the base with that embedding (was the vocabulary resized?)",
                )
    return kept


def check_groups(selection: Selection, tensors: dict[str, Tensor], config: LoRAConfig, place: str) -> None:
    """Refuse an A that lets a group of a convolution see other groups' inputs: no merged weight could."""
    for path, (module, host) in selection.adapted.items():
        groups = getattr(module, "groups", 1)
        if groups > 1:
            A = tensors[slots(path, module, host, config, doubled=False)[0].key]
            if not torch.equal(_widen(_narrow(A, groups), groups), A):
                raise AdapterMismatchError(
                    f"{path}: the adapter connects the {groups} groups of its convolution, no weight can",
                    place=place,
                )


def _adapters(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterLayer, Adapter]]:
    for path, layer in adapter_layers(model, name).items():
        yield path, layer, layer.adapter(name)


def _widen(A: Tensor, groups: int) -> Tensor:
    """[r, in/g, …] → [r, in, …]: the rows of each group see its own inputs, zeros elsewhere."""
    if groups == 1:
        return A
    wide = A.new_zeros(A.shape[0], A.shape[1] * groups, *A.shape[2:])
    rows, columns = A.shape[0] // groups, A.shape[1]
    for g in range(groups):
        wide[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = A[g * rows : (g + 1) * rows]
    return wide


def _narrow(wide: Tensor, groups: int) -> Tensor:
    """Undo `_widen`."""
    if groups == 1:
        return wide
    rows, columns = wide.shape[0] // groups, wide.shape[1] // groups
    return torch.cat([wide[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)])


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
