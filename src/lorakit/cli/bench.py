"""``lorakit bench``: how fast a configuration trains on this machine, and what limits it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lorakit.cli.show import emit, table

if TYPE_CHECKING:
    from lorakit.training.bench import Speed


@click.command(short_help="Tell how fast a configuration trains here, and what limits it.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--seconds", type=click.FloatRange(min=0), default=60.0, help="How long to train; 60.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def bench(config: str, overrides: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """Train as the YAML file CONFIG says for a minute, write nothing, and tell tokens a second, their share of
    what the frozen layers' products alone would allow, and what has the rest of the time.
    """
    from lorakit.training.bench import bench as measure

    found = measure(config, overrides, seconds=seconds)
    emit(asdict(found) if as_json else _text(found), as_json)


def _text(found: Speed) -> str:
    rows = [
        ("tokens a second", f"{found.tokens_per_second:,.0f}, the median of {found.updates} updates"),
        ("frozen products alone", f"{found.bound_tokens_per_second:,.0f}"),
        ("share of that", f"{found.share:.0%}"),
        ("peak memory", f"{found.peak_gb:.2f} GB"),
    ]
    parts = [(part, f"{share:.0%}") for part, share in sorted(found.parts.items(), key=lambda p: -p[1])]
    advice = "\n".join(f"- {line}" for line in found.advice)
    return f"{table(rows)}\n\nof an update's computing time:\n{table(parts)}\n\n{advice}"
