"""What the library does not do, found in its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

BROAD = {"Exception", "BaseException"}
ENVIRONMENT_WRITERS = {"update", "setdefault", "pop", "popitem", "clear"}


def calls(*names: str) -> Callable[[ast.AST], bool]:
    """A detector for calls of these builtins."""
    return lambda node: isinstance(node, ast.Call) and ast.unparse(node.func) in names


def broad_except(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    return any(kind is None or ast.unparse(kind) in BROAD for kind in caught)


def environment_write(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        function = ast.unparse(node.func)
        return function in {"os.putenv", "os.unsetenv"} or (
            function.startswith(("os.environ.", "environ.")) and function.split(".")[-1] in ENVIRONMENT_WRITERS
        )
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and ast.unparse(node.value) in {"os.environ", "environ"}
    )


# what -> (its detector, code it must find, how often each file may do it)
RULES: dict[str, tuple[Callable[[ast.AST], bool], str, dict[str, int]]] = {
    "broad except": (
        broad_except,
        "try: pass\nexcept (OSError, Exception): pass",
        {
            "cli/main.py": 1,
            "report/trackers.py": 1,
        },  # the last net, which turns a bug into a line and an exit code
    ),
    "bare except": (broad_except, "try: pass\nexcept: pass", {"cli/main.py": 1, "report/trackers.py": 1}),
    "run source text": (calls("exec", "eval", "__import__"), "exec('x = 1')", {}),
    # join: srun does not set the variables by which other libraries know their rank
    "set environment": (environment_write, "import os\nos.environ['X'] = '1'", {"parallel/world.py": 1}),
    "update environment": (
        environment_write,
        "import os\nos.environ.setdefault('X', '1')",
        {"parallel/world.py": 1},
    ),
    "print": (calls("print"), "print(1)", {}),
}


@pytest.mark.parametrize("rule", RULES)
def test_not_done(rule: str, sources: dict[str, ast.Module]) -> None:
    detect, example, allowed = RULES[rule]
    assert sum(map(detect, ast.walk(ast.parse(example)))) == 1
    found = {path: sum(map(detect, ast.walk(tree))) for path, tree in sources.items()}
    assert {path: count for path, count in found.items() if count} == allowed


def test_attributes_are_known_by_name(sources: dict[str, ast.Module], package: Path) -> None:
    lines = sum(len((package / path).read_text(encoding="utf-8").splitlines()) for path in sources)
    guess = calls("getattr", "hasattr")
    guesses = [
        f"{path}:{node.lineno}"
        for path, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and guess(node)
    ]
    assert len(guesses) <= lines // 1000 + 5, guesses
