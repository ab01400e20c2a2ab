"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.errors import ModelError

if TYPE_CHECKING:
    from lorakit.evals.session import Kept, Session


def base_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--base``, ``--any-base``, ``--quantization-bit``: which base model, and how its weights are kept."""
    command = click.option(
        "--any-base", is_flag=True, help="Take the base model even if the adapter was trained on another."
    )(command)
    command = click.option(
        "--quantization-bit", type=click.Choice(["as trained", "none", "4", "8"]), default="as trained",
        show_default=True, help="Bits of the base model's frozen weights.",
    )(command)  # fmt: skip
    return click.option("--base", help="Base model, if not the one that the adapter names.")(command)


def open_adapter(adapter: str, base: str | None, any_base: bool, quantization_bit: Kept) -> Session:
    """Base and adapter side by side in float32, for verbs that make something new of them."""
    from lorakit.evals.session import open_session

    return open_session(
        adapter,
        base=base,
        precision="fp32",
        merge=False,
        check_base=not any_base,
        quantization_bit=quantization_bit,
    )


def check_adapter(adapter: str) -> None:
    """Refuse what is neither an adapter folder nor a run directory that holds one."""
    from lorakit.checkpoint.peft_format import find_adapter

    if find_adapter(Path(adapter)) is None:
        raise ModelError(f"{adapter} is neither an adapter folder nor a run directory that holds one")
