"""GGUF files: turned, once, into a plain transformers folder, or read tensor by tensor to be quantised.

The folder (fp32 safetensors, configuration, tokenizer) is what the rest of lorakit sees. A model that is to be
quantised needs no such copy of its weights: configuration and tokenizer are converted, and `gguf_weights` reads
the rest from the file itself.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lorakit.errors import ModelError
from lorakit.files import exclusive, sha256_file, staged_folder
from lorakit.log import logger
from lorakit.modelinfo.demo import converted_path
from lorakit.models.gguf_table import GgufTensor, gguf_table, gguf_values
from lorakit.models.quiet import quiet

_MAGIC = b"GGUF"
_HEADER_SIZE = 24  # magic, version, number of tensors, number of metadata fields


def converted(path: Path, *, weights: bool = True) -> Path:
    """The cached folder made of this GGUF file, named by its content; with ``weights`` or all else alone."""
    status = path.stat()
    folder = converted_path(path.stem, _digest(path, status.st_size, status.st_mtime_ns))
    if weights or folder.is_dir():
        return convert(path, folder)
    return convert(path, folder.with_name(f"{folder.name}-text"), weights=False)


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    """The file's sha256; read again only if the file is another."""
    return sha256_file(path)


def check_gguf(path: Path) -> None:
    """Refuse what only bears the name of a GGUF file, or ends too early."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEADER_SIZE)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", place=str(path)) from error
    if head.startswith(_MAGIC) and len(head) == _HEADER_SIZE:
        gguf_table(path)
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


def convert(path: Path, folder: Path, *, weights: bool = True) -> Path:
    """Make ``folder`` of the GGUF file unless it is there; it appears whole or not at all."""
    if folder.is_dir():
        return folder
    with exclusive(folder):
        if not folder.is_dir():
            logger.info("converting %s, once, into %s", path.name, folder)
            with staged_folder(folder) as stage, _explained(path):
                (_write if weights else _write_text)(path, stage)
    return folder


def streamable(path: Path) -> bool:
    """Whether each weight of the model is one tensor of the file: not so for stacked experts."""
    return (
        not any(len(tensor.shape) > 2 for tensor in gguf_table(path)) and _architecture(path) not in GGUF_ARCHS
    )


def gguf_weights(path: Path, model: PreTrainedModel) -> dict[str, Callable[[], Tensor]]:
    """Functions that read each weight, in float32, by the names of ``model`` (which may be on ``meta``)."""
    with _explained(path):
        processor = TENSOR_PROCESSORS.get(_architecture(path), TensorProcessor)(config=model.config.to_dict())
        names = get_gguf_hf_weights_map(model, processor)
    tensors = [tensor for tensor in gguf_table(path) if tensor.name in names]
    return {names[each.name]: functools.partial(_read, path, each, processor) for each in tensors}


def _architecture(path: Path) -> str:
    with _explained(path):
        architecture: str = read_gguf_metadata(str(path))[0]["general.architecture"]
    return architecture


def _read(path: Path, tensor: GgufTensor, processor: Any) -> Tensor:
    """The values, in the order that transformers' layers have them."""
    values, end = torch.empty(tensor.shape), 0
    for piece in gguf_values(path, tensor):
        begin, end = end, end + piece.numel()
        values.view(-1)[begin:end] = piece.view(-1)
    extra: dict[str, Any] = {"tensors": {}}
    settled = processor.process(values.numpy(), tensor.name, tensor_key_mapping=None, parsed_parameters=extra)
    kept = next(iter(extra["tensors"].values()), None)  # where one processor puts an output head
    return kept if settled.name is None and kept is not None else torch.from_numpy(settled.weights)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, NotImplementedError, struct.error) as error:
        raise ModelError(
            f"this GGUF file cannot be converted: {error}",
            place=str(path),
            remedy="compare its size and sha256 with the source's, and download it again if they differ; "
            "otherwise its architecture is not supported: use the original model's folder",
        ) from error


def _write(path: Path, stage: Path) -> None:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(stage)
    _write_tokenizer(path, stage, model.config)


def _write_text(path: Path, stage: Path) -> None:
    with quiet():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        config.save_pretrained(stage)
        GenerationConfig.from_model_config(config).save_pretrained(stage)
    _write_tokenizer(path, stage, config)


def _write_tokenizer(path: Path, stage: Path, config: Any) -> None:
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(stage)
