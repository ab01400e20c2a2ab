"""Loads a base model, frozen and in evaluation mode, and its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.config.quantization import Quantization
from lorakit.errors import ModelError
from lorakit.hardware import Precision
from lorakit.log import logger
from lorakit.models.gguf import streamable
from lorakit.models.quantized import DTYPES, tell_quantized
from lorakit.models.quiet import quiet
from lorakit.models.sources import ModelSource, local_folder, stored_quantization
from lorakit.models.stream import dense_weight_reader, stored_gguf, stored_weights, stream


def load_model(
    source: ModelSource,
    *,
    precision: Precision,
    device: str = "cpu",
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The base model, frozen; weights that are absent, misshapen or not finite are an error.

    Args:
        source: what `locate` found.
        precision: number format of the weights, of all but the quantised ones.
        device: where the model goes.
        trust_remote_code: run code that comes with the model.
        quantization: keep the linear layers so. A model whose file has them quantised stays as it is.
    """
    direct = quantization is not None and source.kind == "gguf" and streamable(source.file)
    folder = local_folder(source, weights=not direct, trust_remote_code=trust_remote_code)
    stored = stored_quantization(folder)
    if stored and quantization and (stored.kind, stored.double) != (quantization.kind, quantization.double):
        raise ModelError(
            f"the weights in this folder are {stored} already, not {quantization}",
            place=str(folder),
            remedy="leave the quantisation keys out, or use the original model",
        )
    settings = quantization or stored
    with quiet(), _explained("model", folder):
        loaded = stream(
            folder,
            lambda model: stored_gguf(source.file, model) if direct else stored_weights(folder),
            settings,
            only_stored=stored is not None,
            dtype=DTYPES[precision],
            device=device,
            trust_remote_code=trust_remote_code,
        )
    model: PreTrainedModel = loaded[0]
    _check_loaded(folder, loaded[1])
    if settings:
        tell_quantized(model)
    return model.requires_grad_(False).eval().to(device)


def dense_weights(source: ModelSource, model: PreTrainedModel) -> Callable[[str], Tensor]:
    """A function that reads the weight [out, in] of a module of ``model``, by its path, from the file."""
    return dense_weight_reader(local_folder(source), model)


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer; the end token also pads where there is no other, as labels never depend on it."""
    folder = local_folder(source, weights=False, trust_remote_code=trust_remote_code)
    with quiet(), _explained("tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not tokenizer.get_vocab():
        raise ModelError(
            "this folder holds no tokenizer", place=str(folder), remedy="copy tokenizer.json there"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end-of-text token, so that no answer would ever end",
            place=str(folder),
            remedy="set `eos_token` in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding."""
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise ModelError(
            f"the tokenizer does not fit the model: token {token!r} has id {highest}, "
            f"but the embedding has {rows} rows",
            remedy="use the tokenizer that came with the model",
        )


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    wrong = [f"{name}: {found} instead of {expected}" for name, found, expected in info["mismatched_keys"]]
    for cause, names in (("lack", sorted(info["missing_keys"])), ("have the wrong shape for", sorted(wrong))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ModelError(
                f"the weights {cause} {', '.join(names[:5])}{more}",
                place=str(folder),
                remedy="config.json and the weights do not belong together; download the model again",
            )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        logger.warning("the model has no place for %d tensors: %s …", len(unexpected), unexpected[0])


@contextlib.contextmanager
def _explained(what: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "check that the folder is complete and the architecture known to transformers"
        if "trust_remote_code" in str(error):
            cause = "it needs Python code that came with it"
            remedy = "read that code, and set trust_remote_code: true if you trust it"
        raise ModelError(f"cannot load the {what}: {cause}", place=str(folder), remedy=remedy) from error
