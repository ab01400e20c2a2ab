"""Curves as small inline SVG pictures that follow the page's light or dark colours.

Matplotlib draws with placeholder colours which then become CSS variables; the same values give the same
bytes, so a remade report differs only where the run differs.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from xml.sax.saxutils import quoteattr

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lorakit.report.numbers import blend

_POINTS = 400  # more cannot be told apart at this size
_ACCENT, _MUTED, _LINE = "#a1a2a3", "#b1b2b3", "#c1c2c3"
_VARIABLES = {_ACCENT: "var(--accent)", _MUTED: "var(--muted)", _LINE: "var(--line)"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "text.color": _MUTED,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def curve_svg(xs: Sequence[float], ys: Sequence[float], *, title: str, unit: str, smooth: bool = False) -> str:
    """One curve over steps as an ``<svg>`` element.

    Args:
        xs: steps.
        ys: values; those that are not finite are left out.
        title: the name of the picture for screen readers.
        unit: what the vertical axis counts.
        smooth: draw the moving average in front of the values.
    """
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if not points:
        raise ValueError(f"no finite values for the curve {title!r}")
    steps, values = zip(*_thin(points), strict=True)
    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(5.2, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, values, color=_ACCENT, linewidth=1.6, alpha=0.3 if smooth else 1)
        if smooth:
            averages = accumulate(points, lambda old, new: (new[0], blend(old[1], new[1])))
            axes.plot(*zip(*_thin(list(averages)), strict=True), color=_ACCENT, linewidth=1.8)
        axes.set_ylabel(unit)
        axes.set_xlabel("step")
        axes.margins(x=0.01, y=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), title)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about ``_POINTS`` evenly spaced points, the last one among them."""
    stride = math.ceil(len(points) / _POINTS)
    return points[::-stride][::-1]


def _inline(svg: str, title: str) -> str:
    """Keep the bare element: no prologue, metadata, size, fonts, nor ids that pictures would share."""
    head, _, body = svg[svg.index("<svg") :].partition(">")
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r" font-family: [^;]*;", "", body)
    for placeholder, variable in _VARIABLES.items():
        body = body.replace(placeholder, variable)
    return f'<svg role="img" aria-label={quoteattr(title)}{head.removeprefix("<svg")}>{body}'
