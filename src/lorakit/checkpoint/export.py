"""Export: base and adapter as one plain model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.attach import carriers, detach
from lorakit.checkpoint.peft_format import storage_errors
from lorakit.errors import ConflictError
from lorakit.files import staged_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_merged(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, dtype: torch.dtype
) -> Path:
    """Write ``model`` with its active adapters folded in as a transformers folder, all of it or nothing.

    The adapters end with this: ``model`` is a plain one afterwards, with weights of ``dtype``.

    Raises:
        ConflictError: ``folder`` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} is there already", remedy="name a new folder")
    for carrier in carriers(model).values():
        carrier.fold()
    detach(model).to(dtype)
    _untie(model)
    with staged_folder(folder) as stage, storage_errors():
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    return folder


def _untie(model: PreTrainedModel) -> None:
    """Say in the configuration that embedding and head differ, if an adapter changed one of them alone."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embedding.weight is not head.weight and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
