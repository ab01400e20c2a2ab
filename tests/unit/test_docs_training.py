"""Every block of keys in ``docs/training.md`` is trained with: together with a tiny model and a few rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lorakit.report.record import RunRecord
from lorakit.training.recipe import train

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
FEWEST_BLOCKS = 14


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: " ".join(re.findall(r"^\w+", block, re.MULTILINE)))
def test_block(block: str, tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"add {i} and {i}", "output": str(2 * i)} for i in range(16)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = tmp_path / "sft.yaml"
    keys = f"model_name_or_path: {tiny_llama}\ndataset: rows.json\noutput_dir: out\nlogging_steps: 1\n"
    config.write_text(f"{keys}tokenized_path: encoded\n{block}")
    steps = [] if "max_steps" in block else ["max_steps=4"]
    result = train(config, steps)
    record = RunRecord.read(result.folder)
    assert record.info.status == "finished"
    assert record.train[-1].step == (int(steps[0][-1]) if steps else 6)
    losses = [point.loss for point in record.train]
    assert all(0 < loss < 20 for loss in losses)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= FEWEST_BLOCKS
