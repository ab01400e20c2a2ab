"""What a user sees and which exit code the shell gets, for every way a verb can end."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit import __version__
from lorakit.cli import show
from lorakit.cli.main import VERBS, main

FAKE_VERBS = '''
import click
from lorakit.errors import ConfigError, DataError, Interrupted

def of_torch(kind, text):
    import torch  # it is loaded where it runs out of memory

    fail(getattr(torch, kind, RuntimeError)(text))

ENDS = {
    "well": lambda: click.echo("result"),
    "data": lambda: fail(DataError("row 3 has no text", place="rows.jsonl:3", remedy="add a text")),
    "config": lambda: fail(ConfigError("2 problems", text="first\\n\\nsecond")),
    "ctrl-c": lambda: fail(KeyboardInterrupt()),
    "sigterm": lambda: fail(Interrupted("stopped at step 7", signum=15)),
    "gpu-memory": lambda: of_torch("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB\\nmore"),
    "cpu-memory": lambda: of_torch("", "DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    "host-memory": lambda: fail(MemoryError()),
    "bug": lambda: fail(ZeroDivisionError("division by zero")),
    "much": lambda: [click.echo("x" * 4096) for _ in range(1000)],
    "odd": lambda: click.echo("caf\\u00e9 \\U0001f600"),
}

def fail(error):
    raise error

@click.command()
@click.argument("how", type=click.Choice(list(ENDS)))
@click.option("--json", "as_json", is_flag=True)
def end(how, as_json):
    """End in one of many ways."""
    ENDS[how]()
'''

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls ``lorakit ARGUMENTS`` and gives exit code, stdout, stderr; ``end`` is a verb for tests."""
    (tmp_path / "fake_verbs.py").write_text(FAKE_VERBS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERBS, "end", ("fake_verbs:end", "For tests."))

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("how", "status", "stderr"),
    [
        ("well", 0, ""),
        ("data", 3, "error[E-DATA]: row 3 has no text\n  --> rows.jsonl:3\n  = help: add a text\n"),
        ("config", 2, "first\n\nsecond\n\nerror[E-CONFIG]: 2 problems\n"),
        ("ctrl-c", 130, "error[INTERRUPTED]: stopped\n"),
        ("sigterm", 143, "error[INTERRUPTED]: stopped at step 7\n"),
        (
            "bug",
            1,
            "error[E-BUG]: ZeroDivisionError: division by zero\n"
            "  = help: a bug in lorakit; run again with --debug for the traceback\n",
        ),
    ],
)
def test_end(run: Run, how: str, status: int, stderr: str) -> None:
    assert run("end", how) == (status, "result\n" if how == "well" else "", stderr)


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("gpu-memory", "CUDA out of memory. Tried to allocate 2 GiB"),
        ("cpu-memory", "DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        ("host-memory", "the system refused more"),
    ],
)
def test_out_of_memory(run: Run, how: str, cause: str) -> None:
    status, stdout, stderr = run("end", how)
    assert (status, stdout) == (7, "")
    first, second = stderr.splitlines()
    assert first == f"error[E-MEMORY]: out of memory: {cause}"
    assert "per_device_train_batch_size" in second


def test_error_as_json(run: Run) -> None:
    status, stdout, stderr = run("end", "data", "--json")
    assert (status, stdout) == (3, "")
    assert json.loads(stderr) == {
        "code": "E-DATA",
        "message": "row 3 has no text",
        "place": "rows.jsonl:3",
        "remedy": "add a text",
    }


@pytest.mark.parametrize("arguments", [("--debug", "end", "bug"), ("end", "bug", "--debug")])
def test_debug_shows_the_traceback(run: Run, arguments: tuple[str, ...]) -> None:
    status, _, stderr = run(*arguments)
    assert status == 1
    assert stderr.startswith("Traceback (most recent call last):")
    assert "error[E-BUG]: ZeroDivisionError: division by zero" in stderr


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (("trian",), "no verb 'trian'; did you mean 'train'?", "lorakit"),
        (("zzz",), f"no verb 'zzz'; the verbs are {', '.join(VERBS)}, end", "lorakit"),
        (("end",), "Missing argument '{well|data|", "lorakit end"),
        (("end", "well", "extra"), "Got unexpected extra argument (extra)", "lorakit end"),
        (("end", "well", "--jsn"), "No such option '--jsn'. Did you mean '--json'?", "lorakit end"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], message: str, command: str) -> None:
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"error[E-USAGE]: {message}")
    assert stderr.endswith(f"  = help: see `{command} --help`\n")


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_lists_every_verb(run: Run, arguments: tuple[str, ...]) -> None:
    status, stdout, stderr = run(*arguments)
    assert (status, stderr) == (0, "")
    for verb, (_, text) in VERBS.items():
        assert any(line.split(None, 1) == [verb, text] for line in stdout.splitlines()), verb


def test_help_of_a_verb(run: Run) -> None:
    status, stdout, _ = run("end", "-h")
    assert status == 0
    assert "Usage: lorakit end" in stdout
    assert "End in one of many ways." in stdout


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"lorakit {__version__}\n", "")


def start(tmp_path: Path, how: str, **options: object) -> subprocess.Popen[bytes]:
    """``lorakit end HOW`` as a process of its own."""
    (tmp_path / "fake_verbs.py").write_text(FAKE_VERBS)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from lorakit.cli.main import VERBS, main;"
        "VERBS['end'] = ('fake_verbs:end', ''); sys.exit(main(['end', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


def test_reader_that_leaves_early(tmp_path: Path) -> None:
    with start(tmp_path, "much") as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_console_that_cannot_show_everything(tmp_path: Path) -> None:
    with start(tmp_path, "odd", env={**os.environ, "PYTHONIOENCODING": "cp1252"}) as process:
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout.decode("cp1252").strip(), stderr) == (0, "café ?", b"")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "-h"]) == 0
    assert f"Usage: lorakit {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_keeps_the_lines_of_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, _, function = VERBS[verb][0].partition(":")
    text = inspect.getdoc(vars(importlib.import_module(module))[function].callback) or ""
    marked = [part for part in text.split("\n\n") if part.startswith("\\b\n")]
    assert main([verb, "-h"]) == 0
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for part in marked:
        for line in part.splitlines()[1:]:
            assert line.strip() in shown
    assert "\\b" not in "".join(shown)


def test_table() -> None:
    rows = [["base", 0.0123456, None], ["adapter", 0.5, 12]]
    assert show.table(rows, ["model", "exact", "n"]) == (
        "model      exact   n\n"  #
        "base     0.01235   -\n"
        "adapter      0.5  12"
    )
    assert show.table([], ["model", "exact"]) == "model  exact"
    assert show.table([]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"loss": 1.5, "rows": 20}, "loss  1.5\nrows   20\n"),
        ([{"name": "a", "n": 1}, {"name": "b", "n": 10}], "name   n\na      1\nb     10\n"),
        ("plain", "plain\n"),
    ],
)
def test_emit(value: object, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show.emit(value, as_json=False)
    assert capsys.readouterr().out == text
    show.emit(value, as_json=True)
    assert json.loads(capsys.readouterr().out) == value
