"""What an adapter belongs to: its base's weights, the tokenizer's vocabulary and the chat template, as hashes.

An adapter on another base loads wherever the shapes agree, and answers nonsense. So its folder keeps the
base's fingerprint, which is the same in float32 and bfloat16, with adapters on the model and without.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters.carrier import Carrier
from lorakit.errors import AdapterMismatchError, ConflictError
from lorakit.log import logger
from lorakit.quant.modules import QuantLinear
from lorakit.quant.store import Store, quantized_store

_SAMPLES = 64  # values of each parameter
_COMPARABLE = {torch.float64, torch.float32, torch.bfloat16}  # rounding one of them to bfloat16 loses nothing


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any

    def get_vocab(self) -> dict[str, int]:
        """Token → id."""
        ...


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """``{"shapes": sha256, "weights": sha256, "parameters": count}`` of the base under ``model``'s adapters.

    ``shapes`` is over the sorted names and shapes of the base's parameters; ``weights`` over those and 64
    evenly spaced values of each, rounded to bfloat16. Quantised weights count with their dense shapes and their
    packed bytes, and ``quantised`` tells their formats. A base whose values cannot be compared has a ``reason``
    in place of the hashes concerned: quantised in ways unknown, float16 (of another range), or not loaded.

    Raises:
        ConflictError: adapters are merged into the base.
    """
    found = sorted(base_parameters(model), key=lambda item: item[0])
    packed = {id(m.weight): store for m in model.modules() if (store := quantized_store(m))}
    dense = [p for _, p in found if id(p) not in packed]
    if any(not p.is_floating_point() or p.dtype.itemsize < 2 for p in dense):
        return {"reason": "the base is quantised"}
    shapes = [list(_shape(packed[id(p)]) if id(p) in packed else p.shape) for _, p in found]
    layout = [[name, shape] for (name, _), shape in zip(found, shapes, strict=True)]
    sizes = {id(p): math.prod(shape) for (_, p), shape in zip(found, shapes, strict=True)}
    result: dict[str, Any] = {"parameters": sum(sizes.values()), "shapes": _sha256(layout)}
    if packed:
        result["quantised"] = ", ".join(sorted({store.name for store in packed.values()}))
    odd = next((p for p in dense if p.dtype not in _COMPARABLE), None)
    odd = next((p for _, p in found if p.is_meta), odd)
    if odd is None:
        result["weights"] = _sha256([layout, [_sample(parameter) for _, parameter in found]])
    else:
        result["reason"] = "the base is not loaded" if odd.is_meta else f"the base is in {odd.dtype}"
    return result


def check(recorded: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a base that is not the one of ``recorded``, a `fingerprint`.

    What cannot be compared is skipped, and the log says why.

    Raises:
        AdapterMismatchError: other names, shapes or values.
        ConflictError: adapters are merged into the base.
    """
    present = fingerprint(model)
    if recorded.get("quantised") != present.get("quantised"):
        recorded = {**recorded, "weights": None, "reason": "one of the bases is quantised, or in another way"}
    for key, difference in (("shapes", "its layers differ"), ("weights", "its weights differ")):
        if not isinstance(recorded.get(key), str) or key not in present:
            reason = present.get("reason") or recorded.get("reason") or "the adapter does not say which it was"
            logger.info("not compared with the adapter's base: %s", reason)
            return
        if recorded[key] != present[key]:
            raise AdapterMismatchError(
                f"the adapter was trained on another base model: {difference}",
                remedy="load the model that the adapter names as its base",
            )


def text_fingerprint(tokenizer: Tokenizer) -> dict[str, str | None]:
    """``{"vocabulary": sha256, "chat_template": sha256 or None}`` of a transformers tokenizer."""
    template = tokenizer.chat_template
    return {
        "vocabulary": _sha256(sorted(tokenizer.get_vocab().items())),
        "chat_template": None if template is None else _sha256(template),
    }


def check_text(recorded: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer or chat template other than the one of ``recorded``, a `text_fingerprint`.

    Raises:
        AdapterMismatchError: the vocabulary or the chat template differs.
    """
    for key, value in text_fingerprint(tokenizer).items():
        if key in recorded and recorded[key] != value:
            raise AdapterMismatchError(
                f"the adapter was trained with another {key.replace('_', ' ')} than this model's tokenizer has",
                remedy="load the model that the adapter names as its base, or allow another base",
            )


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over every byte of the base's parameters, by name: the proof that none changed."""
    digest = hashlib.sha256()
    for name, parameter in base_parameters(model):
        digest.update(name.encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters by their names without adapters; a shared one under each of its names."""
    modules = model.named_modules(remove_duplicate=False)
    found = {path: module for path, module in modules if isinstance(module, Carrier)}
    if any(carrier.merged for carrier in found.values()):
        raise ConflictError("the adapters are merged", remedy="call unmerge_lora_weights() first")
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = _plain_name(name, found)
        if plain is not None:
            yield plain, parameter


def _plain_name(name: str, found: Mapping[str, Carrier]) -> str | None:
    """``q_proj.weight`` for ``q_proj.base.weight``; None for what belongs to an adapter."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in found:
            return ".".join(parts[:end] + parts[end + 1 :]) if parts[end] == "base" else None
    return name


def _shape(store: Store) -> tuple[int, ...]:
    """The shape of the dense weight, in its own layout."""
    return store.shape[::-1] if isinstance(store, QuantLinear) and store.transposed else store.shape


@torch.no_grad()
def _sample(parameter: Tensor) -> list[int]:
    """The bits, in bfloat16, of up to 64 values from the first to the last; packed bytes as they are."""
    places = torch.linspace(0, parameter.numel() - 1, min(_SAMPLES, parameter.numel()), dtype=torch.float64)
    values = parameter.detach().reshape(-1)[places.long().to(parameter.device)].cpu()
    return (values if values.dtype.itemsize == 1 else values.to(torch.bfloat16).view(torch.int16)).tolist()


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
