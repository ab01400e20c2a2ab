"""``lorakit demo``: the whole job on a real task, with the proof at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli.train import scores

if TYPE_CHECKING:
    from lorakit.training.recipe import RunResult

_SHOWN = 5


@click.command()
@click.argument("config", type=click.Path(), default="configs/addresses.yaml")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--prepare", is_flag=True, help="Fetch the model and the data, and stop.")
def demo(config: str, overrides: tuple[str, ...], prepare: bool) -> None:
    r"""Teach a small model to turn US addresses into JSON, and show what it learnt.

    Fetches SmolLM2-135M-Instruct and 1,480 labelled addresses once, then trains as CONFIG says.

    \b
    lorakit demo
    lorakit demo configs/addresses-long.yaml
    """
    from lorakit.config.load import load
    from lorakit.config.resolve import resolve
    from lorakit.demo.addresses import prepare as prepare_data
    from lorakit.models.sources import locate

    settings = resolve(load(config, overrides))
    prepare_data(Path(settings.dataset[0]).parent)
    locate(settings.model_name_or_path)
    if prepare:
        return
    from lorakit.training.recipe import train

    click.echo(_story(train(config, overrides)))


def _story(result: RunResult) -> str:
    """The evidence, for a person: scores, rows, and what to do next."""
    from lorakit.report.record import RunRecord

    record = RunRecord.read(result.folder)
    lines = ["", scores(record).rstrip()]
    for sample in record.info.samples[:_SHOWN]:
        lines += [
            "",
            f"address  {sample.prompt}",
            f"base     {_one_line(sample.before)}",
            f"adapter  {_one_line(sample.after)}",
            f"right    {sample.reference}",
        ]
    folder = _short(result.folder)
    lines += [
        "",
        f"The adapter is in {folder}/adapter, the evidence in {folder}/report.html. Next:",
        f'  lorakit generate {folder} "Acme Corp, 12 N. Main St. Apt 4, Springfield, IL 62701"',
        f"  lorakit chat {folder}",
        f"  lorakit merge {folder} {folder}/merged",
    ]
    return "\n".join(lines)


def _one_line(text: str | None, width: int = 160) -> str:
    line = " ".join((text or "-").split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
