"""``lorakit train`` and what it prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.show import emit, table

if TYPE_CHECKING:
    from lorakit.report.record import RunRecord


@click.command(short_help="Train an adapter from one YAML file.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Print every resolved value with its origin, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(config: str, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    r"""Train an adapter as the YAML file CONFIG says.

    \b
    lorakit train configs/addresses.yaml
    lorakit train configs/addresses.yaml lora_rank=16 output_dir=runs/r16
    """
    if dry_run:
        from lorakit.cli.validate import show

        show(config, overrides, as_json)
        return
    from lorakit.report.record import RunRecord
    from lorakit.training.recipe import train as run

    result = run(config, overrides)
    if as_json:
        found = {
            "adapter": str(result.adapter),
            "report": str(result.report),
            "before": result.before.scores() if result.before else None,
            "after": result.after.scores() if result.after else None,
        }
        emit(found, as_json)
        return
    click.echo(scores(RunRecord.read(result.folder)))
    click.echo(f"adapter  {result.adapter}\nreport   {result.report}")
    click.echo(f'next     lorakit generate {result.folder} "your prompt"')


def scores(record: RunRecord) -> str:
    """What was measured on the held-out rows, base and adapter side by side; empty if nothing was."""
    from lorakit.report.numbers import measures

    point = record.after or record.before
    rows = [(measure.name, measure.before, measure.after) for measure in measures(record.before, record.after)]
    return table(rows, (f"{point.rows} held-out rows", "base", "adapter")) + "\n" if point else ""
