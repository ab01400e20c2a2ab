"""Every block of code in docs/qlora.md runs, and its file is one that can be trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lorakit.config.load import load
from lorakit.config.quantization import Quantization
from lorakit.config.resolve import resolve

PAGE = Path(__file__).parents[2] / "docs" / "qlora.md"


def test_every_block_runs() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) >= 4
    assert all("assert" in block[1] or "raise" in block[1] for block in blocks)
    namespace: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(PAGE), "exec"), namespace)


def test_the_file_resolves(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "qlora.yaml").write_text(block)
    settings = resolve(load(tmp_path / "qlora.yaml"))
    assert settings.warnings == ()
    assert settings.quantization == Quantization(compute=settings.precision)
