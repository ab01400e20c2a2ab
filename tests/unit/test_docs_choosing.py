"""``docs/choosing.md``: its tables are those of the measured rows, its computed numbers those of `plan`."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lorakit import plan
from lorakit.report.numbers import DASH

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
QKVO = "q_proj,k_proj,v_proj,o_proj"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """``benchmarks/choosing.py``, which is no package."""
    spec = importlib.util.spec_from_file_location("choosing", ROOT / "benchmarks" / "choosing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["choosing"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_the_measured_rows(program: ModuleType) -> None:
    assert program.filled(PAGE, program.known()) == PAGE
    assert len(program.TABLES) >= 9


def test_a_setting_in_several_tables_is_run_once(program: ModuleType) -> None:
    names = [program.identity(keys) for keys in program.wanted([*program.TABLES, "cut"])]
    assert len(set(names)) < len(names)
    assert program.identity({"lora_rank": 8, "lora_alpha": 16}) == "default" == program.identity({"seed": 42})
    assert program.identity({"lora_rank": 32, "lora_alpha": 64}) == program.identity({"lora_rank": 32})
    assert program.identity({"lora_rank": 32, "lora_alpha": 32}) != program.identity({"lora_rank": 32})


def test_what_a_table_says(program: ModuleType) -> None:
    rows = {
        "default": 0.30,
        "seed=7": 0.32,
        "seed=2026": 0.31,
        "lora_dropout=0.05": 0.315,
        "lora_dropout=0.1": 0.4,
    }
    rows = {
        name: {"loss": loss, "forgetting": 0.01, "tokens_per_second": None, "peak_gb": 2}
        for name, loss in rows.items()
    }
    text = program.table_text("dropout", rows)
    assert f"| 0 | 0.3000 | {DASH} | 2.00 |" in text
    assert text.endswith("The lowest loss: 0 (0.3000); within 0.0200, the range of three seeds: 0.05.\n")
    assert program.table_text("rank", {}) == "Not measured yet: `benchmarks/choosing.py`.\n"


@pytest.mark.parametrize("model", ["Llama-7B", "Llama-3-8B"])
def test_counts(model: str) -> None:
    (row,) = re.findall(rf"^\| {model} \|(.*)\|$", PAGE, re.MULTILINE)
    counts = [int(cell.replace(",", "")) for cell in row.split("|")]
    found = [
        plan(model=model.lower(), rank=8, targets=targets).trainable
        for targets in ("q_proj,v_proj", QKVO, "all")
    ]
    assert counts == found


def test_memory_of_seven_billion() -> None:
    rows = re.findall(r"^\| ((?:16|4) bits[^|]*) \| ([\d.]+) GB \|$", PAGE, re.MULTILINE)
    assert len(rows) == 7
    for words, gigabytes in rows:
        rank = re.search(r"rank (\d+)", words)
        found = plan(
            model="llama-2-7b", targets=QKVO, device="cuda", bits=int(words.split()[0]),
            length=2048 if "2048" in words else 512, checkpointing="checkpointing" in words,
            rank=int(rank[1]) if rank else 8,
        )  # fmt: skip
        assert found.memory.total / 1e9 == pytest.approx(float(gigabytes), abs=0.006), words
