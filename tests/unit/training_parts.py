"""What the tests of the training engine's parts share: a small float64 model, rows, ways to look at weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.data.collate import Batch, pad
from lorakit.data.encode import Row
from lorakit.models.load import load_model
from lorakit.models.sources import locate
from lorakit.ops.loss import IGNORE
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World

NO_CLIP = 1e9


def adapted(folder: Path) -> PreTrainedModel:
    """In float64, with an adapter whose B is not zero, so that A gets gradients, too."""
    model = load_model(locate(str(folder)), precision="fp32").double()
    add_lora_to_model(model, r=4, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in adapter_layers(model).values():
        adapter = layer.adapter("default").double()
        B = adapter.lora_B
        B.data = 0.1 * torch.randn(B.shape, generator=generator, dtype=torch.float64)
    return model.train()


def random_rows(count: int, seed: int = 0) -> list[Row]:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = tuple(rng.randrange(384) for _ in range(rng.randint(3, 20)))
        rows.append(Row(ids, (IGNORE, *(i if rng.random() < 0.6 else IGNORE for i in ids[1:-1]), ids[-1])))
    return rows


def padded(rows: Sequence[Row]) -> Batch:
    return pad(rows, pad_id=2)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def adam(model: nn.Module, rate: float = 0.1) -> Strategy:
    return Strategy(model, torch.optim.AdamW(trainable(model).values(), lr=rate), World())


def sgd(model: nn.Module, rate: float) -> Strategy:
    return Strategy(model, torch.optim.SGD(trainable(model).values(), lr=rate), World())


def a_copy(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model)
