"""Checkpoints of a run: everything needed to continue, in a folder that is whole or absent.

    checkpoint-<step>/
        adapter_config.json …   what the caller fills in: an adapter folder that can be used as it is
        state.safetensors       every tensor of the `State`
        state.json              every other value of it
        manifest.json           written last: the format, the step, and size and sha256 of each file

The folder is staged beside its target, flushed file by file, and renamed once. A reader trusts nothing before
every byte agrees with the manifest, and never unpickles. No path inside is absolute: a checkpoint may be copied
anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorakit import __version__
from lorakit.checkpoint.peft_format import storage_errors
from lorakit.checkpoint.state import State
from lorakit.checkpoint.strict_json import parse_object, read_bytes
from lorakit.checkpoint.tensor_files import stream_tensors
from lorakit.errors import (
    AdapterMismatchError,
    DamagedError,
    DivergedError,
    LorakitError,
    ModelError,
    StorageError,
)
from lorakit.files import discard, fsync, json_text, sha256_file, staged_folder

TENSORS_FILE = "state.safetensors"
VALUES_FILE = "state.json"
MANIFEST_FILE = "manifest.json"

_FORMAT = 1
_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
_FINITE = ("model/", "optimizer/")
_MAX_MANIFEST = 1 << 20
_MAX_VALUES_BYTES = 64 << 20
_MAX_VALUES = 2_000_000


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself: who wrote it, when in the run, and its files' sizes and sha256."""

    lorakit: str
    step: int
    files: Mapping[str, tuple[int, str]]


def write_snapshot(target: Path, state: State, fill: Callable[[Path], None]) -> None:
    """Write a checkpoint, all of it or nothing; one that stands at ``target`` is replaced as a whole.

    Args:
        target: ``<run>/checkpoint-<step>``; the run's folder is there already.
        state: what the run needs to continue; its values must be what JSON gives back unchanged.
        fill: writes the adapter and whatever else belongs to it into the folder it is given.

    Raises:
        DivergedError: NaN or infinity in the model, the optimizer or a value; nothing was written.
        StorageError: the disk refuses; what was there before is untouched.
    """
    step = step_of(target)
    _refuse_non_finite(state)
    values = _exact_json(state.values)
    if not target.parent.is_dir():  # making it anew would write past an unmounted disk, and past the run's lock
        raise StorageError(
            f"cannot write {target}: its folder is gone", remedy="was it removed, or its disk unmounted?"
        )
    with staged_folder(target) as stage, storage_errors():
        fill(stage)
        # One key: safetensors writes several in an order that changes from call to call.
        save_file(_storable(state.tensors), stage / TENSORS_FILE, metadata={"lorakit_state": str(_FORMAT)})
        (stage / VALUES_FILE).write_text(values, encoding="utf-8")
        manifest = json_text(_sealed(_describe(stage, step)))
        (stage / MANIFEST_FILE).write_text(manifest, encoding="utf-8")


def snapshot_bytes(state: State) -> int:
    """About what a checkpoint of ``state`` takes on the disk: all tensors, and the adapter's once more."""
    return sum(t.nbytes * (2 if name.startswith("model/") else 1) for name, t in state.tensors.items())


def read_snapshot(folder: Path) -> State:
    """What `write_snapshot` was given, bit for bit, on the CPU.

    Raises:
        ModelError: no checkpoint of lorakit, or one in a newer format.
        DamagedError: a file is missing, or differs from what was written.
    """
    verify_snapshot(folder)
    try:
        values = _read_object(folder / VALUES_FILE, _MAX_VALUES_BYTES)
        # Copies: a map of the file keeps its disk space after pruning, and kills us if a file server stumbles.
        tensors = {name: tensor.clone() for name, tensor in stream_tensors(folder / TENSORS_FILE)}
    except AdapterMismatchError as error:
        raise _damaged(folder, error.message) from error
    return State(tensors, values)


def verify_snapshot(folder: Path) -> Manifest:
    """Compare every byte of a checkpoint with its manifest; files that it does not list may be there.

    Raises:
        ModelError: no checkpoint of lorakit, or one in a newer format.
        DamagedError: a file is missing, or differs from what was written.
    """
    manifest = _manifest(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file():
                raise _damaged(folder, f"{name} is missing")
            if path.stat().st_size != size:
                raise _damaged(folder, f"{name} has {path.stat().st_size} bytes, not {size}")
            if sha256_file(path) != digest:
                raise _damaged(folder, f"{name} is not what was written (its sha256 differs)")
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read: {error.strerror or error}") from error
    return manifest


# ---------------------------------------------------------------------------------------- those of one run


def step_of(folder: Path) -> int:
    """The number of updates after which ``checkpoint-<step>`` was written."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder.name!r} is not checkpoint-<step>")
    return int(match[1])


def snapshots(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, newest first, good or not."""
    found = [path for path in _entries(run) if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def newest_good(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one.

    Raises:
        ModelError: one that is newer than any good one was written in a newer format: it is not damaged, and
            going back behind it would throw work away.
    """
    notes = []
    for folder in snapshots(run):
        try:
            verify_snapshot(folder)
        except DamagedError as error:
            notes.append(f"{folder.name} cannot be used: {error.message}")
        else:
            return folder, notes
    return None, notes


def prune(run: Path, keep: int | None, pinned: Collection[Path] = ()) -> None:
    """Delete all but the newest ``keep`` checkpoints and the ``pinned`` ones; None keeps all.

    The newest always stays, and so does whatever has no manifest: lorakit did not write it, or not as a
    checkpoint. One that is being deleted is renamed first, so that nothing half deleted looks like one.

    Raises:
        StorageError: the disk refuses.
    """
    if keep is None:
        return
    stay = {path.resolve() for path in pinned}
    ours = [path for path in snapshots(run) if (path / MANIFEST_FILE).is_file()]
    for folder in ours[max(keep, 1) :]:
        if folder.resolve() not in stay:
            discard(folder)


def set_aside(run: Path, after: int) -> list[Path]:
    """Rename the checkpoints after step ``after`` to ``aside-checkpoint-<step>``; returns their new paths.

    A run that goes on from an earlier checkpoint than its newest starts a history of its own: those of the
    other one must be neither resumed from nor counted by `prune`.

    Raises:
        StorageError: the disk refuses.
    """
    moved = []
    for folder in snapshots(run):
        if step_of(folder) > after:
            aside = folder.with_name(f"aside-{folder.name}")
            if aside.exists():
                discard(aside)
            try:
                moved.append(folder.rename(aside))
                fsync(run)
            except OSError as error:
                raise StorageError(f"cannot rename {folder}: {error.strerror or error}") from error
    return moved


# ------------------------------------------------------------------------------------------------- writing


def _refuse_non_finite(state: State) -> None:
    bad = [
        name
        for name, tensor in state.tensors.items()
        if name.startswith(_FINITE) and not torch.isfinite(_comparable(tensor)).all()
    ]
    if bad:
        raise DivergedError(
            f"NaN or infinity in {', '.join(bad[:5])} ({len(bad)} tensors): such a state is not saved",
            remedy="resume from the last checkpoint with a lower learning_rate",
        )


def _comparable(tensor: Tensor) -> Tensor:
    """In a number format that `torch.isfinite` knows: it lacks those of one byte."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _exact_json(values: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(values, allow_nan=False)
    except ValueError as error:
        raise DivergedError(f"a number of the run's state is not finite: {error}") from error
    if json.loads(text) != values:
        raise LorakitError("the run's state holds a value that JSON changes, such as a tuple")
    return text


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two in the same memory, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if memory in used else plain
        used.add(memory)
    return found


def _describe(stage: Path, step: int) -> dict[str, Any]:
    files = {
        path.relative_to(stage).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(stage.rglob("*"))
        if path.is_file()
    }
    return {"format": _FORMAT, "lorakit": __version__, "step": step, "files": files}


def _sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """With a digest of its own, in every format alike: no other file knows the manifest's."""
    text = json.dumps(fields, sort_keys=True)
    return fields | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


# ------------------------------------------------------------------------------------------------- reading


def _manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ModelError(
            "no such checkpoint", place=str(folder), remedy="name a checkpoint-<step> folder of a run"
        )
    if not path.exists():
        raise _damaged(folder, f"it has no {MANIFEST_FILE}, so it was not written as a checkpoint of lorakit")
    try:
        fields = _read_object(path, _MAX_MANIFEST)
    except AdapterMismatchError as error:
        raise _damaged(folder, f"{MANIFEST_FILE}: {error.message}") from error
    claimed = fields.pop("sha256", None)
    if _sealed(fields)["sha256"] != claimed:
        raise _damaged(folder, f"{MANIFEST_FILE} is not what was written (its sha256 differs)")
    written = fields.get("format")
    if isinstance(written, int) and written > _FORMAT:
        raise ModelError(
            f"the checkpoint has format {written}, written by lorakit {fields.get('lorakit')!s:.40}; "
            f"this is lorakit {__version__}, which reads up to format {_FORMAT}",
            place=str(folder),
            remedy="install that version of lorakit or a later one",
        )
    try:
        files = {str(name): (int(each["size"]), str(each["sha256"])) for name, each in fields["files"].items()}
        manifest = Manifest(str(fields["lorakit"]), int(fields["step"]), files)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"{MANIFEST_FILE} lacks what a checkpoint needs: {error}") from error
    strange = [name for name in files if not _is_inside(name)]
    if strange:
        raise _damaged(folder, f"{MANIFEST_FILE} lists {strange[0][:80]!r}, which is no file of a checkpoint")
    for name in (TENSORS_FILE, VALUES_FILE):
        if name not in files:
            raise _damaged(folder, f"{MANIFEST_FILE} does not list {name}")
    return manifest


def _is_inside(name: str) -> bool:
    """Whether a name can only mean a file in the checkpoint's own folder, on any system."""
    return not re.search(r"[\\:\0]", name) and not {"", ".", ".."} & set(name.split("/"))


def _read_object(path: Path, most: int) -> dict[str, Any]:
    data = read_bytes(path, most + 1)
    if len(data) > most:
        raise AdapterMismatchError(f"larger than {most} bytes", place=str(path))
    return parse_object(data, str(path), max_values=_MAX_VALUES)


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror or error}", place=str(folder)) from error


def _damaged(folder: Path, cause: str) -> DamagedError:
    return DamagedError(
        cause, place=str(folder), remedy="resume from an earlier checkpoint; `--resume auto` finds one"
    )
