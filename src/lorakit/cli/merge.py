"""``lorakit merge``: base and adapter as one plain model folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from lorakit.cli.options import base_options, check_adapter, open_adapter
from lorakit.cli.show import emit
from lorakit.hardware import Precision

CERTIFICATE_FILE = "merge_certificate.json"
_LEAST_AGREEMENT = 0.99


@click.command()
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@base_options
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
    dtype: Precision,
    inputs: str | None,
    as_json: bool,
) -> None:
    r"""Fold ADAPTER (a run directory or an adapter folder) into its base model and write the folder OUT.

    The result needs neither lorakit nor PEFT: stock transformers loads it. Beside it lies a certificate of how
    far its logits are from those of base and adapter.

    \b
    lorakit merge runs/addresses merged-model
    """
    from lorakit.checkpoint.export import export_merged
    from lorakit.data.encode import encode_all, prompt_ids
    from lorakit.data.reading import read_samples
    from lorakit.data.rendering import Policy
    from lorakit.data.sample import Sample
    from lorakit.evals.certificate import PROMPTS, certify, logits
    from lorakit.files import write_json
    from lorakit.log import logger
    from lorakit.models.load import DTYPES
    from lorakit.models.quiet import quiet

    check_adapter(adapter)
    samples = read_samples([inputs], max_samples=20).samples if inputs else []
    session = open_adapter(adapter, base, any_base)
    if samples:
        texts = [r.ids for r in encode_all(session.tokenizer, samples, Policy(512), session.template)[0]]
    else:
        asked = [Sample(session.conversation(prompt), "prompt") for prompt in PROMPTS]
        texts = [tuple(prompt_ids(session.tokenizer, sample, session.template)) for sample in asked]
    adapted = logits(session.model, texts)
    with quiet():
        folder = export_merged(session.model, session.tokenizer, Path(out), dtype=DTYPES[dtype])
    certificate = asdict(certify(adapted, logits(session.model, texts)))
    write_json(folder / CERTIFICATE_FILE, {"adapter": adapter, "dtype": dtype, **certificate})
    if certificate["top1_agreement"] < _LEAST_AGREEMENT:
        logger.warning(
            "the merged model prefers another token at some positions: merge as fp32 or bf16 to compare"
        )
    emit({"merged": str(folder), "dtype": dtype, **certificate}, as_json)
