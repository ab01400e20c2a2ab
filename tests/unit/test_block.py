"""A decoder layer at once computes what its parts compute one by one, and steps aside for what is special."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit import add_lora_to_model
from lorakit.models import fast
from lorakit.models.decoder import by_parts
from lorakit.models.patch import packed
from lorakit.models.quantized import quantize_model
from lorakit.ops import block, native

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
LENGTHS = (37, 1, 50)
FAMILIES = ("llama", "mistral", "qwen2")
ATTENTION = "q_proj,k_proj,v_proj,o_proj"
ALL = f"{ATTENTION},gate_proj,up_proj,down_proj"


@pytest.fixture(autouse=True)
def units() -> None:
    if not native.matrix_units():
        pytest.skip("no matrix units here")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each layer that was computed at once."""
    found: list[int] = []
    real = block.decoder_block

    def counted(*given: Any) -> Tensor | None:
        y = real(*given)
        found.extend([1] if y is not None else [])
        return y

    monkeypatch.setattr(block, "decoder_block", counted)
    return found


def adapted(family: str, targets: str, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0) -> Any:
    """A model and adapters of random numbers, the same rounded numbers in every dtype."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model = model.to(torch.bfloat16).to(dtype)
    model = add_lora_to_model(model, target_modules=targets, r=4, lora_dropout=dropout)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model):
        numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        parameter.data = numbers.float().to(torch.promote_types(torch.float32, dtype))
    return model.train()


def trained(model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def logits_and_slopes(model: Any, **given: Any) -> list[Tensor]:
    """The logits, and the gradients of the layers' input and of all adapters."""
    dtype = model.get_input_embeddings().weight.dtype
    generator = torch.Generator().manual_seed(2)
    total = sum(LENGTHS)
    x = torch.randn(1, total, 64, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
    x.requires_grad_()
    slope = torch.randn(1, total, 97, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    torch.manual_seed(3)  # of dropout
    with packed(model), fast.fast(model, attention=True):
        y = model(inputs_embeds=x, position_ids=positions, segment_lengths=LENGTHS, **given).logits
        grads = torch.autograd.grad(y, [x, *trained(model)], slope)
    return [y.detach().double(), *(grad.double() for grad in grads)]


def off(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [ATTENTION, ALL, "q_proj,v_proj", "o_proj,down_proj"])
def test_is_no_further_from_float64_than_its_parts(family: str, targets: str, calls: list[int]) -> None:
    exact = logits_and_slopes(adapted(family, targets, torch.float64))
    assert not calls
    found = off(logits_and_slopes(adapted(family, targets)), exact)
    assert len(calls) == 2
    with by_parts():
        parts = off(logits_and_slopes(adapted(family, targets)), exact)
    assert len(calls) == 2
    assert statistics.mean(found) <= 1.05 * statistics.mean(parts), (found, parts)
    assert max(found) < 0.03, found


@pytest.mark.parametrize("targets", [ATTENTION, ALL])
def test_masks_are_those_of_the_parts(targets: str, calls: list[int]) -> None:
    """With other masks a third of the numbers would differ by their own size."""
    found = logits_and_slopes(adapted("llama", targets, dropout=0.3))
    assert calls
    with by_parts():
        parts = logits_and_slopes(adapted("llama", targets, dropout=0.3))
    assert max(off(found, parts)) < 0.05


def test_four_bits(calls: list[int]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL), dtype=torch.bfloat16)
    quantize_model(model)
    model = add_lora_to_model(model, target_modules=ATTENTION, r=4).train()
    for parameter in trained(model):
        nn.init.normal_(parameter, 0.0, 0.1)
    found = logits_and_slopes(model)
    assert calls
    with by_parts():
        parts = logits_and_slopes(model)
    assert max(off(found, parts)) < 0.05


def test_the_first_layer_needs_no_gradient_of_its_input(calls: list[int]) -> None:
    model = adapted("llama", ATTENTION)
    ids = torch.arange(1, 1 + sum(LENGTHS))[None] % 97
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]

    def grads() -> list[Tensor]:
        with packed(model), fast.fast(model, attention=True):
            y = model(ids, position_ids=positions, segment_lengths=LENGTHS).logits
            return [grad.double() for grad in torch.autograd.grad(y.float().square().sum(), trained(model))]

    found = grads()
    assert calls
    with by_parts():
        assert max(off(found, grads())) < 0.03


def test_a_frozen_a_gets_no_gradient(calls: list[int]) -> None:
    model = adapted("llama", ALL)
    exact = logits_and_slopes(model)
    all_trained = trained(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    left = [any(parameter is one for one in trained(model)) for parameter in all_trained]
    assert sum(left) == 14
    found = logits_and_slopes(model)
    assert len(calls) == 4
    assert max(off(found, [grad for grad, kept in zip(exact, [True, True, *left], strict=True) if kept])) < 1e-6


SPECIAL: dict[str, Callable[[Any], object]] = {
    "a hook of a linear layer": lambda layer: layer.mlp.up_proj.register_forward_hook(lambda *_: None),
    "a hook of a norm": lambda layer: layer.input_layernorm.register_forward_hook(lambda *_: None),
    "a hook of the attention": lambda layer: layer.self_attn.register_forward_pre_hook(lambda *_: None),
    "a trained norm": lambda layer: layer.post_attention_layernorm.weight.requires_grad_(),
    "a trained weight": lambda layer: layer.mlp.down_proj.weight.requires_grad_(),
}


@pytest.mark.parametrize("what", SPECIAL)
def test_steps_aside(what: str, calls: list[int]) -> None:
    """The other layer is computed at once."""
    model = adapted("llama", ATTENTION)
    SPECIAL[what](model.model.layers[1])
    found = logits_and_slopes(model)
    assert len(calls) == 1
    with by_parts():
        assert max(off(found, logits_and_slopes(model))) < 0.03


def test_recomputed_activations_are_recomputed(calls: list[int]) -> None:
    model = adapted("llama", ATTENTION, dropout=0.3)
    found = logits_and_slopes(model)
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = logits_and_slopes(model)
    assert not calls
    assert max(off(again, found)) < 0.05


def test_adapters_hear_of_the_backward_pass() -> None:
    """Without it they refuse to recompute after a change of route."""
    model = adapted("llama", ATTENTION)
    logits_and_slopes(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer._passes[True].returned
