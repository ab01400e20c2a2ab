"""The source tree, parsed once, with a floor so that no test here can pass on nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "lorakit"
FEWEST_FILES = 30


@pytest.fixture(scope="session")
def package() -> Path:
    return PACKAGE


@pytest.fixture(scope="session")
def sources() -> dict[str, ast.Module]:
    """Path inside the package -> syntax tree, for every file of the package."""
    trees = {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert len(trees) >= FEWEST_FILES, f"only {len(trees)} files under {PACKAGE}"
    return trees
