"""``lorakit presets``: named settings, where their values come from, and what they would take."""

from __future__ import annotations

import click

from lorakit.cli.show import emit


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def presets(ctx: click.Context, as_json: bool) -> None:
    r"""List the presets that a configuration can start from, with `preset: NAME`.

    \b
    lorakit presets
    lorakit presets show gpu-16gb
    """
    if ctx.invoked_subcommand is not None:
        return
    from lorakit.config.presets import PRESETS

    if as_json:
        emit([preset.to_dict() for preset in PRESETS.values()], as_json)
        return
    shown = ("quantization_bit", "lora_rank", "lora_alpha", "cutoff_len", "learning_rate")
    names = ("bits", "rank", "alpha", "length", "rate")
    rows = []
    for preset in PRESETS.values():
        values = {name: preset.values.get(key) for key, name in zip(shown, names, strict=True)}
        rows.append({"preset": preset.name, **values, "for": preset.title, "from": preset.source})
    emit(rows, as_json)


@presets.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def show(name: str, as_json: bool) -> None:
    """Print the preset NAME as YAML, each value with the guide and lines that it was read from."""
    from lorakit.config.presets import find_preset

    preset = find_preset(name)
    if as_json:
        emit(preset.to_dict(), as_json)
    else:
        click.echo(preset.to_yaml(), nl=False)
