"""``lorakit validate``: whether a file is right, and what it means."""

from __future__ import annotations

import click

from lorakit.cli.show import emit


@click.command()
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the values and their origins as JSON.")
def validate(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    r"""Check the YAML file CONFIG and print every value with where it came from.

    \b
    lorakit validate configs/addresses.yaml
    lorakit validate configs/addresses.yaml lora_rank=16
    """
    show(config, overrides, as_json)


def show(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print the resolved configuration; warnings go to the log."""
    from lorakit.config.load import load
    from lorakit.config.resolve import resolve
    from lorakit.log import logger
    from lorakit.optim.check import check_numbers

    settings = resolve(load(config, overrides))
    check_numbers(settings)
    for warning in settings.warnings:
        logger.warning("warning: %s", warning)
    if as_json:
        emit(settings.model_dump(mode="json"), as_json)
    else:
        click.echo(settings.to_yaml(), nl=False)
