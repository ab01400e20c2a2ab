"""``lorakit generate`` and ``lorakit chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.options import base_options
from lorakit.cli.show import emit
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.evals.session import Kept, Session


def _session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True),
        click.option("--system", help="System message; an adapter brings the one it was trained with."),
        base_options,
    ):
        command = option(command)
    return command


@click.command()
@click.argument("model")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@_session_options
@click.option("--json", "as_json", is_flag=True, help="Print prompts and answers as JSON.")
def generate(
    model: str,
    prompts: tuple[str, ...],
    base: str | None,
    any_base: bool,
    quantization_bit: Kept,
    system: str | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    r"""Answer each PROMPT (or each line of standard input) with MODEL.

    MODEL is a run directory, an adapter folder or a base model. Decoding is greedy.

    \b
    lorakit generate runs/addresses "8128 S. Drive, Chicago"
    """
    questions = list(prompts) or (
        [] if sys.stdin.isatty() else [q for q in sys.stdin.read().splitlines() if q.strip()]
    )
    if not questions:
        raise UsageError("there is no prompt", remedy="give it as an argument or on standard input")
    from lorakit.evals.session import open_session

    session = open_session(model, base=base, check_base=not any_base, quantization_bit=quantization_bit)
    conversations = [session.conversation(question, system) for question in questions]
    answers = session.answer(conversations, max_new_tokens=max_new_tokens)
    if as_json:
        emit([{"prompt": q, "answer": a} for q, a in zip(questions, answers, strict=True)], as_json)
    else:
        click.echo("\n".join(answers))


@click.command()
@click.argument("model")
@_session_options
def chat(
    model: str,
    base: str | None,
    any_base: bool,
    quantization_bit: Kept,
    system: str | None,
    max_new_tokens: int,
) -> None:
    """Talk with MODEL (a run directory, an adapter folder or a base model); an empty line ends it."""
    from lorakit.evals.session import open_session

    session = open_session(model, base=base, check_base=not any_base, quantization_bit=quantization_bit)
    click.echo("An empty line ends the conversation; /new starts another one.", err=True)
    _converse(session, system, max_new_tokens)


def _converse(session: Session, system: str | None, max_new_tokens: int) -> None:
    from lorakit.data.sample import Message

    turns: tuple[Message, ...] = ()
    while True:
        click.echo("> ", nl=False, err=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        if question == "/new":
            turns = ()
            continue
        turns = (*turns, Message("user", question)) if turns else session.conversation(question, system)
        (text,) = session.answer([turns], max_new_tokens=max_new_tokens)
        turns = (*turns, Message("assistant", text))
        click.echo(text)
