"""Architectures × targets × methods: attach, train a step, merge, save and load on models as they are.

The models are those of torch and transformers at toy sizes with random weights; parameter counts are taken at
the real sizes, on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.attach import adapter_layers, add_lora_to_model, count_parameters, detach, merge, unmerge
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.errors import TargetError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 32}


class Residual(nn.Module):
    """A block of a ResNet: convolutions, batch norms, a shortcut with a stride."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))


def resnet() -> nn.Module:
    return nn.Sequential(Residual(4, 8), Residual(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in SMALL.items() if key not in {"vocab_size", "max_position_embeddings"}}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, tie_word_embeddings=True, **SMALL))


def images(size: int, channels: int) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


# name → model, input, how many layers "all" takes, other targets with how many they are
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int, dict[str, int]]] = {
    "mlp": (mlp, lambda: images(3, 8)[..., 0, 0], 3, {"0,4": 2}),
    "resnet": (resnet, lambda: images(8, 4), 1, {"conv1,conv2,shortcut,4": 7, r".*\.conv\d": 4}),
    "vit": (vit, lambda: images(8, 3), 13, {"q_proj,v_proj": 4, "projection": 1}),
    "bert": (bert, lambda: IDS, 14, {"query,value": 4, "word_embeddings,dense": 8}),
    "gpt2": (gpt2, lambda: IDS, 8, {"c_attn": 2, "wte,c_fc,lm_head": 4}),
    "llama": (llama, lambda: IDS, 14, {"q_proj,v_proj": 4, "embed_tokens": 1, "lm_head": 1}),
}
CASES = [
    (name, targets, method)
    for name, (_, _, every, others) in MODELS.items()
    for targets in ("all", *others)
    for method in ("lora", "dora", "adalora")
]


def make(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]().eval()


def output(model: nn.Module, x: Tensor) -> Tensor:
    found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 45


@pytest.mark.parametrize(("name", "targets", "method"), CASES)
def test_its_whole_life(name: str, targets: str, method: Any, tmp_path: Path) -> None:
    _, x, every, others = MODELS[name]
    model, inputs = make(name), x()
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    before = output(model, inputs)
    if method == "adalora" and name == "resnet" and "conv" in targets:
        with pytest.raises(TargetError, match="AdaLoRA needs a whole matrix, this Conv2d has 2 groups"):
            add_lora_to_model(model, r=2, target_modules=targets, method=method)
        return
    add_lora_to_model(model, r=2, target_modules=targets, method=method, seed=1)
    layers = adapter_layers(model)
    assert len(layers) == (every if targets == "all" else others[targets])
    assert (output(model, inputs) - before).abs().max() <= 1e-6

    frozen = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    wanted = torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    for _ in range(3):  # the first step moves B alone, where it starts at zero
        optimizer.zero_grad()
        (output(model, inputs) - wanted).square().mean().backward()
        optimizer.step()
    trained = output(model, inputs)
    assert (trained - wanted).square().mean() < (before - wanted).square().mean()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    for path, layer in layers.items():
        assert any(p.grad.any() for p in layer.adapter("default").trainable()), path

    for file in ("adapter", "adapter.pth"):
        again = make(name)
        load_adapter(again, save_adapter(model, tmp_path / file))
        assert torch.equal(output(again, inputs), trained)
    merge(model)
    torch.testing.assert_close(output(model, inputs), trained, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    unmerge(model)
    assert torch.equal(output(model, inputs), trained)
    detach(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(output(model, inputs), before)


def test_a_fused_projection_is_one_matrix() -> None:
    """GPT-2's c_attn makes query, key and value at once: one adapter with three times the outputs."""
    model = add_lora_to_model(make("gpt2"), r=2, target_modules="c_attn")
    adapter = adapter_layers(model)["transformer.h.0.attn.c_attn"].adapter("default")
    assert (tuple(adapter.lora_A.shape), tuple(adapter.lora_B.shape)) == ((2, 16), (48, 2))


# ------------------------------------------------------------------------------------------------- counts

SIZES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
TOTALS = {"llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248}
ATTENTION = "q_proj,k_proj,v_proj,o_proj"


@pytest.fixture(scope="module")
def at_full_size() -> dict[str, nn.Module]:
    """Their shapes without memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return {
            name: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **sizes))
            for name, sizes in SIZES.items()
        }


@pytest.mark.parametrize(
    ("name", "targets", "trainable"),
    [
        ("llama-2-7b", "q_proj,v_proj", 4_194_304),
        ("llama-2-7b", ATTENTION, 8_388_608),
        ("llama-2-7b", "all", 19_988_480),
        ("llama-3-8b", "q_proj,v_proj", 3_407_872),
        ("llama-3-8b", ATTENTION, 6_815_744),
        ("llama-3-8b", f"{ATTENTION},gate_proj,up_proj,down_proj", 20_971_520),
    ],
)
def test_counts_at_full_size(
    at_full_size: dict[str, nn.Module], name: str, targets: str, trainable: int
) -> None:
    model = at_full_size[name]
    assert count_parameters(model)["total"] == TOTALS[name]
    add_lora_to_model(model, r=8, target_modules=targets)
    counted = count_parameters(model)
    detach(model)
    assert (counted["trainable"], counted["total"]) == (trainable, TOTALS[name] + trainable)
