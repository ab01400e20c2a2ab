"""Two ranks that were cut go on as if they had not been, bit for bit: one more row of test_resume.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import rank_resume_program
from test_resume import data  # noqa: F401 - a fixture

from lorakit import hardware
from lorakit.parallel.launch import launch


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_cut(
    tiny_llama: Path,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: hardware.Precision,
) -> None:
    if not hardware.supports(precision):
        pytest.skip(f"no {precision} arithmetic here")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = [rank_resume_program.__file__, tiny_llama, data, tmp_path, precision]
    assert launch(2, [sys.executable, *map(str, program)]) == 0
    assert (tmp_path / "same").exists()
