"""What must answer at once never loads torch or transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROBE = """
import sys
from lorakit.cli.main import main
status = main(sys.argv[1:])
loaded = sorted({"torch", "transformers", "numpy", "matplotlib"} & sys.modules.keys())
print(f"status={status} loaded={loaded}", file=sys.stderr)
"""

SMALLEST = """\
model_name_or_path: smollm2-135m-instruct
stage: sft
finetuning_type: lora
dataset: rows.jsonl
output_dir: run
"""


def probe(*arguments: str, cwd: Path | None = None) -> str:
    """Last line on stderr after ``lorakit ARGUMENTS`` in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stderr.splitlines()[-1]


def test_import() -> None:
    code = "import sys, lorakit; print(len(lorakit.__all__), {'torch', 'transformers'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "12 set()\n"


def test_help() -> None:
    assert probe("--help") == "status=0 loaded=[]"


def test_unknown_verb() -> None:
    assert probe("trian") == "status=2 loaded=[]"


def test_validate(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "say hi", "output": "hi"}\n')
    (tmp_path / "good.yaml").write_text(SMALLEST)
    (tmp_path / "bad.yaml").write_text(SMALLEST + "learning_rte: 1e-4\n")
    assert probe("validate", "good.yaml", cwd=tmp_path) == "status=0 loaded=[]"
    assert probe("validate", "bad.yaml", cwd=tmp_path) == "status=2 loaded=[]"
