"""``lorakit merge``: base and adapter as one plain model folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.options import base_options, check_adapter, open_adapter
from lorakit.cli.show import emit
from lorakit.config.quantization import Quantization
from lorakit.errors import ConflictError, UsageError
from lorakit.hardware import Precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lorakit.data.sample import Sample
    from lorakit.evals.session import Kept, Session

CERTIFICATE_FILE = "merge_certificate.json"
_LEAST_AGREEMENT = 0.99


@click.command()
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@base_options
@click.option("--dequantize", is_flag=True, help="Write dense weights, if the base is quantised.")
@click.option("--requantize", is_flag=True, help="Quantise the merged weights again, which loses some of them.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
    help="Number format of the written weights; folding is computed in fp32.",
)  # fmt: skip
@click.option("--inputs", type=click.Path(), help="Rows to compare base and adapter with the merged model on.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def merge(
    adapter: str,
    out: str,
    base: str | None,
    any_base: bool,
    quantization_bit: Kept,
    dequantize: bool,
    requantize: bool,
    dtype: Precision,
    inputs: str | None,
    as_json: bool,
) -> None:
    r"""Fold ADAPTER (a run directory or an adapter folder) into its base model and write the folder OUT.

    The result needs neither lorakit nor PEFT: stock transformers loads it. Beside it lies a certificate of how
    far its logits are from those of base and adapter.

    A quantised base is not merged into unasked: its steps are larger than what training changes. --dequantize
    writes what adapter and quantised base compute as dense weights; --requantize rounds these again, for
    bitsandbytes, and says what that has cost.

    \b
    lorakit merge runs/addresses merged-model
    lorakit merge runs/addresses merged-model --dequantize --dtype bf16
    """
    from lorakit.checkpoint.export import check_new, export_merged
    from lorakit.evals.certificate import certify, logits
    from lorakit.files import write_json
    from lorakit.log import logger
    from lorakit.models.quantized import DTYPES, quantization_of
    from lorakit.models.quiet import quiet

    if dequantize and requantize:
        raise UsageError("--dequantize and --requantize exclude each other", remedy="keep one of them")
    check_adapter(adapter)
    check_new(Path(out))
    samples = _samples(inputs) if inputs else []
    session = open_adapter(adapter, base, any_base, quantization_bit)
    model, kept = session.model, quantization_of(session.model)
    _check_asked(kept, adapter, dequantize=dequantize, requantize=requantize)
    texts = _texts(session, samples)
    adapted = logits(model, texts)
    facts = {"dtype": dtype, **_fold(model, kept, DTYPES[dtype], requantize=requantize)}
    with quiet():
        written = kept if requantize else None
        folder = export_merged(model, session.tokenizer, Path(out), dtype=DTYPES[dtype], kept=written)
    certificate = asdict(certify(adapted, logits(model, texts)))
    write_json(folder / CERTIFICATE_FILE, {"adapter": adapter, **facts, **certificate})
    if certificate["top1_agreement"] < _LEAST_AGREEMENT:
        logger.warning(
            "the merged model prefers another token at some positions: "
            + ("merge with --dequantize" if requantize else "merge as fp32 or bf16")
            + " to compare"
        )
    emit({"merged": str(folder), **facts, **certificate}, as_json)


def _samples(inputs: str) -> list[Sample]:
    from lorakit.data.reading import read_samples

    return read_samples([inputs], max_samples=20).samples


def _texts(session: Session, samples: list[Sample]) -> list[tuple[int, ...]]:
    """Token ids to compare models on: of the samples, or of a few prompts."""
    from lorakit.data.encode import encode_all
    from lorakit.data.rendering import Policy

    if not samples:
        return session.probes()
    return [row.ids for row in encode_all(session.tokenizer, samples, Policy(512), session.template)[0]]


def _fold(
    model: PreTrainedModel, kept: Quantization | None, dtype: torch.dtype, *, requantize: bool
) -> dict[str, Any]:
    """Merge the adapters on quantised layers, and say what these became."""
    from lorakit.models.quantized import dequantize_model, requantize_model

    if kept is None:
        return {}
    if requantize:
        return {"base": str(kept), "weights": str(kept), **asdict(requantize_model(model))}
    dequantize_model(model, dtype)
    return {"base": str(kept), "weights": "dense"}


def _check_asked(kept: Quantization | None, adapter: str, *, dequantize: bool, requantize: bool) -> None:
    """Refuse to choose what becomes of a quantised base's weights, and flags that have no effect."""
    if kept is None and (dequantize or requantize):
        raise UsageError("the base is not quantised", remedy="leave --dequantize and --requantize out")
    if kept is not None and not (dequantize or requantize):
        raise ConflictError(
            f"the adapter's base is quantised ({kept}): its steps are larger than what training changes, "
            "so that merging into it would lose the update",
            place=adapter,
            remedy="--dequantize writes dense weights, --requantize rounds them again and says what it lost; "
            "--quantization-bit none merges into the dense base, which the adapter was not trained on",
        )
