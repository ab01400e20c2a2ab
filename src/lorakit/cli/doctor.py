"""``lorakit doctor``: what is wrong with a run, or what would go wrong with a configuration."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lorakit.cli.show import emit
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.doctor.before import Check
    from lorakit.doctor.finding import Diagnosis, Finding

_WIDTH = 100
_MARKS = {"good": "ok", "warning": "warning", "bad": "BAD", "skipped": "-"}


@click.command(short_help="Tell what is wrong with a run, or with a configuration.")
@click.argument("target", metavar="RUN|CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(target: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    r"""Tell what is wrong with the run in the folder RUN, with its numbers and the lines to change it by; or,
    before a training, whether the YAML file CONFIG would run here: machine, disk, memory, model, data.

    \b
    lorakit doctor runs/addresses
    lorakit doctor configs/addresses.yaml cutoff_len=512

    The exit code is 0 if nothing severe was found; else 3 for data, 4 for a model or an adapter, 5 for a
    training that went wrong, 6 for storage, 7 for memory.
    """
    if target.is_dir():
        if overrides:
            raise UsageError("key=value is for a configuration, not for a run that is done")
        diagnosis = _diagnose(target)
        _tell(diagnosis.to_dict() if as_json else _diagnosis(diagnosis), as_json, diagnosis.exit_code)
    else:
        from lorakit.doctor.before import examine

        examination = examine(target, overrides)
        shown = examination.to_dict() if as_json else _examination(examination.checks)
        _tell(shown, as_json, examination.exit_code)


def _tell(found: object, as_json: bool, exit_code: int) -> None:
    emit(found, as_json)
    if exit_code:
        raise click.exceptions.Exit(exit_code)


def _diagnose(run: Path) -> Diagnosis:
    from lorakit.doctor.evidence import gather
    from lorakit.doctor.rules import diagnose

    return diagnose(gather(run))


def _diagnosis(found: Diagnosis) -> str:
    parts = [_finding(finding) for finding in found.findings]
    parts += [] if parts else [f"nothing is wrong with {found.run}, as far as can be told"]
    count = f"{len(found.checked)} rules asked"
    if found.skipped:
        reasons = sorted(set(found.skipped.values()))
        skipped = "; ".join(
            f"{', '.join(name for name, why in found.skipped.items() if why == reason)} need {reason}"
            for reason in reasons
        )
        count += f", {len(found.skipped)} not: {skipped}"
    return "\n\n".join([*parts, _filled(count)])


def _finding(finding: Finding) -> str:
    numbers = ", ".join(f"{name} {_number(value)}" for name, value in finding.evidence.items())
    lines = [f"{finding.severity}[{finding.rule}]: {finding.title}", _filled(numbers, "  = ")]
    lines += [_filled(finding.advice, "  = ")] if finding.advice else []
    return "\n".join([*lines, *(f"  + {line}" for line in finding.remedies)])


def _examination(checks: tuple[Check, ...]) -> str:
    lines = []
    for check in checks:
        lines.append(_filled(f"{check.name}: {check.detail}", f"{_MARKS[check.state]:<9}"))
        lines += [f"  + {line}" for line in check.remedies]
    return "\n".join(lines)


def _number(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _filled(text: str, first: str = "") -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
