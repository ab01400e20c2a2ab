"""``lorakit train`` and what it prints."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from lorakit.cli.show import emit, table

if TYPE_CHECKING:
    from lorakit.report.record import RunRecord


@click.command(short_help="Train an adapter from one YAML file.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--resume",
    metavar="auto|PATH",
    help="Go on from a checkpoint; auto takes the newest good one of output_dir, if there is one.",
)
@click.option(
    "--allow-change",
    multiple=True,
    metavar="KEY",
    help="Let this key differ from the checkpoint's; may be given several times.",
)
@click.option("--nproc", type=int, metavar="N", help="Train with N processes on this machine.")
@click.option("--dry-run", is_flag=True, help="Print every resolved value with its origin, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    config: str,
    overrides: tuple[str, ...],
    resume: str | None,
    allow_change: tuple[str, ...],
    nproc: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    r"""Train an adapter as the YAML file CONFIG says.

    \b
    lorakit train configs/addresses.yaml
    lorakit train configs/addresses.yaml lora_rank=16 output_dir=runs/r16
    lorakit train configs/addresses.yaml --resume auto
    """
    if dry_run:
        from lorakit.cli.validate import show

        show(config, overrides, as_json)
        return
    if nproc is not None:
        from lorakit.parallel.launch import launch

        raise click.exceptions.Exit(launch(nproc, _command(config, overrides, resume, allow_change, as_json)))
    from lorakit.report.record import RunRecord
    from lorakit.training.recipe import train as run

    result = run(
        config, overrides, resume=True if resume == "auto" else resume or False, allow_changes=allow_change
    )
    if int(os.environ.get("RANK", "0")):
        return  # the first of several processes speaks
    if as_json:
        found = {
            "adapter": str(result.adapter),
            "report": str(result.report),
            "before": result.before.scores() if result.before else None,
            "after": result.after.scores() if result.after else None,
        }
        emit(found, as_json)
        return
    shown = scores(RunRecord.read(result.folder))
    if shown:
        click.echo(shown)
    kind, next_to = (
        ("adapter", result.folder) if result.adapter.name == "adapter" else ("model  ", result.adapter)
    )
    click.echo(f"{kind}  {result.adapter}\nreport   {result.report}")
    click.echo(f'next     lorakit generate {next_to} "your prompt"')


def _command(
    config: str, overrides: tuple[str, ...], resume: str | None, allow_change: tuple[str, ...], as_json: bool
) -> list[str]:
    """The same command for one of several processes."""
    options = [f"--resume={resume}"] if resume else []
    options += [f"--allow-change={key}" for key in allow_change] + ["--json"] * as_json
    return [sys.executable, "-m", "lorakit", "train", *options, "--", config, *overrides]


def scores(record: RunRecord) -> str:
    """What was measured on the held-out rows, base and adapter side by side; empty if nothing was."""
    from lorakit.report.numbers import measures

    point = record.after or record.before
    rows = [(measure.name, measure.before, measure.after) for measure in measures(record.before, record.after)]
    return table(rows, (f"{point.rows} held-out rows", "base", "adapter")) + "\n" if point else ""
