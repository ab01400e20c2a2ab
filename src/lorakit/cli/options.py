"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.errors import ModelError

if TYPE_CHECKING:
    from lorakit.evals.session import Session


def base_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--base`` and ``--any-base``: which base model an adapter is put on."""
    command = click.option(
        "--any-base", is_flag=True, help="Take the base model even if the adapter was trained on another."
    )(command)
    return click.option("--base", help="Base model, if not the one that the adapter names.")(command)


def open_adapter(adapter: str, base: str | None, any_base: bool) -> Session:
    """Base and adapter side by side in float32, for verbs that make something new of them."""
    from lorakit.evals.session import open_session

    return open_session(adapter, base=base, precision="fp32", merge=False, check_base=not any_base)


def check_adapter(adapter: str) -> None:
    """Refuse what is neither an adapter folder nor a run directory that holds one."""
    from lorakit.checkpoint.peft_format import find_adapter

    if find_adapter(Path(adapter)) is None:
        raise ModelError(f"{adapter} is neither an adapter folder nor a run directory that holds one")
