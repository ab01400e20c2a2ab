"""`LoRALayer` and `LinearWithLoRA`, as one writes them in a first course, agree with `add_lora_to_model`."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit import LinearWithLoRA, LoRALayer, add_lora_to_model
from lorakit.adapters.attach import adapter_layers
from lorakit.errors import LorakitError


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(layer: LinearWithLoRA) -> LinearWithLoRA:
    """With values in B, which is zero at the start."""
    with torch.no_grad():
        layer.lora.lora_B.copy_(draw(*layer.lora.lora_B.shape, seed=11))
    return layer


def test_the_arguments_and_their_defaults() -> None:
    defaults = {"rank": 8, "alpha": 16}
    for kind, more in ((LoRALayer, {}), (LinearWithLoRA, {"bias": True})):
        parameters = inspect.signature(kind).parameters
        assert list(parameters)[:4] == ["in_features", "out_features", "rank", "alpha"]
        given = {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}
        assert given == defaults | more
    assert list(inspect.signature(LoRALayer.forward).parameters) == ["self", "x", "base_weight", "base_bias"]


def test_the_attributes_of_the_layer() -> None:
    torch.manual_seed(0)
    layer = LoRALayer(400, 300, rank=4, alpha=10)
    assert (layer.rank, layer.alpha, layer.scaling) == (4, 10, 2.5)
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((4, 400), (300, 4))
    assert layer.lora_A.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.lora_B.count_nonzero() == 0
    assert dict(layer.named_parameters()).keys() == {"lora_A", "lora_B"}
    assert LoRALayer(5, 7).scaling == 2.0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_the_layer_adds_its_update_to_a_weight(shape: tuple[int, ...], bias: bool) -> None:
    layer, x, W = LoRALayer(5, 7, rank=2, alpha=6), draw(*shape), draw(7, 5, seed=4)
    b = draw(7, seed=5) if bias else None
    assert torch.allclose(layer(x, W, b), F.linear(x, W, b), rtol=0, atol=1e-6)  # B is zero
    with torch.no_grad():
        layer.lora_B.copy_(draw(7, 2, seed=6))
    update = 3 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer.delta(), update, rtol=0, atol=1e-6)
    assert torch.allclose(layer(x, W, b), F.linear(x, W + update, b), rtol=1e-5, atol=1e-5)
    assert layer(x, W, b).shape == (*shape[:-1], 7)


def test_the_bias_may_be_left_out() -> None:
    layer, x, W = LoRALayer(5, 7), draw(4, 5), draw(7, 5, seed=4)
    assert torch.equal(layer(x, W), layer(x, W, None))
    assert torch.equal(layer(x, base_weight=W, base_bias=None), layer(x, W))


@pytest.mark.parametrize("bias", [True, False])
def test_only_the_update_is_trained(bias: bool) -> None:
    layer = LinearWithLoRA(5, 7, rank=2, bias=bias)
    assert type(layer.base_layer) is nn.Linear
    assert type(layer.lora) is LoRALayer
    assert (layer.base_layer.bias is not None) == bias
    before = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora.lora_A", "lora.lora_B"}
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(draw(4, 5)).square().sum().backward()
        optimizer.step()
    assert layer.lora.delta().abs().sum() > 0.1
    assert all(torch.equal(value, before[name]) for name, value in layer.base_layer.state_dict().items())
    assert all(p.grad is None for p in layer.base_layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_add_lora_to_model(bias: bool) -> None:
    layer = trained(LinearWithLoRA(5, 7, rank=2, alpha=6, bias=bias))
    host = nn.Linear(5, 7, bias=bias)
    host.load_state_dict(layer.base_layer.state_dict())
    model = add_lora_to_model(nn.Sequential(host), r=2, lora_alpha=6)
    adapter = adapter_layers(model)["0"].adapter("default")
    with torch.no_grad():
        adapter.lora_A.copy_(layer.lora.lora_A)
        adapter.lora_B.copy_(layer.lora.lora_B)
    x, grad = draw(2, 3, 5), draw(2, 3, 7, seed=9)
    assert torch.equal(layer(x), model(x))
    layer(x).backward(grad)
    model(x).backward(grad)
    for mine, theirs in ((layer.lora.lora_A, adapter.lora_A), (layer.lora.lora_B, adapter.lora_B)):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-6)
        assert mine.grad.count_nonzero() > 0


@pytest.mark.parametrize("bias", [True, False])
def test_merged_is_a_plain_layer_with_the_same_output(bias: bool) -> None:
    layer = trained(LinearWithLoRA(5, 7, rank=2, alpha=6, bias=bias))
    weight, x = layer.base_layer.weight.clone(), draw(4, 5)
    plain = layer.merged()
    assert type(plain) is nn.Linear
    assert torch.allclose(plain(x), layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(x), layer.base_layer(x), atol=0.1)
    assert torch.equal(layer.base_layer.weight, weight)
    assert plain.weight is not layer.base_layer.weight


def test_wrap_adapts_a_layer_that_exists() -> None:
    host, x = nn.Linear(5, 7), draw(4, 5)
    expected = host(x)
    layer = LinearWithLoRA.wrap(host, rank=3, alpha=12)
    assert layer.base_layer is host
    assert not any(p.requires_grad for p in host.parameters())
    assert (layer.lora.rank, layer.lora.scaling) == (3, 4.0)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-6)
    assert LinearWithLoRA.wrap(nn.Linear(5, 7, bias=False)).merged().bias is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_wrap_computes_in_the_number_format_of_the_layer(dtype: torch.dtype) -> None:
    layer = trained(LinearWithLoRA.wrap(nn.Linear(5, 7, dtype=dtype), rank=2))
    x = draw(4, 5).to(dtype)
    assert layer(x).dtype == layer.merged().weight.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 0.1
    assert torch.allclose(layer(x), layer.merged()(x), rtol=tolerance, atol=tolerance)


def test_a_saved_layer_loads_into_another() -> None:
    layer, other = trained(LinearWithLoRA(5, 7, rank=2)), LinearWithLoRA(5, 7, rank=2)
    names = {"base_layer.weight", "base_layer.bias", "lora.lora_A", "lora.lora_B"}
    assert layer.state_dict().keys() == names
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(draw(4, 5)), other(draw(4, 5)))


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_of_zero_is_an_error(rank: int) -> None:
    with pytest.raises((LorakitError, ValueError, ArithmeticError, RuntimeError)):
        LoRALayer(5, 7, rank=rank)
