"""The ``lorakit`` command: a table of verbs, imported on use, and one place that turns errors into exits.

``lorakit --help`` reads the table only, so it never waits for torch. A verb raises; what the user sees and
which exit code the shell gets is decided here.
"""

from __future__ import annotations

import difflib
import importlib
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import click

from lorakit import __version__, hardware, log
from lorakit.errors import Interrupted, LorakitError, MemoryLimitError, UsageError

# verb -> (module:function, what --help says)
VERBS = {
    "train": ("lorakit.cli.train:train", "Train an adapter from one YAML file."),
    "init": ("lorakit.cli.init:init", "Write a first configuration for a model and training rows."),
    "presets": ("lorakit.cli.presets:presets", "List named settings, and show where they come from."),
    "validate": ("lorakit.cli.validate:validate", "Check a YAML file and show what it means."),
    "plan": ("lorakit.cli.plan:plan", "Tell what a training will take: bytes, seconds, sizes."),
    "bench": ("lorakit.cli.bench:bench", "Tell how fast a configuration trains here, and why."),
    "preview": ("lorakit.cli.preview:preview", "Show what a model would see of the data."),
    "generate": ("lorakit.cli.generate:generate", "Answer a prompt with a model or an adapter."),
    "chat": ("lorakit.cli.generate:chat", "Talk with a model or an adapter."),
    "evaluate": ("lorakit.cli.evaluate:evaluate", "Measure a model or an adapter on a held-out file."),
    "merge": ("lorakit.cli.merge:merge", "Write base and adapter as one plain model folder."),
    "convert": ("lorakit.cli.convert:convert", "Write an adapter as plain LoRA, at a lower rank if wanted."),
    "compress": ("lorakit.cli.compress:compress", "Write an adapter at lower ranks, with what that costs."),
    "inspect": ("lorakit.cli.inspect:inspect", "Show what an adapter or a file of weights holds."),
    "report": ("lorakit.cli.report:report", "Write the report page of a run."),
    "doctor": ("lorakit.cli.doctor:doctor", "Tell what is wrong with a run, or a configuration."),
    "env": ("lorakit.cli.env:env", "Show what this machine can do."),
    "demo": ("lorakit.cli.demo:demo", "Teach a small model a real task and show the proof."),
}

BROKEN_PIPE = 128 + signal.SIGPIPE


class _Verbs(click.Group):
    """A group that knows its verbs by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, function = VERBS[cmd_name][0].partition(":")
        command = vars(importlib.import_module(module))[function]
        assert isinstance(command, click.Command)
        # click's mark of text whose lines stay as they are is a backspace; a raw docstring has two characters.
        command.help = (command.help or "").replace(r"\b", "\b")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS:
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the verbs are {', '.join(VERBS)}"
            ctx.fail(f"no verb {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="VERB ...",
    epilog="Start with `lorakit demo`; `lorakit VERB -h` tells more about one verb.",
)
@click.version_option(__version__, message="lorakit %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages; may stand anywhere.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Fine-tune with LoRA from one YAML file, and see the proof that it worked."""
    log.setup(logging.DEBUG if debug else logging.INFO)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; those of the process when None.

    Returns:
        The exit code, as ``lorakit.errors`` lists them.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow console must not end a run
    try:
        status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read stdout has gone. Python flushes once more at exit, which has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return status


def _run(arguments: list[str]) -> int:
    # Read here, not by click: a mistake in the arguments is to be reported in the wished form too.
    debug, as_json = "--debug" in arguments, "--json" in arguments
    if debug:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    try:
        with cli.make_context("lorakit", arguments) as ctx:
            cli.invoke(ctx)
        return 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, click.Abort):
        error: LorakitError = Interrupted("stopped", signum=signal.SIGINT)
    except Exception as cause:  # noqa: BLE001 - the last net: whatever falls here still ends in a clear line
        if debug:
            traceback.print_exception(cause)
        error = _as_known(cause)
    click.echo(json.dumps(error.to_dict(), default=str) if as_json else error.render(), err=True)
    return error.exit_code


def _as_known(error: Exception) -> LorakitError:
    if isinstance(error, LorakitError):
        return error
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "lorakit"
        return UsageError(error.format_message(), remedy=f"see `{command} --help`")
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message())
    # Without torch only Python itself can be out of memory.
    if isinstance(error, MemoryError) or ("torch" in sys.modules and hardware.is_out_of_memory(error)):
        return MemoryLimitError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'the system refused more'}",
            remedy="make per_device_train_batch_size or cutoff_len smaller, or turn gradient_checkpointing on",
        )
    return LorakitError(
        f"{type(error).__name__}: {error}",
        remedy="a bug in lorakit; run again with --debug for the traceback",
    )
