"""``lorakit report``: remake the report page of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path())
def report(run: str) -> None:
    """Write report.html anew from the files of the run directory RUN, and print its path."""
    from lorakit.report.html import write_report

    click.echo(write_report(Path(run)))
