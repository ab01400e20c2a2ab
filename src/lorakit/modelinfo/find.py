"""From what a user calls a model to its facts, as cheaply as that goes.

In this order: two numbers (``4096x4096``, one matrix), a GGUF file, a file of weights, a folder, the hub's
local cache, the built-in table, and only then the hub, from which ``config.json`` alone is fetched.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.modelinfo import table
from lorakit.modelinfo.architectures import facts_of, known
from lorakit.modelinfo.demo import DEMO_MODEL, demo_folder
from lorakit.modelinfo.facts import ModelFacts, Module
from lorakit.modelinfo.gguf import gguf_facts
from lorakit.modelinfo.headers import facts_from, file_shapes, folder_shapes, has_weights

_MATRIX = re.compile(r"(\d{1,7})\s*[x×]\s*(\d{1,7})")
_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w[\w.-]*/\w[\w.-]*(?<![.-])", re.ASCII)
_CONFIG = "config.json"


def find_facts(name: str, revision: str | None = None) -> ModelFacts:
    """The facts of the model ``name``.

    Args:
        name: a folder, a ``.gguf`` or ``.safetensors`` file, a hub id, a name of the table, or ``OUTxIN``.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: nothing tells how the model is built.
    """
    if matrix := _MATRIX.fullmatch(name.strip()):
        return _one_matrix(name.strip(), int(matrix[1]), int(matrix[2]))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return gguf_facts(path)
    if path.suffix == ".safetensors":
        return facts_from(file_shapes(path), name, str(path))
    folder = local_folder(name, revision)
    return _of_folder(folder, name) if folder else _by_name(name, path, revision)


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model that is here: one of that path, the demo's, or a hub model's in the local cache."""
    path = demo_folder() if name.lower() == DEMO_MODEL else Path(name).expanduser()
    return path if _is_folder(path) else _in_hub_cache(name, revision)


def _by_name(name: str, path: Path, revision: str | None) -> ModelFacts:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        remedy = "name a folder or a file of weights"
        raise ModelError(f"there is no model at {name}", place=str(path), remedy=remedy)
    if revision is None and (config := table.config_of(name)) is not None:
        return facts_of(config, name, "lorakit's table of architectures")
    if not _HUB_ID.fullmatch(name):
        meant = table.near(name)
        raise ModelError(
            f"there is no folder `{name}`, and the table of architectures does not have it",
            remedy=f"did you mean {' or '.join(meant)}?" if meant else "a hub id is written owner/name",
        )
    return facts_of(_read(_downloaded(name, revision)), name, f"config.json of {name}")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, a folder that is closed to us
        return False


def _one_matrix(name: str, out: int, features: int) -> ModelFacts:
    if not out or not features:
        raise ModelError(f"a matrix {name} is empty", remedy="write it as OUTxIN, such as 4096x4096")
    return ModelFacts(name, "matrix", "one matrix", (Module("weight", "linear", (out, features)),))


def _of_folder(folder: Path, name: str) -> ModelFacts:
    """By the configuration if its architecture is known, else by the headers of the weights."""
    if (folder / _CONFIG).is_file():
        config = _read(folder / _CONFIG)
        if known(config) or not has_weights(folder):
            return facts_of(config, name, str(folder / _CONFIG))
    elif not has_weights(folder):
        raise ModelError(
            "this folder holds no model: there is neither config.json nor safetensors weights",
            place=str(folder),
            remedy="name a folder made by `save_pretrained`, a .gguf file or a hub id",
        )
    return facts_from(folder_shapes(folder), name, f"headers of the weights in {folder}")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", place=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object", place=str(path))
    return value


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """The model in the hub's cache here, read as a folder: the hub's library takes longer to load."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / (revision or "main")).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = revision or ""
    found = folder / "snapshots" / commit
    return found if commit and _is_folder(found) else None


def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, _CONFIG, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        meant = table.near(name)
        close = f"; the table of architectures has {', '.join(meant)}" if meant else ""
        raise ModelError(
            f"cannot get config.json of `{name}`: {cause}",
            remedy=f"check the name and the connection, or name a local folder{close}",
        ) from error
