"""The page of ``lorakit preview --html``: the numbers of a data set and some of its rows in colours."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.data.preview import ShownRow, visible
from lorakit.data.survey import Survey
from lorakit.report.pages import render_page


def render_preview(name: str, survey: Survey, rows: Sequence[ShownRow]) -> str:
    """The page as text: self-contained, without script, whatever the rows hold."""
    return render_page(
        "preview.html.j2",
        {"visible": visible},
        name=name,
        survey=survey,
        rows=rows,
        most=max((bar.rows for bar in survey.tokens.histogram), default=1),
    )
