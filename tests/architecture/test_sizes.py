"""Small parts, with a number: files of at most 400 lines, functions of at most 60."""

from __future__ import annotations

import ast
from pathlib import Path

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
FEWEST_FUNCTIONS = 100

# Name -> lines it may have. Only ever to be made shorter.
LARGER_FILES: dict[str, int] = {}
LARGER_FUNCTIONS: dict[str, int] = {}


def test_files(sources: dict[str, ast.Module], package: Path) -> None:
    lines = {path: len((package / path).read_text(encoding="utf-8").splitlines()) for path in sources}
    too_long = {path: count for path, count in lines.items() if count > MOST_LINES_OF_A_FILE}
    assert too_long == LARGER_FILES


def test_the_adapter_core_can_be_read_in_an_hour(sources: dict[str, ast.Module], package: Path) -> None:
    core = [package / path for path in sources if path.startswith("adapters/")]
    assert len(core) >= 12
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core) < 1500


def test_functions(sources: dict[str, ast.Module]) -> None:
    lines = {
        f"{path}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert len(lines) >= FEWEST_FUNCTIONS
    too_long = {name: count for name, count in lines.items() if count > MOST_LINES_OF_A_FUNCTION}
    assert too_long == LARGER_FUNCTIONS
