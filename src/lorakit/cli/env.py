"""``lorakit env``: what this machine can do."""

from __future__ import annotations

from typing import Any

import click

from lorakit.cli.show import emit, table


@click.command()
@click.option("--fresh", is_flag=True, help="Measure the rates again.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def env(fresh: bool, as_json: bool) -> None:
    """Print the machine, its rates, the ways that are chosen to compute on it, and the versions of packages.

    Rates are measured once, in about a second, and kept in the cache, where `lorakit plan` reads them.
    """
    from lorakit.doctor.machine import machine
    from lorakit.doctor.rates import rates

    measured = rates(fresh=fresh)
    found = {**machine(), "gflops": measured.gflops, "rates": {"threads": measured.threads,
             "size": measured.size, "measured": measured.measured}}  # fmt: skip
    emit(found if as_json else _text(found), as_json)


def _text(found: dict[str, Any]) -> str:
    """The plain values in one table, the others in one each."""
    plain = {key: value for key, value in found.items() if not isinstance(value, dict)}
    sizes = {name: f"{rate:,.0f} GFLOP/s" for name, rate in found["gflops"].items()}
    about = found["rates"]
    title = f"products of {about['size']} × {about['size']}, {about['threads']} threads, {about['measured']}"
    chosen = [(op, each["runs"], each["why"]) for op, each in found["ops"].items()]
    parts = [
        table([(key, _plain(value)) for key, value in plain.items()]),
        f"{title}:\n{table(list(sizes.items()))}",
        f"what runs, and why:\n{table(chosen)}",
        f"enough, by common advice, for:\n{table(list(found['enough_for'].items()))}",
    ]
    return "\n\n".join(parts)


def _plain(value: Any) -> object:
    if isinstance(value, list):
        inner = (", ".join(map(str, each.values())) if isinstance(each, dict) else str(each) for each in value)
        return "; ".join(inner) if value and isinstance(value[0], dict) else " ".join(inner) or "none"
    return value
