"""The header of a GGUF file: its settings and its table of contents, and the facts of the model in it.

Every count and length is compared with the bytes the file has before it is followed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.modelinfo.architectures import facts_of, known
from lorakit.modelinfo.facts import ModelFacts
from lorakit.modelinfo.headers import facts_from

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_STEPS = 2_000_000  # lengths that are followed: a vocabulary has one a token and one a merge
_MAX_DEPTH = 4
_STRING, _ARRAY = 8, 9
# type -> its layout
_FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_LONGEST_TEXT = 200

# transformers' key -> what GGUF calls it, after the name of the architecture
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_experts_per_tok": "expert_used_count",
    "num_local_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_GPT2_KEYS = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_TYPES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


@dataclass(frozen=True)
class GgufRow:
    """A tensor: name, shape (rows first, as in PyTorch), number of its format, first byte after the header."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Settings (numbers and short texts alone), tensors, and where in a file of ``size`` bytes they begin."""

    fields: dict[str, Any]
    rows: list[GgufRow]
    start: int
    size: int


def gguf_header(path: Path) -> GgufHeader:
    """What is in a GGUF file.

    Raises:
        ModelError: it cannot be read or is not what it claims.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is a folder" if path.is_dir() else "it is not a regular file")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except OSError as error:
        raise ModelError(f"cannot read {path.name}: {error.strerror}", place=str(path)) from error
    except (ValueError, struct.error) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ModelError:
    """The error for a file that is not what it claims."""
    return ModelError(f"this is not a usable GGUF file: {error}", place=str(path), remedy="download it again")


def gguf_facts(path: Path) -> ModelFacts:
    """The facts of a GGUF file's model, as transformers builds it from there.

    Raises:
        ModelError: see `gguf_header`.
    """
    header = gguf_header(path)
    config = _config(header)
    if known(config):
        return facts_of(config, str(path), str(path))
    return facts_from({row.name: row.shape for row in header.rows}, str(path), str(path))


def _config(header: GgufHeader) -> Mapping[str, Any]:
    kind = str(header.fields.get("general.architecture", ""))
    shapes = {row.name: row.shape for row in header.rows}
    config = {key: header.fields.get(f"{kind}.{name}") for key, name in _KEYS.items()}
    config |= {new: config[old] for new, old in _GPT2_KEYS.items() if kind == "gpt2"}
    config["model_type"] = (
        "mixtral" if kind == "llama" and config["num_local_experts"] else _TYPES.get(kind, kind)
    )
    config["vocab_size"] = shapes.get("token_embd.weight", (None,))[0]
    config["tie_word_embeddings"] = "output.weight" not in shapes
    return config


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.steps = data, 0, 0

    def header(self) -> GgufHeader:
        if self.take(4) != _MAGIC:
            raise ValueError(f"it begins with {self.data[:4]!r} instead of {_MAGIC!r}")
        version, tensors, fields = *self.numbers("<I"), *self.numbers("<QQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        found = {}
        for _ in self.counted(fields):
            key = self.string().decode(errors="replace")
            value = self.value(self.number("<I"), 0)
            if value is not None:
                found[key] = value
        rows = [self.row() for _ in self.counted(tensors)]
        alignment = found.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"alignment {alignment}")
        start = -(-self.at // alignment) * alignment
        return GgufHeader(found, rows, start, len(self.data))

    def row(self) -> GgufRow:
        name = self.string().decode()
        dimensions = self.number("<I")
        if dimensions > 8:
            raise ValueError(f"tensor {name[:200]!r} has {dimensions} dimensions")
        shape = self.numbers(f"<{dimensions}Q")
        return GgufRow(name, tuple(reversed(shape)), *self.numbers("<IQ"))

    def value(self, kind: int, depth: int) -> Any:
        """Go past one value; returned are numbers and short texts."""
        if kind in _FIXED:
            return self.number(_FIXED[kind])
        if kind == _STRING:
            length = self.number("<Q")
            if length <= _LONGEST_TEXT:
                return self.take(length).decode(errors="replace")
            self.go(length)
        elif kind == _ARRAY and depth < _MAX_DEPTH:
            inner, count = self.numbers("<IQ")
            if inner in _FIXED:
                self.go(struct.calcsize(_FIXED[inner]) * count)
            else:
                for _ in self.counted(count):
                    self.value(inner, depth + 1)
        else:
            raise ValueError(f"unknown type {kind} in its metadata")
        return None

    def counted(self, count: int) -> range:
        self.steps += count
        if self.steps > _MAX_STEPS:
            raise ValueError(f"it claims {count} entries")
        return range(count)

    def string(self) -> bytes:
        return self.take(self.number("<Q"))

    def number(self, layout: str) -> Any:
        return self.numbers(layout)[0]

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, count: int) -> bytes:
        begin = self.at
        self.go(count)
        return self.data[begin : self.at]

    def go(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += count
