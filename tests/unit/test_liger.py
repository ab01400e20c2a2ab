"""Kernels of liger-kernel are put into a model and taken out again; its own code is not part of these tests."""

from __future__ import annotations

import sys
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

from lorakit.errors import UsageError
from lorakit.models.fast import fast
from lorakit.models.liger import liger

NAMES = "liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"


def on(device: str) -> Any:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the package is asked for; this one changes the same places as the real one does."""
    found: list[dict[str, Any]] = []

    def apply(model: Any, **options: Any) -> None:
        found.append(options)
        modeling_llama.apply_rotary_pos_emb = lambda *given: given  # type: ignore[assignment]
        for layer in model.model.layers:
            layer.input_layernorm.casting_mode = "llama"
            layer.input_layernorm.variance_epsilon = 0.5
            layer.mlp.forward = MethodType(lambda self, x: x, layer.mlp)

    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    package: Any = sys.modules[NAMES[-1]]
    monkeypatch.setattr(sys.modules[NAMES[1]], "monkey_patch", package, raising=False)
    package._apply_liger_kernel_to_instance = apply
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    return found


def test_is_put_in_and_taken_out_again(asked: list[dict[str, Any]]) -> None:
    model, rotate = on("meta"), modeling_llama.apply_rotary_pos_emb
    before = {module: dict(vars(module)) for module in model.modules()}
    with liger(model), fast(model, attention=False):
        assert asked == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
        assert modeling_llama.apply_rotary_pos_emb is not rotate
        assert isinstance(model.model.layers[0].mlp.forward, MethodType), "lorakit's own was put over it"
        model.eval()
    assert modeling_llama.apply_rotary_pos_emb is rotate
    for module, own in before.items():
        assert vars(module) == own | {"training": False}


def test_on_a_cpu_nothing_is_changed(asked: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lorakit"), liger(on("cpu")):
        assert not asked
    assert "enable_liger_kernel: the model is on a CPU" in caplog.text


def test_a_family_without_kernels(asked: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    model = on("meta")
    model.config.model_type = "gpt_oddity"
    with caplog.at_level("INFO", logger="lorakit"), liger(model):
        assert not asked
    assert "no kernels for gpt_oddity" in caplog.text


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="enable_liger_kernel") as caught, liger(on("meta")):
        pass
    assert "pip install liger-kernel" in str(caught.value)
