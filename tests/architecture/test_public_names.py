"""The public API: changing this list is a decision, not an accident."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lorakit

PUBLIC_NAMES = [
    "LinearWithLoRA",
    "LoRAConfig",
    "LoRALayer",
    "LoRAManager",
    "__version__",
    "add_lora_to_model",
    "count_parameters",
    "find_optimal_batch_size",
    "freeze_backbone_params",
    "monitor_memory",
    "plan",
    "train",
]


def test_names_are_pinned() -> None:
    assert sorted(lorakit.__all__) == PUBLIC_NAMES
    assert set(PUBLIC_NAMES) <= set(dir(lorakit))


@pytest.mark.parametrize("name", [name for name in PUBLIC_NAMES if name != "__version__"])
def test_name_is_a_documented_class_or_function(name: str) -> None:
    value = vars(lorakit).get(name) or lorakit.__getattr__(name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    assert value.__name__ == name
    assert value.__module__.startswith("lorakit.")
    assert inspect.getdoc(value)


@pytest.mark.parametrize("first", ["from lorakit import train", "import lorakit.training.recipe"])
def test_train_is_the_function_whatever_is_imported_first(first: str) -> None:
    code = f"{first}\nfrom lorakit import train\nprint(callable(train))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "True\n", result.stderr


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'lorakit' has no attribute 'trian'"):
        lorakit.trian  # noqa: B018


def test_version_is_the_package_version() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"] == lorakit.__version__
