"""Hosts: the shapes of A and B on every kind of layer, what a layer refuses, and what stays silent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import LinearFP4, LinearNF4
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.adapters.hosts import HOSTS, host_for, host_of
from lorakit.errors import TargetError
from lorakit.quant.blockwise import FourBit
from lorakit.quant.int8 import Int8
from lorakit.quant.interop import bitsandbytes_linear
from lorakit.quant.modules import quantized

SHAPES: list[tuple[nn.Module, int, tuple[int, ...], tuple[int, ...]]] = [
    (nn.Linear(6, 10), 4, (4, 6), (10, 4)),
    (nn.Linear(1, 1), 3, (3, 1), (1, 3)),
    (Conv1D(10, 6), 4, (4, 6), (10, 4)),
    (nn.Embedding(12, 10), 4, (4, 12), (10, 4)),
    (nn.Conv1d(4, 8, 3), 4, (4, 4, 3), (8, 4, 1)),
    (nn.Conv2d(4, 8, (3, 2)), 4, (4, 4, 3, 2), (8, 4, 1, 1)),
    (nn.Conv2d(4, 8, 3, groups=2), 4, (4, 2, 3, 3), (8, 2, 1, 1)),
    (nn.Conv2d(8, 8, 3, groups=8), 8, (8, 1, 3, 3), (8, 1, 1, 1)),
    (nn.Conv3d(4, 8, 2), 2, (2, 4, 2, 2, 2), (8, 2, 1, 1, 1)),
]
QUANTISED: list[nn.Module] = [
    quantized(nn.Linear(64, 10), FourBit()),
    *(bitsandbytes_linear(quantized(nn.Linear(64, 10), form)) for form in (FourBit("fp4"), Int8())),
    LinearNF4(64, 10).to("cpu"),
    LinearFP4(64, 10).to("cpu"),
]


@pytest.mark.parametrize(("module", "r", "A", "B"), SHAPES)
def test_shapes(module: nn.Module, r: int, A: tuple[int, ...], B: tuple[int, ...]) -> None:
    host = host_of(module, "it", r)
    assert host.shapes(module, r) == (A, B)
    delta = host.delta(torch.randn(A), torch.randn(B), module.weight)
    assert delta.shape == module.weight.shape
    matrix = host.matrix(module.weight)
    assert matrix.shape[0] == B[0]
    assert matrix.data_ptr() == module.weight.data_ptr()  # a view, not a copy
    assert torch.equal(host.like_weight(matrix, module.weight), module.weight)


@pytest.mark.parametrize("module", QUANTISED)
def test_a_quantised_layer_has_the_shapes_of_the_dense_one(module: nn.Module) -> None:
    assert host_of(module, "it", 4).shapes(module, 4) == ((4, 64), (10, 4))


def test_every_host_is_tried() -> None:
    assert {type(host_for(module)) for module, *_ in SHAPES} == {type(host) for host in HOSTS.values()}
    kinds = {f"{type(m).__module__}.{type(m).__qualname__}" for m in [*QUANTISED, *(m for m, *_ in SHAPES)]}
    assert kinds == set(HOSTS)


@pytest.mark.parametrize(
    ("module", "r", "message"),
    [
        (
            nn.LayerNorm(4),
            2,
            r"module it: a LayerNorm cannot carry an adapter\nsupported layers: Linear, Conv1D",
        ),
        (nn.ConvTranspose2d(4, 4, 2), 2, "a ConvTranspose2d cannot carry an adapter"),
        (nn.EmbeddingBag(4, 4), 2, "a EmbeddingBag cannot carry an adapter"),
        (nn.Bilinear(2, 2, 2), 2, "its experts are stacked|a Bilinear cannot carry an adapter"),
        (nn.Conv2d(6, 6, 1, groups=3), 4, "rank 4 does not divide by its 3 groups: take 6"),
        (nn.Conv1d(8, 8, 1, groups=8), 4, "rank 4 does not divide by its 8 groups: take 8"),
        (nn.Embedding(4, 4, max_norm=2.0), 2, "its max_norm changes the weight as it runs"),
    ],
)
def test_refusals(module: nn.Module, r: int, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        host_of(module, "it", r)


@pytest.mark.parametrize(
    "settings", [{}, {"method": "adalora"}, {"method": "dora"}, {"init_lora_weights": "pissa"}]
)
def test_the_padding_token_stays_what_it_is(settings: dict[str, Any]) -> None:
    """As in `nn.Embedding`: no gradient reaches its vector, and training does not move it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 6, padding_idx=3))
    add_lora_to_model(model, r=2, target_modules="0", seed=0, **settings)
    ids = torch.tensor([[3, 1, 3, 0]])
    target = torch.randn(1, 4, 6)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    before = model(ids)
    for _ in range(8):
        optimizer.zero_grad()
        (model(ids) - target).square().sum().backward()
        optimizer.step()
    after = model(ids)
    assert not after[0, 0].any()
    assert not after[0, 2].any()
    assert (after[0, 1] - before[0, 1]).abs().max() > 0.01
    merged = adapter_layers(model)["0"].merged_weight()
    assert not merged[3].any()
