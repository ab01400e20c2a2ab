"""Training side by side with PEFT: the same start, data and optimizer give the same weights, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from lorakit.adapters.attach import adapter_layers, attach, rank_allocator
from lorakit.adapters.spec import LoRAConfig
from lorakit.lowrank.budget import RankSchedule, orthogonality

STEPS = 40
TOLERANCE = 1e-4


def network() -> nn.Sequential:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 3)
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(12)
    return [
        (torch.randn(8, 12, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(STEPS)
    ]


def copy_start(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give PEFT's adapter the numbers of ours; the pairs of parameters."""
    pairs = []
    named = dict(theirs.named_parameters())
    for path, layer in adapter_layers(ours).items():
        for name, parameter in layer.adapter("default").named_parameters():
            prefix = f"base_model.model.{path}.{name}.default"
            other = named[prefix] if prefix in named else named[f"{prefix}.weight"]
            other.data.copy_(parameter.data)
            pairs.append((parameter, other))
    return pairs


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}]
)
def test_lora_and_dora(settings: dict[str, Any]) -> None:
    base = network()
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"], **settings)
    )
    attach(base, LoRAConfig(4, 8, **settings), seed=3)
    pairs = copy_start(base, theirs)
    assert len(pairs) == (9 if "use_dora" in settings else 6)
    start = [parameter.detach().clone() for parameter, _ in pairs]
    optimizers = [torch.optim.Adam([pair[i] for pair in pairs], 1e-2) for i in (0, 1)]
    for x, y in batches():
        for model, optimizer in zip((base, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        for ours, other in pairs:
            torch.testing.assert_close(ours, other, rtol=0, atol=TOLERANCE)
    assert min(float((p - s).detach().abs().max()) for (p, _), s in zip(pairs, start, strict=True)) > 0.01


def test_adalora() -> None:
    base = network()
    schedule = RankSchedule(target_r=2, total_step=STEPS, tinit=5, tfinal=10, deltaT=2)
    theirs = get_peft_model(
        copy.deepcopy(base),
        AdaLoraConfig(
            init_r=5, target_r=2, lora_alpha=10, tinit=5, tfinal=10, deltaT=2, total_step=STEPS,
            target_modules=["0", "2", "4"],
        ),
    )  # fmt: skip
    attach(base, LoRAConfig(5, 10, method="adalora", schedule=schedule), seed=3)
    pairs = copy_start(base, theirs)
    assert len(pairs) == 9
    budget = rank_allocator(base)
    ours, other = (torch.optim.Adam([pair[i] for pair in pairs], 1e-2) for i in (0, 1))
    for step, (x, y) in enumerate(batches(), start=1):
        ours.zero_grad()
        loss = nn.functional.mse_loss(base(x), y)
        (loss + schedule.orth_reg_weight * orthogonality(budget.layers.values())).backward()
        ours.step()
        budget.update(step)
        other.zero_grad()
        loss = nn.functional.mse_loss(theirs(x), y)
        (loss + schedule.orth_reg_weight * _orthogonality_of_peft(theirs)).backward()
        other.step()
        theirs.base_model.update_and_allocate(step)
        for mine, his in pairs:
            torch.testing.assert_close(mine, his, rtol=0, atol=TOLERANCE)
    kept = [
        int((layer.adapter("default").get_parameter("lora_E") != 0).sum())
        for layer in adapter_layers(base).values()
    ]
    assert sum(kept) == 3 * schedule.target_r


def _orthogonality_of_peft(model: nn.Module) -> torch.Tensor:
    """What AdaLoraModel.forward adds to the loss of a transformers model, whose output has a ``loss``."""
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.norm(gram - torch.eye(len(gram)), p="fro"))
    return torch.stack(norms).mean()
