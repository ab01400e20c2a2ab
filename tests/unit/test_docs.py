"""The documentation says what the code does: the table of keys is the schema, the errors are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorakit.cli.main import VERBS, main
from lorakit.config.load import load
from lorakit.config.resolve import resolve
from lorakit.config.schema import help_texts
from lorakit.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_every_key_is_documented_in_its_own_words() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    assert rows == help_texts()
    assert len(rows) >= 40


def test_the_shown_errors_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    source, shown = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)[:2]
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(source)
    with pytest.raises(ConfigError) as caught:
        load("sft.yaml")
    assert caught.value.render().strip() == shown.strip()


def test_shipped_configurations_resolve() -> None:
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        settings = resolve(load(file))
        assert settings.warnings == ()
        assert Path(settings.output_dir).parent == ROOT / "runs"


def test_the_readme_names_verbs_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    verbs = re.findall(r"^ *lorakit (\w+)", "".join(blocks), re.MULTILINE)
    assert len(set(verbs)) >= 5
    for verb in sorted(set(verbs)):
        assert verb in VERBS
        assert main([verb, "--help"]) == 0
        assert capsys.readouterr().out.startswith("Usage: lorakit " + verb)
