"""Facts from the headers of weight files: exact names and shapes, for architectures nobody listed.

Read are the first bytes of ``.safetensors`` files. What a header claims is compared with the file's size before
it is followed, and no number of a tensor is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from lorakit.errors import ModelError
from lorakit.modelinfo.facts import Kind, ModelFacts, Module

Shapes = dict[str, tuple[int, ...]]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_LARGEST_HEADER = 64 << 20
_PLAIN_NAME = re.compile(r"[\w.-]+\.safetensors", re.ASCII)
_BLOCK = re.compile(r"\.(\d+)\.")
_EMBEDDING = re.compile(r"(^|[._])(wte|wpe|embed\w*|\w*embeddings?)$")
_NORM = re.compile(r"(norm|(^|\.)ln)(_?\w+)?$", re.IGNORECASE)
_HEADS = ("lm_head", "embed_out", "output")


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors weights in the folder."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


def folder_shapes(folder: Path) -> Shapes:
    """Name and shape of every tensor of a folder of weights, whole or in shards.

    Raises:
        ModelError: a file that is missing or is not what it claims.
    """
    if not (folder / _INDEX).is_file():
        return file_shapes(folder / _SINGLE)
    try:
        files = json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
        names = sorted({str(name) for name in files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{_INDEX} cannot be read: {error!r:.80}", place=str(folder)) from error
    shapes: Shapes = {}
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise ModelError(
                f"{_INDEX} names {name!r:.60}, which is no weight file beside it", place=str(folder)
            )
        shapes |= file_shapes(folder / name)
    return shapes


def file_shapes(path: Path) -> Shapes:
    """Name and shape of every tensor of one ``.safetensors`` file.

    Raises:
        ModelError: it cannot be read, or its header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        shapes = {str(name): tuple(entry["shape"]) for name, entry in header.items()}
        for name, shape in shapes.items():
            if not all(type(side) is int and side >= 0 for side in shape):
                raise ValueError(f"tensor {name!r:.80} has the shape {shape!r:.60}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(
            f"{path.name} is no usable weight file: {cause}", place=str(path), remedy="download it again"
        ) from error
    return shapes


def facts_from(shapes: Mapping[str, tuple[int, ...]], name: str, source: str) -> ModelFacts:
    """Facts of a model of which only the tensors are known.

    What a tensor belongs to is read off its name and its number of axes, so that a fused or transposed layer
    counts as what it looks like.

    Raises:
        ModelError: there is no tensor.
    """
    if not shapes:
        raise ModelError("it holds no tensors", place=source)
    grouped: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
    for tensor, shape in shapes.items():
        path, _, last = tensor.rpartition(".")
        if last == "bias" and f"{path}.weight" in shapes:
            continue
        path = path if last == "weight" else tensor
        extra = math.prod(shapes.get(f"{path}.bias", (0,))) if last == "weight" else 0
        numbers = _BLOCK.findall(f".{path}.")
        if len(numbers) == 1:
            path = _BLOCK.sub(".*.", f".{path}.", count=1).strip(".")
        grouped.setdefault((path, shape, extra), []).extend(int(n) for n in numbers[:1] if len(numbers) == 1)
    modules = tuple(
        Module(path, _kind(path, shape), shape, extra, tuple(sorted(blocks)))
        for (path, shape, extra), blocks in grouped.items()
    )
    head = next((m for m in modules if m.path.rpartition(".")[2] in _HEADS and m.kind == "linear"), None)
    return ModelFacts(
        name, "unknown", source, modules, head.path if head else None, vocabulary=head.shape[0] if head else 0
    )


def _kind(path: str, shape: tuple[int, ...]) -> Kind:
    if len(shape) == 2:
        return "embedding" if _EMBEDDING.search(path) else "linear"
    if len(shape) == 1:
        return "norm" if _NORM.search(path) else "other"
    return "conv" if len(shape) in (4, 5) else "experts" if len(shape) == 3 and "experts" in path else "other"
