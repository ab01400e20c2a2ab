"""``lorakit compress``: an adapter at lower ranks, with what that costs on held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.options import base_options, check_adapter, open_adapter
from lorakit.cli.show import emit
from lorakit.errors import ConfigError, ConflictError, DataError, UsageError

if TYPE_CHECKING:
    from lorakit.config.resolve import Resolved
    from lorakit.data.sample import Sample
    from lorakit.evals.evaluate import HeldOut
    from lorakit.evals.session import Kept, Session

_SETTINGS = "config.resolved.yaml"
_CUTOFF = 2048


@click.command()
@click.argument("adapter", type=click.Path(), metavar="RUN")
@click.argument("out", type=click.Path())
@click.option("--rank", type=click.IntRange(min=1), help="Highest rank of the result.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True),
    help="Share of its squared norm that each update keeps; 0.99 without --rank.",
)  # fmt: skip
@click.option("--data", type=click.Path(), multiple=True, help="Held-out rows, if not those of the run.")
@click.option("--max-samples", type=click.IntRange(min=1), help="Measure on so many of them only.")
@click.option("--batch-size", type=click.IntRange(min=1), default=50, show_default=True)
@base_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def compress(
    adapter: str,
    out: str,
    rank: int | None,
    energy: float | None,
    data: tuple[str, ...],
    max_samples: int | None,
    batch_size: int,
    base: str | None,
    any_base: bool,
    quantization_bit: Kept,
    as_json: bool,
) -> None:
    r"""Write the adapter of RUN (a run directory or an adapter folder) at lower ranks to the folder OUT.

    Each update is cut to its leading singular values: to --rank, or to the least that keeps --energy of it.
    The loss on held-out rows is measured before and after: on those of the run, or on --data.

    \b
    lorakit compress runs/addresses small
    lorakit compress runs/addresses r2 --rank 2 --data data/test.jsonl
    """
    from dataclasses import asdict

    from lorakit.checkpoint.compress import compress as cut
    from lorakit.checkpoint.peft_format import save_adapter

    check_adapter(adapter)
    _check(out, rank, energy)
    run = _settings(Path(adapter))
    samples, cutoff = _held_out(run, data), run.cutoff_len if run else _CUTOFF
    session = open_adapter(adapter, base, any_base, quantization_bit)
    held_out = _encoded(session, samples[:max_samples], cutoff)
    before = _loss(session, held_out, batch_size)
    energy = 0.99 if rank is None and energy is None else energy
    made = cut(session.model, "default", "compressed", rank=rank, energy=energy)
    after = _loss(session, held_out, batch_size)
    save_adapter(
        session.model,
        Path(out),
        "compressed",
        base_model=session.source.name,
        revision=session.source.revision,
        notes=session.notes,
        texts=session.template.files(),
    )
    assert session.adapter is not None
    found: dict[str, Any] = {
        "adapter": out,
        "ranks_before": _range(made.before),
        "ranks_after": _range(made.after),
        "numbers_kept": made.numbers_kept,
        "bytes_before": _bytes(session.adapter),
        "bytes_after": _bytes(Path(out)),
        "largest_error": max(made.errors.values()),
        "held_out_rows": held_out.data.rows if held_out else 0,
        "loss_before": before,
        "loss_after": after,
    }
    emit({**found, "modules": asdict(made)} if as_json else found, as_json)


def _check(out: str, rank: int | None, energy: float | None) -> None:
    if Path(out).exists():
        raise ConflictError(f"{out} is there already", remedy="name a new folder")
    if rank is not None and energy is not None:
        raise UsageError("--rank and --energy both decide what is kept", remedy="give one of the two")


def _settings(adapter: Path) -> Resolved | None:
    """What the run was told, if its folder still says so."""
    from lorakit.config.load import load
    from lorakit.config.resolve import resolve
    from lorakit.log import logger

    file = next((f / _SETTINGS for f in (adapter, adapter.parent) if (f / _SETTINGS).is_file()), None)
    if file is None:
        return None
    try:
        return resolve(load(file))
    except ConfigError as error:
        first = error.problems[0].message if error.problems else error.message
        logger.warning("warning: the settings of the run cannot be used here: %s", first)
        return None


def _held_out(run: Resolved | None, data: tuple[str, ...]) -> list[Sample]:
    """The rows to measure on: of ``data``, else of the run; none if it has none, or has them no longer."""
    from lorakit.data.configured import read_data
    from lorakit.data.reading import read_samples
    from lorakit.log import logger

    if data or run is None:
        return read_samples(data).samples if data else []
    try:
        return read_data(run).held_out
    except DataError as error:
        logger.warning("warning: the held-out rows of the run cannot be read: %s", error.message)
        return []


def _encoded(session: Session, samples: list[Sample], cutoff: int) -> HeldOut | None:
    from lorakit.evals.evaluate import hold_out
    from lorakit.log import logger

    if not samples:
        logger.warning("warning: no held-out rows: what this costs is not measured (give some with --data)")
        return None
    template = session.template
    return hold_out(session.tokenizer, samples, template=template, cutoff_len=cutoff, answers=False)


def _loss(session: Session, held_out: HeldOut | None, batch_size: int) -> float | None:
    from lorakit.evals.evaluate import mean_loss

    return mean_loss(session.model, session.tokenizer, held_out.rows, batch_size) if held_out else None


def _range(ranks: dict[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return str(low) if low == high else f"{low} to {high}"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("adapter_model.*"))
