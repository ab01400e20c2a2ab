"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def base_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--base`` and ``--any-base``: which base model an adapter is put on."""
    command = click.option(
        "--any-base", is_flag=True, help="Take the base model even if the adapter was trained on another."
    )(command)
    return click.option("--base", help="Base model, if not the one that the adapter names.")(command)
