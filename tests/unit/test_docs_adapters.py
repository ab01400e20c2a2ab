"""Every block of code in docs/adapters.md runs, and the page names all that there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from lorakit.adapters.hosts import HOSTS
from lorakit.adapters.spec import MethodName
from lorakit.lowrank.inits import INITIALISERS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_every_block_runs(text: str) -> None:
    """In order, in one namespace; a failure shows its line on the page."""
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 17
    assert sum("assert" in block[1] for block in blocks) >= len(blocks) - 1
    assert len(blocks) == text.count("```") / 2
    namespace: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)


def test_methods_initialisers_and_hosts_are_all_named(text: str) -> None:
    words = set(re.findall(r"\w+", text))
    assert set(get_args(MethodName)) <= words
    assert set(INITIALISERS) <= words
    assert {kind.rpartition(".")[2] for kind in HOSTS} <= words
    assert min(len(INITIALISERS), len(HOSTS)) >= 6


def test_the_papers_of_the_code_are_those_of_the_page(text: str) -> None:
    files = [file for part in ("adapters", "lowrank") for file in (ROOT / "src/lorakit" / part).rglob("*.py")]
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    cited = set(re.findall(r"\b\d{4}\.\d{5}\b", code))
    listed = set(re.findall(r"\b\d{4}\.\d{5}\b", text.partition("## Papers")[2]))
    assert len(cited) >= 8
    assert cited <= listed
    assert set(re.findall(r"\b\d{4}\.\d{5}\b", text)) == listed
