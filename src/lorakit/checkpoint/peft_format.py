"""Adapters on disk: the PEFT folder (adapter_config.json, adapter_model.safetensors) and one ``.pth`` file.

What is written here loads in stock PEFT, and the other way round. A missing, unexpected, mis-shaped or
non-finite tensor is an error that lists expected and found; nothing is loaded then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.adapters.attach import adapter_layers, attach, carriers, refuse_merged, remove_adapter
from lorakit.adapters.spec import LoRAConfig
from lorakit.adapters.targets import select
from lorakit.checkpoint import binding, layout
from lorakit.checkpoint.peft_config import CONFIG_FILE, from_peft, to_peft
from lorakit.checkpoint.strict_json import read_object
from lorakit.checkpoint.tensor_files import PLAIN, read_plain, read_tensors
from lorakit.errors import AdapterMismatchError, UsageError
from lorakit.files import json_text, staged_folder, write_with
from lorakit.lowrank.inits import find_initialiser

WEIGHTS_FILE = "adapter_model.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"
NOTES_FILE = "lorakit.json"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk: PEFT's description, the tensors by PEFT's names, and lorakit's notes.

    ``described`` and ``weights`` are the files, for errors. The notes hold what PEFT's description has no key
    for: ``base`` (what the adapter belongs to), ``start`` (the initialiser of one written with its anchor) and
    whatever the caller adds.
    """

    description: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: dict[str, Any]
    described: Path
    weights: Path

    @property
    def config(self) -> LoRAConfig:
        """The description as settings."""
        return from_peft(self.description, str(self.described), anchored=self.anchored)

    @property
    def anchored(self) -> str | None:
        """The start of an adapter written at twice its rank, else None."""
        start = self.notes.get("start")
        return start if isinstance(start, str) and find_initialiser(start).anchored else None


def save_adapter(
    model: nn.Module,
    path: Path,
    name: str = "default",
    *,
    base_model: str = "",
    revision: str | None = None,
    notes: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write the adapter ``name`` as a PEFT folder, or one file if ``path`` ends in .pth; all of it or nothing.

    ``notes`` go into ``lorakit.json`` beside it, for what PEFT's description has no key for (``base``, a
    `binding.fingerprint`, is taken of the model if it is not among them); ``texts`` are
    further files of the folder by their names.

    Raises:
        AdapterMismatchError: a tensor is not finite; such an adapter is never written.
    """
    stored = _stored(model, path, name, base_model=base_model, revision=revision, notes=notes)
    write_stored(stored, path, texts or {})
    return path


def fill_adapter(
    model: nn.Module,
    folder: Path,
    name: str = "default",
    *,
    base_model: str = "",
    revision: str | None = None,
    notes: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write what `save_adapter` writes into a folder that is there, and that somebody else makes whole."""
    stored = _stored(model, folder, name, base_model=base_model, revision=revision, notes=notes)
    _fill(stored, folder, texts or {})


def write_stored(stored: StoredAdapter, path: Path, texts: Mapping[str, str]) -> None:
    """Write an adapter as it stands: a PEFT folder, or one file if ``path`` ends in .pth or .pt."""
    if path.suffix in PLAIN:
        about = {"adapter_config": stored.description, "notes": stored.notes}
        with storage_errors():
            write_with(path, lambda aside: torch.save({**stored.tensors, "lorakit": about}, aside))
        return
    with staged_folder(path) as stage, storage_errors():
        _fill(stored, stage, texts)


def read_stored(path: Path) -> StoredAdapter:
    """The adapter in a PEFT folder or a ``.pth`` file of lorakit.

    Raises:
        AdapterMismatchError: no such adapter, or its files cannot be used.
    """
    if path.suffix in PLAIN:
        tensors, about = read_plain(path)
        description, notes = about.get("adapter_config"), about.get("notes", {})
        if not isinstance(description, dict) or not isinstance(notes, dict):
            raise AdapterMismatchError(
                "the file holds no description of an adapter under the key 'lorakit'",
                place=str(path),
                remedy="`lorakit inspect` shows what it holds",
            )
        return StoredAdapter(description, tensors, notes, path, path)
    description = read_object(path / CONFIG_FILE)
    weights = path / WEIGHTS_FILE
    if not weights.exists() and (path / OLD_WEIGHTS_FILE).exists():
        weights = path / OLD_WEIGHTS_FILE
    notes = read_object(path / NOTES_FILE) if (path / NOTES_FILE).exists() else {}
    return StoredAdapter(description, read_tensors(weights), notes, path / CONFIG_FILE, weights)


def find_adapter(path: Path) -> Path | None:
    """The adapter folder that ``path`` is or, being a run directory, holds; None if it is neither."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    return None


def load_adapter(model: nn.Module, path: Path, name: str = "default", *, check_base: bool = True) -> LoRAConfig:
    """Attach the adapter at ``path`` to ``model`` as ``name``, in place of one that has this name, and make it
    the active one.

    Args:
        model: the base, or a model that carries adapters already.
        path: a PEFT folder or a ``.pth`` file.
        name: what to call it here.
        check_base: refuse a base with other weights than the adapter was trained on.

    Raises:
        AdapterMismatchError: the files cannot be used or do not fit this model, which is unchanged.
        TargetError: the model has no such modules; it is unchanged.
        ConflictError: its adapters are merged.
    """
    refuse_merged(carriers(model))
    stored = read_stored(path)
    config, doubled = stored.config, stored.anchored is not None
    try:
        selection = select(model, config)
    except UsageError as error:  # an expression that cannot be used: the file's fault, not the caller's
        raise AdapterMismatchError(str(error), place=str(stored.described)) from error
    tensors = {key: t for key, t in stored.tensors.items() if t.numel()}  # PEFT keeps empty ones of rank 0
    place = str(stored.weights)
    tensors = layout.without_base(selection, tensors, place)
    _check_match(layout.expected(selection, config, doubled=doubled), tensors, str(path))
    _check_finite(tensors, place)
    layout.check_groups(selection, tensors, config, place)
    if check_base and isinstance(stored.notes.get("base"), dict):
        binding.check(stored.notes["base"], model)
    remove_adapter(model, name)
    with torch.random.fork_rng(devices=[]):  # the random start is thrown away at once
        attach(model, config, name)
    layout.fill(model, name, tensors, doubled=doubled)
    return config


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Raise what safetensors makes of a full disk as the ``OSError`` that it was."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _stored(
    model: nn.Module,
    path: Path,
    name: str,
    *,
    base_model: str,
    revision: str | None,
    notes: Mapping[str, Any] | None,
) -> StoredAdapter:
    """The adapter ``name`` of ``model`` as it will lie at ``path``."""
    tensors = layout.collect(model, name)
    _check_finite(tensors, "the model")
    description = to_peft(model, name, base_model=base_model, revision=revision)
    return StoredAdapter(description, tensors, _notes(model, name, notes or {}), path, path)


def _fill(stored: StoredAdapter, folder: Path, texts: Mapping[str, str]) -> None:
    save_file(stored.tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    described = {CONFIG_FILE: json_text(stored.description), NOTES_FILE: json_text(stored.notes)}
    for file, text in (described | dict(texts)).items():
        (folder / file).write_text(text, encoding="utf-8")


def _notes(model: nn.Module, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    config = next(iter(adapter_layers(model, name).values())).adapter(name).config
    start = config.init_lora_weights
    base = given["base"] if "base" in given else binding.fingerprint(model)
    kept = {key: value for key, value in given.items() if key != "start"}  # of the adapter it was made from
    return kept | {"base": base} | ({"start": start} if find_initialiser(start).anchored else {})


def _check_match(expected: dict[str, tuple[int, ...]], found: dict[str, Tensor], place: str) -> None:
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
            place=place,
            remedy="was the adapter trained on another model? nothing was loaded",
        )


def _check_finite(tensors: dict[str, Tensor], place: str) -> None:
    bad = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if bad:
        raise AdapterMismatchError(f"NaN or infinity in {', '.join(bad[:5])} ({len(bad)} tensors)", place=place)
