"""Known families compute the same by ops/ as by transformers' own code, and are as they were afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.evals.objective import batch_loss
from lorakit.models.fast import fast, loss_head
from lorakit.models.patch import PACKABLE, packed
from lorakit.ops import native

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "smollm3",
    "gpt2",
    "gpt_neox",
]
UNKNOWN = {"gpt2", "gpt_neox"}  # stay as they are


def model_of(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    for parameter in model.parameters():  # norms' weights are not all one, biases not all zero
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.to(dtype).eval()


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (9, 23, 14):
        ids = tuple(torch.randint(1, 97, (length,), generator=generator).tolist())
        made.append(Row(ids, (-100,) * 4 + ids[4:]))
    return made


def loss_and_slopes(model: Any, batch: Batch) -> list[torch.Tensor]:
    """The loss and the gradient of the input embedding, which every other one passes on the way."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    loss = batch_loss(model, batch)
    handle.remove()
    assert not weight.requires_grad
    return [loss.detach().double(), torch.autograd.grad(loss, kept[0])[0].double()]


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient(family: str, dtype: torch.dtype) -> None:
    """float32: within 1e-5. bfloat16: no further from float64 than transformers, give or take a fifth."""
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    batch, model = pad(rows(), 0), model_of(family, dtype)
    exact = loss_and_slopes(model_of(family, torch.float64), batch)
    plain = distance(loss_and_slopes(model, batch), exact)
    with fast(model, attention=False):
        assert any("forward" in vars(module) for module in model.modules()) == (family not in UNKNOWN)
        padded = distance(loss_and_slopes(model, batch), exact)
    found = [padded]
    if family in PACKABLE:
        with packed(model), fast(model, attention=True), loss_head(model):
            flat = loss_and_slopes(model, pack(rows()))
        places = [i * 23 + j for i, row in enumerate(rows()) for j in range(len(row.ids))]
        expected = [exact[0], exact[1].flatten(0, 1)[places][None]]
        found.append(distance(flat, expected))
    for each in found:
        limits = [1e-5, 1e-5] if dtype == torch.float32 else [max(1.2 * off, 3e-3) for off in plain]
        assert all(off <= limit for off, limit in zip(each, limits, strict=True)), (each, plain)
    assert not any("forward" in vars(module) for module in model.modules())
