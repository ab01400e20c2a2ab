"""New adapters out of attached ones: combinations are sums, plain LoRA answers as what it was made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import LoRAConfig, LoRAManager, add_lora_to_model
from lorakit.adapters.attach import adapter_layers
from lorakit.errors import LorakitError, TargetError, UsageError


def network(**settings: Any) -> nn.Sequential:
    """Two linear layers and a convolution in between, with the adapters law and med on some of them."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 8), nn.Conv1d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(32, 5))
    add_lora_to_model(model, r=3, target_modules="0,1", adapter_name="law", seed=1, **settings)
    LoRAManager(model).add_adapter("med", LoRAConfig(r=2, target_modules="0,3", use_rslora=True), seed=2)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for parameter in layer.trainable():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def run(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[3](model[2](model[1](model[0](x)[:, None])))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(5))


def test_cat_is_the_sum_over_all_layers(x: Tensor) -> None:
    model = network()
    manager = LoRAManager(model)
    manager.set_adapter(["law", "med"])
    wanted = run(model, x)
    assert manager.combine_adapters(["law", "med"], [1.0, 1.0], "both") == 0.0
    torch.testing.assert_close(run(model, x), wanted, rtol=1e-5, atol=1e-5)
    ranks = {path: layer.adapter("both").rank for path, layer in adapter_layers(model, "both").items()}
    assert ranks == {"0": 5, "1": 3, "3": 2}
    assert manager.adapter_names == ("law", "med", "both")


def test_weights_scale_the_update(x: Tensor) -> None:
    model = network()
    base = [layer.merged_weight(()) for layer in adapter_layers(model).values()]
    law = [layer.merged_weight(layer.present(("law",))) for layer in adapter_layers(model).values()]
    LoRAManager(model).combine_adapters(["law"], [-0.5], "less")
    less = [layer.merged_weight(layer.present(("less",))) for layer in adapter_layers(model).values()]
    for W, with_law, with_less in zip(base, law, less, strict=True):
        torch.testing.assert_close(with_less - W, -0.5 * (with_law - W), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["svd", "ties", "dare", "dare_ties"])
def test_dense_rules_say_what_cutting_the_rank_cost(rule: Any) -> None:
    manager = LoRAManager(network())
    few = manager.combine_adapters(["law", "med"], [0.5, 0.5], "few", rule, r=1, density=0.9, seed=4)
    many = manager.combine_adapters(["law", "med"], [0.5, 0.5], "many", rule, r=5, density=0.9, seed=4)
    assert few > many >= 0
    assert all(layer.adapter("few").rank == 1 for layer in adapter_layers(manager.model, "few").values())


@pytest.mark.parametrize(
    "settings", [{"method": "adalora"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_anything_additive_becomes_plain_lora(settings: dict[str, Any], x: Tensor) -> None:
    model = network(**settings)
    manager = LoRAManager(model)
    layer = adapter_layers(model)["0"]
    if "method" in settings:
        with torch.no_grad():
            layer.adapter("law").get_parameter("lora_E")[1] = 0  # a rank that AdaLoRA removed
    manager.set_adapter("law")
    wanted = run(model, x)
    manager.combine_adapters(["law"], [1.0], "plain")
    torch.testing.assert_close(run(model, x), wanted, rtol=1e-5, atol=1e-5)
    assert layer.adapter("plain").method.name == "lora" and layer.adapter("plain").anchor_A is None
    assert layer.adapter("plain").rank == (2 if "method" in settings else 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["law", "med"], [1.0], "new"), "2 adapters and 1 weights"),
        (([], [], "new"), "0 adapters and 0 weights"),
        ((["law", "tax"], [1.0, 1.0], "new"), "there is no adapter called 'tax'"),
        ((["law"], [1.0], "new", "average"), "unknown rule 'average'"),
        ((["law", "med"], [1.0, 1.0], "new", "linear"), "adapters of the ranks 3, 2"),
        ((["law"], [float("nan")], "new"), ""),
    ],
)
def test_what_cannot_be_combined(arguments: tuple[Any, ...], message: str) -> None:
    manager = LoRAManager(network())
    with pytest.raises(UsageError) as caught:
        manager.combine_adapters(*arguments)
    assert message in str(caught.value)
    assert manager.adapter_names == ("law", "med")


def test_dora_groups_and_whole_modules_are_refused() -> None:
    with pytest.raises(UsageError, match="DoRA"):
        LoRAManager(network(use_dora=True)).combine_adapters(["law"], [1.0], "new")
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Linear(4, 4))
    add_lora_to_model(model, r=2, target_modules="0")
    with pytest.raises(TargetError, match="groups"):
        LoRAManager(model).combine_adapters(["default"], [1.0], "new")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora_to_model(model, r=2, target_modules="0", modules_to_save="1")
    with pytest.raises(LorakitError, match="whole modules"):
        LoRAManager(model).combine_adapters(["default"], [1.0], "new")
