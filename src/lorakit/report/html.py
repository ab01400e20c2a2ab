"""``report.html``: one self-contained page about a run, made from its directory alone.

No script, no request to anywhere: the page can be mailed, archived and opened offline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from lorakit.files import write_text
from lorakit.report.curves import curve_svg
from lorakit.report.numbers import DASH, dimensions, duration, measures, number
from lorakit.report.pages import render_page
from lorakit.report.record import EvalPoint, RunRecord, TrainPoint

_SAMPLES = 20
_SAMPLE_CHARACTERS = 4000  # the page stays under 1 MB whatever was generated
_CURVES = (  # (title, value, unit, smooth)
    ("Learning rate", attrgetter("learning_rate"), "learning rate", False),
    ("Gradient norm", attrgetter("grad_norm"), "norm before clipping", True),
    ("Throughput", attrgetter("tokens_per_second"), "tokens per second", True),
    ("Memory", attrgetter("memory_gb"), "GB", False),
)


class Picture(NamedTuple):
    """A curve with its caption."""

    title: str
    svg: Markup


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path."""
    path = run_dir / "report.html"
    write_text(path, render(RunRecord.read(run_dir)))
    return path


def render(record: RunRecord) -> str:
    """The page as text."""
    return render_page(
        "report.html.j2",
        {"number": number, "duration": duration, "dimensions": dimensions, "clip": _clip},
        run=record.info,
        name=Path(record.info.model.name).name,
        measures=measures(record.before, record.after),
        before=record.before,
        after=record.after,
        last=record.train[-1] if record.train else None,
        pictures=_pictures(record),
        samples=record.info.samples[:_SAMPLES],
        config=[_split_origin(line) for line in record.config.splitlines()],
    )


def _pictures(record: RunRecord) -> list[Picture]:
    if record.settings.get("plot_loss") is False:
        return []
    loss = attrgetter("loss")
    pictures = [
        _picture("Training loss", record.train, loss, "loss per token", smooth=True),
        _picture("Held-out loss", record.evals, loss, "loss per token", smooth=False),
        *(_picture(title, record.train, value, unit, smooth=smooth) for title, value, unit, smooth in _CURVES),
    ]
    return [picture for picture in pictures if picture]


def _picture(
    title: str,
    points: tuple[TrainPoint, ...] | tuple[EvalPoint, ...],
    value: Callable[[TrainPoint | EvalPoint], float | None],
    unit: str,
    *,
    smooth: bool,
) -> Picture | None:
    """A curve through at least three known values; fewer make no curve."""
    known = [(point.step, y) for point in points if (y := value(point)) is not None and math.isfinite(y)]
    if len(known) < 3:
        return None
    steps, ys = zip(*known, strict=True)
    return Picture(title, Markup(curve_svg(steps, ys, title=title, unit=unit, smooth=smooth)))


def _clip(text: str | None) -> str:
    if text is None:
        return DASH
    return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " …"


def _split_origin(line: str) -> tuple[str, str]:
    """A line of the configuration and its ``# origin`` comment."""
    setting, mark, origin = line.rpartition(" # ")
    return (f"{setting} ", f"# {origin}") if mark else (line, "")
