"""The keys about quantisation: every spelling, what is worked out, what is warned of and refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lorakit import hardware
from lorakit.config.load import load, load_mapping
from lorakit.config.quantization import Quantization
from lorakit.config.resolve import Resolved, resolve
from lorakit.errors import ConfigError

BASE = {"model_name_or_path": "smollm2-135m-instruct", "dataset": "d.jsonl", "output_dir": "o"}


def resolved(**keys: Any) -> Resolved:
    return resolve(load_mapping({**BASE, **keys}, Path("/")))


@pytest.fixture(autouse=True)
def a_cpu_with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "supports", lambda precision: precision != "fp16")
    monkeypatch.setattr(hardware, "best_precision", lambda: "bf16")
    monkeypatch.setattr(hardware, "device", lambda: "cpu")


NF4 = Quantization(compute="bf16")
INT8 = Quantization(kind="int8", double=False, compute="bf16")
SPELLINGS: list[tuple[dict[str, Any], Quantization | None]] = [
    ({}, None),
    ({"use_qlora": False, "load_in_4bit": False, "quantization_bit": None}, None),
    ({"quantization_bit": 4}, NF4),
    ({"use_qlora": True}, NF4),
    ({"load_in_4bit": True, "load_in_8bit": False}, NF4),
    ({"load_in_4bit": True, "quantization_bit": 4, "use_qlora": True}, NF4),
    ({"quantization_bit": 8}, INT8),
    ({"load_in_8bit": True, "double_quantization": False}, INT8),
    (
        {"quantization_bit": 4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        Quantization(kind="fp4", double=False, compute="bf16"),
    ),
    (
        {"quantization_bit": 4, "quantization_method": "native", "bf16": False},
        Quantization(compute="fp32"),
    ),
    (
        {
            "quantization_bit": 4,
            "bnb_4bit_compute_dtype": "float32",
            "llm_int8_skip_modules": "lm_head, up_proj",
        },
        Quantization(compute="fp32", skip=("lm_head", "up_proj")),
    ),
    (
        {"quantization_bit": 8, "llm_int8_threshold": 6.0, "int8_compute": False},
        Quantization(kind="int8", double=False, compute="bf16", threshold=6.0, integer=False),
    ),
]


@pytest.mark.parametrize(("keys", "expected"), SPELLINGS)
def test_spellings(keys: dict[str, Any], expected: Quantization | None, tmp_path: Path) -> None:
    run = resolved(**keys)
    assert run.quantization == expected
    assert run.quantization_bit == (expected and expected.bits)
    assert run.warnings == ()
    (tmp_path / "again.yaml").write_text(run.to_yaml())
    assert resolve(load(tmp_path / "again.yaml")).quantization == expected


@pytest.mark.parametrize("name", ["bnb", "bitsandbytes"])
def test_bitsandbytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    run = resolved(quantization_bit=4, quantization_method=name)
    assert run.quantization == Quantization(compute="bf16", method="bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs a package that is not installed") as caught:
        resolved(quantization_bit=4, quantization_method=name)
    assert "pip install bitsandbytes" in caught.value.render()


def test_float16_on_a_cpu_is_bf16_with_a_note() -> None:
    run = resolved(quantization_bit=4, bnb_4bit_compute_dtype="float16")
    assert run.quantization == NF4
    assert run.bnb_4bit_compute_dtype == "bfloat16"
    (warning,) = run.warnings
    assert "`bnb_4bit_compute_dtype: float16` is not used, as this cpu has no such arithmetic" in warning


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization_type": "nf4"}, {"bnb_4bit_use_double_quant": True}, {"llm_int8_threshold": 6.0},
        {"bnb_4bit_compute_dtype": "bfloat16"}, {"quantization_method": "bnb"}, {"int8_compute": True},
        {"llm_int8_skip_modules": ["lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_keys_without_effect_are_told(keys: dict[str, Any]) -> None:
    run = resolved(**keys)
    assert run.quantization is None
    (warning,) = run.warnings
    assert "has no effect, as the base is not quantised: add `quantization_bit: 4`" in warning


@pytest.mark.parametrize(
    "keys",
    [
        {"load_in_4bit": True, "load_in_8bit": True}, {"use_qlora": True, "quantization_bit": 8},
        {"quantization_bit": 8, "quantization_type": "nf4"},
        {"load_in_8bit": True, "double_quantization": True},
        {"quantization_bit": 4, "llm_int8_threshold": 6.0}, {"use_qlora": True, "int8_compute": True},
        {"init_lora_weights": "loftq"}, {"quantization_bit": 2}, {"quantization_bit": True},
        {"quantization_bit": 8, "int8_compute": False, "quantization_method": "bnb"},
        {"quantization_bit": 4, "quantization_device_map": "sequential"},
    ],
    ids=str,
)  # fmt: skip
def test_contradictions(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(**keys)
    assert len(caught.value.problems) == 1
