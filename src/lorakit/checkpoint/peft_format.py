"""The PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``, both ways.

What is written here loads in stock PEFT, and the other way round. Tensor names are PEFT's
(``base_model.model.<module path>.lora_A.weight``). A missing, unexpected, mis-shaped or non-finite tensor is
an error that lists expected and found; nothing is loaded then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.adapters.attach import attach, carriers, remove_adapter
from lorakit.adapters.hosts import host_of
from lorakit.adapters.layer import AdapterLayer
from lorakit.adapters.spec import LoRAConfig
from lorakit.adapters.targets import select
from lorakit.checkpoint.peft_config import CONFIG_FILE, read_peft, short_targets, to_peft
from lorakit.errors import AdapterMismatchError
from lorakit.files import staged_folder, write_json

WEIGHTS_FILE = "adapter_model.safetensors"
NOTES_FILE = "lorakit.json"
_PREFIX = "base_model.model."
_TENSORS = ("lora_A", "lora_B")


def save_adapter(
    model: nn.Module,
    folder: Path,
    name: str = "default",
    *,
    base_model: str = "",
    revision: str | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapter ``name`` as a PEFT folder, all of it or nothing.

    ``notes`` go into ``lorakit.json`` beside it, for what PEFT's description has no key for.

    Raises:
        AdapterMismatchError: a tensor is not finite; such an adapter is never written.
    """
    layers = carriers(model, name)
    config = next(iter(layers.values())).adapter(name).config
    tensors = {key: value.detach().cpu().contiguous() for key, value in _tensors(layers, name).items()}
    _check_finite(tensors, "the model")
    targets = short_targets(model, layers)
    with staged_folder(folder) as stage, storage_errors():
        save_file(tensors, stage / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(
            stage / CONFIG_FILE, to_peft(config, targets=targets, base_model=base_model, revision=revision)
        )
        if notes is not None:
            write_json(stage / NOTES_FILE, notes)
    return folder


def load_adapter(model: nn.Module, folder: Path, name: str = "default") -> LoRAConfig:
    """Attach the adapter in ``folder`` to ``model`` as ``name``, in place of one that has this name, and make
    it the active one.

    Raises:
        AdapterMismatchError: the files cannot be used or do not fit this model, which is unchanged.
        TargetError: the model has no such modules; it is unchanged.
    """
    config, _ = read_peft(folder)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    _check_match(_expected(model, config), tensors, folder)
    _check_finite(tensors, str(folder / WEIGHTS_FILE))
    remove_adapter(model, name)
    with torch.random.fork_rng(devices=[]):  # the start of A is thrown away at once
        attach(model, config, name)
    with torch.no_grad():
        for key, parameter in _tensors(carriers(model, name), name).items():
            parameter.copy_(tensors[key])
    return config


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Raise what safetensors makes of a full disk as the ``OSError`` that it was."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; the library checks header, offsets and size."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise AdapterMismatchError(f"cannot read the weights: {error}", place=str(path)) from error


def _tensors(layers: dict[str, AdapterLayer], name: str) -> dict[str, nn.Parameter]:
    return {
        f"{_PREFIX}{path}.{tensor}.weight": layer.adapter(name).get_parameter(tensor)
        for path, layer in layers.items()
        for tensor in _TENSORS
    }


def _expected(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of such an adapter have on ``model``."""
    return {
        f"{_PREFIX}{path}.{tensor}.weight": shape
        for path, module in select(model, config.target_modules).items()
        for tensor, shape in zip(_TENSORS, host_of(module, path).shapes(module, config.r), strict=True)
    }


def _check_match(expected: dict[str, tuple[int, ...]], found: dict[str, Tensor], folder: Path) -> None:
    rows: list[tuple[str, str, object, object]]
    rows = [("missing", key, shape, "-") for key, shape in expected.items() if key not in found]
    rows += [("unexpected", key, "-", tuple(t.shape)) for key, t in found.items() if key not in expected]
    rows += [
        ("wrong shape", key, shape, tuple(found[key].shape))
        for key, shape in expected.items()
        if key in found and shape != tuple(found[key].shape)
    ]
    if rows:
        shown = "\n".join(f"  {kind:<11}  {key}  expected {e}, found {f}" for kind, key, e, f in rows[:12])
        more = f"\n  … and {len(rows) - 12} more" if len(rows) > 12 else ""
        raise AdapterMismatchError(
            f"{len(rows)} tensors do not fit this model:\n{shown}{more}",
            place=str(folder),
            remedy="was the adapter trained on another model? nothing was loaded",
        )


def _check_finite(tensors: dict[str, Tensor], place: str) -> None:
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise AdapterMismatchError(f"NaN or infinity in {', '.join(bad[:5])} ({len(bad)} tensors)", place=place)
