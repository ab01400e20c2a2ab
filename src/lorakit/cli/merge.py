"""``lorakit merge``: base and adapter as one plain model folder."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.cli.show import emit
from lorakit.errors import ModelError
from lorakit.hardware import Precision


@click.command()
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--base", help="Base model, if not the one that the adapter names.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
    help="Number format of the written weights; folding is computed in fp32.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def merge(adapter: str, out: str, base: str | None, dtype: Precision, as_json: bool) -> None:
    r"""Fold ADAPTER (a run directory or an adapter folder) into its base model and write the folder OUT.

    The result needs neither lorakit nor PEFT: stock transformers loads it.

    \b
    lorakit merge runs/addresses merged-model
    """
    from lorakit.checkpoint.export import export_merged
    from lorakit.evals.session import find_adapter, open_session
    from lorakit.models.load import DTYPES
    from lorakit.models.quiet import quiet

    if find_adapter(Path(adapter)) is None:
        raise ModelError(f"{adapter} is neither an adapter folder nor a run directory that holds one")
    session = open_session(adapter, base=base, precision="fp32", merge=False)
    with quiet():
        folder = export_merged(session.model, session.tokenizer, Path(out), dtype=DTYPES[dtype])
    emit({"merged": str(folder), "dtype": dtype}, as_json)
