"""``docs/data.md`` is run: below the files of a section stands what ``lorakit preview`` prints of them.

A Python block runs before that. The configuration is there by then, and the model in the folder ``model``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from lorakit.cli.main import main

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"row \d+  ")
FEWEST_EXAMPLES = 23


class Example(NamedTuple):
    """A section with something to try: its files, its program, and what is shown with which arguments."""

    title: str
    files: dict[str, str]
    program: str
    arguments: str
    shown: str


def examples() -> list[Example]:
    found = []
    for section in re.split(r"^##+ (?=\w)", TEXT, flags=re.MULTILINE)[1:]:
        blocks = BLOCK.findall(section)
        files = {name: text for kind, name, text in blocks if name and kind != "text"}
        program = "".join(text for kind, name, text in blocks if kind == "python" and not name)
        arguments, shown = next(((name, text) for kind, name, text in blocks if kind == "text"), ("", ""))
        if program or shown:
            found.append(Example(section.splitlines()[0], files, program, arguments or "--rows=0", shown))
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_example(
    example: Example,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    for name, text in example.files.items():
        Path(name).write_text(text, encoding="utf-8")
    config = example.files.get("sft.yaml") or f"dataset: {next(iter(example.files), 'none')}\n"
    Path("sft.yaml").write_text(f"{config}model_name_or_path: model\noutput_dir: out\n")
    shutil.copytree(tiny_llama, "model")
    exec(compile(example.program, "docs/data.md", "exec"), {})
    if not example.shown:
        return
    status = main(["preview", "sft.yaml", example.arguments])
    out, err = capsys.readouterr()
    if example.shown.startswith("error["):
        assert status == 3
        assert err.endswith(example.shown.replace("--> ", f"--> {tmp_path}/"))
    else:
        assert status == 0, err
        wanted = [line for line in example.shown.splitlines() if line]
        printed = [line for line in out.splitlines() if line and not HEADING.match(line)]
        starts = [i for i, line in enumerate(printed) if line == wanted[0]]
        assert any(printed[i : i + len(wanted)] == wanted for i in starts), out


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= FEWEST_EXAMPLES
    assert len({example.title for example in EXAMPLES}) == len(EXAMPLES)
