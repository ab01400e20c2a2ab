"""``lorakit evaluate``: numbers on a held-out file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.options import base_options
from lorakit.cli.show import emit

if TYPE_CHECKING:
    from lorakit.evals.session import Kept


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True, type=click.Path())
@base_options
@click.option("--max-samples", type=click.IntRange(min=1), help="Only the first rows of each of DATA.")
@click.option("--cutoff-len", type=click.IntRange(min=16), default=2048, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--no-generate", is_flag=True, help="Loss and perplexity only.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(
    model: str,
    data: tuple[str, ...],
    base: str | None,
    any_base: bool,
    quantization_bit: Kept,
    max_samples: int | None,
    cutoff_len: int,
    batch_size: int,
    max_new_tokens: int,
    no_generate: bool,
    as_json: bool,
) -> None:
    r"""Score MODEL on the rows of DATA: loss, perplexity, exact match, field F1 of JSON answers.

    MODEL is a run directory, an adapter folder or a base model. DATA are files or folders as for training.

    \b
    lorakit evaluate runs/addresses data/test.jsonl
    """
    from lorakit.data.reading import read_samples
    from lorakit.evals.evaluate import evaluate as score
    from lorakit.evals.evaluate import hold_out
    from lorakit.evals.session import open_session
    from lorakit.log import logger

    samples = read_samples(data, max_samples=max_samples).samples
    session = open_session(model, base=base, check_base=not any_base, quantization_bit=quantization_bit)
    held_out = hold_out(
        session.tokenizer,
        samples,
        template=session.template,
        cutoff_len=cutoff_len,
        answers=not no_generate,
    )
    result = score(
        session.model,
        session.tokenizer,
        held_out,
        batch_size=batch_size,
        max_new_tokens=None if no_generate else max_new_tokens,
        on_batch=lambda done, total: logger.info("%d/%d rows", done, total),
    )
    emit(result.scores(), as_json)
