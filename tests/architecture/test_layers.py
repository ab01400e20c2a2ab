"""Imports go down only, nothing imports in a circle, and each layer reaches only the libraries it may."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

# Top first. A module imports its own package and the layers below its own; packages on one line stay apart.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"doctor"},
    {"training"},
    {"evals", "report", "parallel"},
    {"optim"},
    {"models", "data", "checkpoint", "planning"},
    {"standalone"},
    {"adapters"},
    {"lowrank", "quant"},
    {"ops"},
    {"config", "monitor"},
    {"hardware", "modelinfo"},
    {"log", "files", "patterns"},
    {"errors"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

TORCH_ONLY = {"standalone", "adapters", "lowrank", "quant", "ops"}
# A regular expression engine with a deadline, which transformers needs, too; memory that torch does not align.
SMALL = {"regex", "numpy"}
DOORS = {"quant/interop.py": {"bitsandbytes"}}  # imported there inside a function, by those who have it
# hardware asks inside functions
NO_TORCH = {"config", "modelinfo", "planning", "cli", "errors", "files", "log"}
HEAVY = {"torch", "transformers", "peft", "accelerate", "gguf", "matplotlib"}
FEWEST_EDGES = 40


def module_name(path: str) -> str:
    """``adapters/layer.py`` -> ``lorakit.adapters.layer``."""
    parts = ["lorakit", *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, modules: set[str], *, top_level: bool = False) -> Iterator[str]:
    """Every imported module by its full name; ``from package import module`` counts as the module."""
    for node in tree.body if top_level and isinstance(tree, ast.Module) else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner != "lorakit.__version__":  # the one name a module may take from the whole package
                    yield inner if inner in modules else str(node.module)


@pytest.fixture(scope="module")
def graph(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules of lorakit that it imports anywhere, functions and type checking included."""
    modules = {module_name(path) for path in sources}
    edges = {
        module_name(path): {name for name in imports(tree, modules) if name.split(".")[0] == "lorakit"}
        for path, tree in sources.items()
        if path != "__init__.py"  # lists the public names for type checkers, so it points everywhere
    }
    assert sum(map(len, edges.values())) >= FEWEST_EDGES
    return edges


def test_every_part_has_a_layer(sources: dict[str, ast.Module]) -> None:
    parts = {path.split("/")[0].removesuffix(".py") for path in sources} - {"__init__"}
    assert parts - RANK.keys() == set()


def test_imports_go_down(graph: dict[str, set[str]]) -> None:
    wrong = []
    for module, targets in graph.items():
        for target in targets - {"lorakit"}:
            source_part, target_part = module.split(".")[1], target.split(".")[1]
            if source_part != target_part and RANK[source_part] >= RANK[target_part]:
                wrong.append(f"{module} -> {target}")
    assert sorted(wrong) == []


def test_no_cycles(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_no_module_imports_a_package_around_it(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in targets
        if module.startswith(f"{target}.")
    ]
    assert sorted(wrong) == []


def test_core_needs_torch_only(sources: dict[str, ast.Module]) -> None:
    wrong, checked = [], 0
    for path, tree in sources.items():
        if path.split("/")[0].removesuffix(".py") in TORCH_ONLY:
            checked += 1
            roots = {name.split(".")[0] for name in imports(tree, set())}
            wrong += [
                f"{path}: {name}"
                for name in roots
                - {"torch", "lorakit"}
                - SMALL
                - DOORS.get(path, set())
                - sys.stdlib_module_names
            ]
    assert sorted(wrong) == []
    assert checked >= 10


def test_light_parts_do_not_import_heavy_libraries(sources: dict[str, ast.Module]) -> None:
    wrong, checked = [], 0
    for path, tree in sources.items():
        part = path.split("/")[0].removesuffix(".py")
        if part in NO_TORCH:
            checked += 1
            # A verb may import what it needs when it runs; a configuration never touches torch at all.
            names = imports(tree, set(), top_level=part not in ("config", "modelinfo"))
            wrong += [f"{path}: {name}" for name in names if name.split(".")[0] in HEAVY]
    assert sorted(wrong) == []
    assert checked >= 8
