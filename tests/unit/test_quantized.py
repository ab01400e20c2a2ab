"""Quantised models as a whole: made from any PyTorch model, trained on, undone, merged and written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorakit import add_lora_to_model, count_parameters
from lorakit.adapters.attach import adapter_layers
from lorakit.checkpoint.binding import check, fingerprint
from lorakit.config.quantization import Quantization, quantization_from
from lorakit.errors import AdapterMismatchError, ModelError, TargetError, UsageError
from lorakit.models.quantized import (
    dequantize_model,
    kept_as,
    quantization_of,
    quantize_model,
    quantized_for_now,
    requantize_model,
)
from lorakit.quant.modules import QuantLinear


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


class Vision(nn.Module):
    """Patches by convolution, transformer blocks, a head: a small ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        block = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens).mean(1))


MODELS = {
    "layers": (
        lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64, bias=False)),
        lambda: torch.randn(5, 64),
        2,
    ),
    "vision transformer": (Vision, lambda: torch.randn(2, 3, 16, 16), 5),
    "convolutions with a head": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 64)),
        lambda: torch.randn(2, 3, 8, 8),
        1,
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_learns_on_quantised_layers(name: str, bits: int, training: bool) -> None:
    make, inputs, layers = MODELS[name]
    torch.manual_seed(2)
    model, x = seeded(make()).train(training), inputs()
    dense = model(x)
    total = count_parameters(model)["total"]
    assert quantize_model(model, bits) is model
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == layers
    assert count_parameters(model)["total"] == total
    y = model(x)
    assert (y - dense).norm() < (0.5 if bits == 4 else 0.05) * dense.norm()

    add_lora_to_model(model, r=4, target_modules="all", seed=3)
    assert torch.allclose(model(x), y, atol=1e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    target, losses = torch.zeros_like(y), []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()


def test_what_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(Vision())
    caplog.set_level("INFO", "lorakit")
    quantize_model(model, skip=["head", "blocks.layers.1"])
    kept = {path for path, module in model.named_modules() if kept_as(module)}
    assert kept == {"blocks.layers.0.linear1", "blocks.layers.0.linear2"}
    assert "2 linear layers in nf4 with double quantisation" in caplog.text
    assert "MultiheadAttention" in caplog.text
    with pytest.raises(TargetError, match="the model has no module 'tail'"):
        quantize_model(seeded(Vision()), skip=["tail"])
    with pytest.raises(TargetError, match="no linear layer to quantise"):
        quantize_model(nn.Conv2d(3, 3, 1))
    with pytest.raises(UsageError, match="weights cannot be kept in 3 bits"):
        quantize_model(model, 3)  # type: ignore[arg-type]


def test_shared_weights_stay_dense() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in "abc"})
    model["b"].weight = model["a"].weight
    quantize_model(model)
    assert [name for name in "abc" if kept_as(model[name])] == ["c"]


def test_a_weight_that_is_not_finite_leaves_the_model_alone() -> None:
    model = seeded(MODELS["layers"][0]())
    model[2].weight[3, 4] = float("nan")
    before = list(model.modules())
    with pytest.raises(ModelError, match="NaN or infinity"):
        quantize_model(model)
    assert list(model.modules()) == before


def test_for_now() -> None:
    model, x = seeded(MODELS["layers"][0]()), torch.randn(3, 64)
    before, dense = list(model.modules()), model(x)
    with pytest.raises(KeyError), quantized_for_now(model, Quantization()):
        assert quantization_of(model) == Quantization()
        assert not torch.equal(model(x), dense)
        raise KeyError
    assert list(model.modules()) == before
    assert quantization_of(model) is None
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("bits", [4, 8])
def test_dense_again(bits: int) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16)).eval()
    kinds = {path: type(module) for path, module in model.named_modules()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    ids = torch.tensor([[1, 2, 3]])
    expected = quantize_model(model, bits, integer=False)(ids).logits
    dequantize_model(model, torch.float32)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


def adapted(tiny_llama: Path, bits: int = 4) -> nn.Module:
    """A quantised Llama with an adapter that changes much."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    quantize_model(model, bits)  # type: ignore[arg-type]
    add_lora_to_model(model, r=4, target_modules="q_proj,down_proj", use_dora=True, seed=4)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.adapter("default").lora_B, std=0.1)
    return model.eval()


def test_merged_into_dense_weights(tiny_llama: Path) -> None:
    model, ids = adapted(tiny_llama), torch.tensor([[1, 7, 7, 2]])
    with torch.no_grad():
        expected = model(ids).logits
        dequantize_model(model, torch.float32)
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    assert quantization_of(model) is None
    assert not adapter_layers(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("bits", [4, 8])
def test_merged_and_rounded_again(tiny_llama: Path, bits: int) -> None:
    model, ids = adapted(tiny_llama, bits), torch.tensor([[1, 7, 7, 2]])
    with torch.no_grad():
        expected = model(ids).logits
        layers = adapter_layers(model)
        merged = {path: layer.merged_weight() for path, layer in layers.items()}
        changes = {path: merged[path] - layer.dense_weight() for path, layer in layers.items()}
        lost = requantize_model(model)
        errors = {path: model.get_submodule(path).read() - W for path, W in merged.items()}
        gap = (model(ids).logits - expected).abs().max()

    def norm(tensors: dict[str, Tensor]) -> float:
        return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())

    assert lost.weight_error == pytest.approx(norm(errors) / norm(merged), rel=1e-5)
    assert lost.update_error == pytest.approx(norm(errors) / norm(changes), rel=1e-5)
    assert lost.weight_error < (0.15 if bits == 4 else 0.015)
    assert 0 < gap < (5 if bits == 4 else 0.5)
    assert not adapter_layers(model)
    found = quantization_of(model)
    assert found is not None
    assert found.bits == bits


@pytest.mark.parametrize(
    "chosen",
    [
        Quantization(),
        Quantization(kind="fp4", double=False, compute="bf16", method="bitsandbytes", skip=("a", "b.c")),
        Quantization(kind="int8", double=False, threshold=6.0, integer=False),
    ],
)
def test_the_value_in_json(chosen: Quantization) -> None:
    assert quantization_from(chosen.to_dict()) == chosen


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "nf5"), ("kind", ["nf4"]), ("double", 1), ("compute", "fp8"), ("method", None),
        ("threshold", -1), ("threshold", True), ("integer", None), ("skip", "lm_head"), ("skip", [1]),
    ],
)  # fmt: skip
def test_a_value_from_elsewhere(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key} is "):
        quantization_from({**Quantization().to_dict(), key: value})
    with pytest.raises(ValueError, match=f"{key} is None"):
        quantization_from({k: v for k, v in Quantization().to_dict().items() if k != key})


def test_what_an_adapter_remembers_of_a_quantised_base(caplog: pytest.LogCaptureFixture) -> None:
    make = MODELS["layers"][0]
    recorded = fingerprint(quantize_model(seeded(make())))
    assert (recorded["quantised"], recorded["parameters"]) == ("nf4", 64 * 128 * 2 + 128)
    check(recorded, quantize_model(seeded(make())))
    check(recorded, quantize_model(seeded(make())).to(torch.bfloat16))  # the codes stay
    caplog.set_level("INFO", "lorakit")
    for other in (seeded(make()), quantize_model(seeded(make()), 8)):
        caplog.clear()
        check(recorded, other)
        check(fingerprint(other), quantize_model(seeded(make())))
        assert caplog.text.count("one of the bases is quantised, or in another way") == 2
    changed = seeded(make())
    changed[0].weight.mul_(-1)
    with pytest.raises(AdapterMismatchError, match="its weights differ"):
        check(recorded, quantize_model(changed))
    with pytest.raises(AdapterMismatchError, match="its layers differ"):
        check(recorded, quantize_model(seeded(Vision())))
    transposed = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16))
    shapes = fingerprint(transposed)["shapes"]
    assert fingerprint(quantize_model(transposed))["shapes"] == shapes
