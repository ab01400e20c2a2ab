"""Turns a GGUF file, once, into a plain transformers folder: fp32 safetensors, configuration, tokenizer.

After that nothing else in lorakit needs to know that GGUF exists.
"""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from lorakit.errors import ModelError
from lorakit.files import cache_folder, exclusive, sha256_file, staged_folder
from lorakit.log import logger
from lorakit.models.quiet import quiet

_MAGIC = b"GGUF"
_HEADER_SIZE = 24  # magic, version, number of tensors, number of metadata fields


def converted(path: Path) -> Path:
    """The cached folder made of this GGUF file; it is named by the file's content."""
    check_gguf(path)
    return convert(path, converted_path(path.stem, sha256_file(path)))


def converted_path(name: str, sha256: str) -> Path:
    """Where the conversion of a GGUF file with this content lies."""
    return cache_folder() / "models" / f"{name}-{sha256[:12]}"


def check_gguf(path: Path) -> None:
    """Refuse what only bears the name of a GGUF file."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEADER_SIZE)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", place=str(path)) from error
    if head.startswith(_MAGIC) and len(head) == _HEADER_SIZE:
        return
    if head.lstrip().startswith(b"<"):
        cause = "it is a web page, probably an error page saved by a download"
    elif head.startswith(b"version https://git"):
        cause = "it is a Git LFS pointer, the weights themselves were not fetched"
    elif head.startswith(_MAGIC) or _MAGIC.startswith(head):
        cause = f"it ends within its header ({len(head)} bytes)"
    else:
        cause = f"it begins with {head[:4]!r} instead of {_MAGIC!r}"
    raise ModelError(f"this is not a GGUF file: {cause}", place=str(path), remedy="download it again")


def convert(path: Path, folder: Path) -> Path:
    """Make ``folder`` of the GGUF file unless it is there; it appears whole or not at all."""
    if folder.is_dir():
        return folder
    with exclusive(folder):
        if not folder.is_dir():
            logger.info("converting %s, once, into %s", path.name, folder)
            with staged_folder(folder) as stage:
                _write(path, stage)
    return folder


def _write(path: Path, stage: Path) -> None:
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, struct.error) as error:
        raise ModelError(
            f"this GGUF file cannot be converted: {error}",
            place=str(path),
            remedy="compare its size and sha256 with the source's, and download it again if they differ; "
            "otherwise its architecture is not supported: use the original model's folder",
        ) from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    with quiet():
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
