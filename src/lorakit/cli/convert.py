"""``lorakit convert``: an adapter of any kind as plain LoRA, at its own rank or a lower one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli.options import base_options, check_adapter, open_adapter
from lorakit.cli.show import emit
from lorakit.errors import ConflictError

if TYPE_CHECKING:
    from lorakit.evals.session import Kept


@click.command()
@click.argument("adapter", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the result; it keeps everything if left out.")
@base_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    adapter: str,
    out: str,
    rank: int | None,
    base: str | None,
    any_base: bool,
    quantization_bit: Kept,
    as_json: bool,
) -> None:
    r"""Write ADAPTER (a run directory or an adapter folder) as plain LoRA on its base to the folder OUT.

    PiSSA, OLoRA and AdaLoRA become LoRA without loss; with --rank the update is cut to its leading singular
    values, and the largest relative error of a layer is shown.

    \b
    lorakit convert runs/addresses adapter-r4 --rank 4
    """
    from lorakit.checkpoint.convert import combine
    from lorakit.checkpoint.peft_format import save_adapter

    check_adapter(adapter)
    if Path(out).exists():
        raise ConflictError(f"{out} is there already", remedy="name a new folder")
    session = open_adapter(adapter, base, any_base, quantization_bit)
    error = combine(session.model, ["default"], [1.0], "converted", "svd" if rank else "cat", r=rank)
    save_adapter(
        session.model,
        Path(out),
        "converted",
        base_model=session.source.name,
        revision=session.source.revision,
        notes=session.notes,
        texts=session.template.files(),
    )
    emit({"adapter": out, "rank": rank or "unchanged", "largest_error": error}, as_json)
