"""Export: base and adapter as one plain model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.adapters.attach import carriers, detach
from lorakit.adapters.hosts import host_for
from lorakit.checkpoint.peft_format import storage_errors
from lorakit.config.quantization import Quantization
from lorakit.errors import ConflictError
from lorakit.files import staged_folder, write_json
from lorakit.quant.modules import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_new(folder: Path) -> None:
    """``ConflictError`` if the folder is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} is there already", remedy="name a new folder")


def export_merged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    kept: Quantization | None = None,
) -> Path:
    """Write ``model`` with its active adapters folded in as a transformers folder, all of it or nothing.

    The adapters end with this: ``model`` is a plain one afterwards, with weights of ``dtype``.

    Args:
        model: its adapters sit on dense layers.
        tokenizer: goes into the folder, too.
        folder: new.
        dtype: number format of the weights.
        kept: how layers of `QuantLinear` are quantised, if there are any; they are written as bitsandbytes'.

    Raises:
        ConflictError: ``folder`` exists and is not empty.
    """
    check_new(folder)
    for carrier in carriers(model).values():
        carrier.fold()
    detach(model).to(dtype)
    _untie(model)
    with staged_folder(folder) as stage, storage_errors():
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        if kept is not None:
            config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
            write_json(
                stage / "config.json", {**config, "quantization_config": _as_bitsandbytes(model, kept, dtype)}
            )
    return folder


def _as_bitsandbytes(model: PreTrainedModel, kept: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers has to know of the quantised layers to load them as bitsandbytes'."""
    dense = [
        path
        for path, m in model.named_modules()
        if host_for(m) and not isinstance(m, QuantLinear | nn.Embedding)
    ]
    settings: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": dense}
    if kept.bits == 8:
        return settings | {"load_in_8bit": True, "llm_int8_threshold": kept.threshold}
    return settings | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kept.kind,
        "bnb_4bit_use_double_quant": kept.double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def _untie(model: PreTrainedModel) -> None:
    """Say in the configuration that embedding and head differ, if an adapter changed one of them alone."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding.weight is not head.weight and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
