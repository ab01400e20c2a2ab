"""How all pages are rendered: escaped, and with no variable that is not there."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, filters: dict[str, Any], **values: Any) -> str:
    """The template of this package as text."""
    pages = Environment(
        loader=PackageLoader("lorakit", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(filters)
    return pages.get_template(template).render(**values)
