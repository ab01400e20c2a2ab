"""`LoRAConfig`: both spellings, defaults, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorakit.adapters.spec import LoRAConfig, check_adapter_name, parse_targets
from lorakit.errors import UsageError
from lorakit.lowrank.budget import RankSchedule


def test_defaults() -> None:
    config = LoRAConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16.0, 0.0)
    assert (config.target_modules, config.use_rslora, config.init_lora_weights) == ("all", False, "kaiming")
    assert LoRAConfig(r=5).lora_alpha == 10.0


def test_both_spellings_are_one_setting() -> None:
    config = LoRAConfig(rank=4, alpha=6)
    assert config == LoRAConfig(r=4, lora_alpha=6.0) == LoRAConfig(4, 6, rank=4, alpha=6)
    assert (config.rank, config.alpha) == (4, 6.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4, "rank": 8}, "r=4 and rank=8 mean the same and differ"),
        ({"lora_alpha": 4, "alpha": 8}, "lora_alpha=4 and alpha=8 mean the same and differ"),
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": -1}, "r must be a whole number of at least 1, not -1"),
        ({"r": 8.0}, "r must be a whole number of at least 1, not 8.0"),
        ({"r": True}, "r must be a whole number of at least 1, not True"),
        ({"r": "8"}, "r must be a whole number of at least 1, not '8'"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number, not 0"),
        ({"lora_alpha": -2.0}, "lora_alpha must be a positive number, not -2.0"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a positive number, not nan"),
        ({"lora_alpha": math.inf}, "lora_alpha must be a positive number, not inf"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a positive number, not 1000"),
        ({"lora_alpha": "16"}, "lora_alpha must be a positive number, not '16'"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, not 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout must be at least 0 and below 1, not -0.1"),
        ({"lora_dropout": math.nan}, "lora_dropout must be at least 0 and below 1, not nan"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false, not 'yes'"),
        ({"init_lora_weights": "xavier"}, "unknown initialiser 'xavier'\nchoose one of kaiming, gaussian"),
        ({"method": "lora+"}, "unknown method 'lora+'\nchoose lora, dora, adalora"),
        ({"method": "adalora", "use_dora": True}, "use_dora and method adalora exclude each other"),
        ({"method": "adalora", "use_rslora": True}, "AdaLoRA has its own use_rslora"),
        ({"method": "adalora", "lora_fa": True}, "AdaLoRA has its own lora_fa"),
        ({"method": "adalora", "init_lora_weights": "pissa"}, "AdaLoRA has its own init_lora_weights"),
        ({"schedule": RankSchedule(target_r=4, total_step=9)}, "a rank schedule belongs to method adalora"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "the orthogonal start needs an even rank"),
        ({"rank_pattern": {"q": 3}, "init_lora_weights": "orthogonal"}, "the orthogonal start needs an even"),
        ({"init_lora_weights": "pissa_niter_"}, "unknown initialiser 'pissa_niter_'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern[q_proj] must be a whole number of at least 1, not 0"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern[q_proj] must be a positive number, not -1"),
        ({"rank_pattern": {1: 2}}, "rank_pattern must map module names to numbers"),
        ({"layers_to_transform": "0-"}, "layers_to_transform cannot be '0-'\nwrite numbers such as [0, 1]"),
        ({"layers_to_transform": [-1]}, "layers_to_transform cannot be [-1]"),
        ({"layers_to_transform": [True]}, "layers_to_transform cannot be [True]"),
        ({"layers_to_transform": []}, "layers_to_transform names no layer"),
        ({"layers_to_transform": "0-99999999999"}, "layers_to_transform cannot be '0-99999999999'"),
        ({"exclude_modules": [1]}, "exclude_modules must hold names, not [1]"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": " , "}, "target_modules is empty"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        LoRAConfig(**settings)
    assert str(caught.value).startswith(message)


def test_scaling() -> None:
    assert LoRAConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoRAConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("all", "all"),
        (["all"], "all"),
        ("q_proj", ("q_proj",)),
        ("q_proj, v_proj,q_proj,", ("q_proj", "v_proj")),
        (("q_proj", " v_proj "), ("q_proj", "v_proj")),
    ],
)
def test_targets_are_a_list_or_a_comma_string(given: Any, parsed: Any) -> None:
    assert parse_targets(given) == parsed


@pytest.mark.parametrize("name", ["default", "law", "v1_2-b", "0", "a" * 64])
def test_adapter_names(name: str) -> None:
    assert check_adapter_name(name) == name


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (None, None),
        (5, (5,)),
        ("5", (5,)),
        ([1, 0, 1], (0, 1)),
        ("0-3,8", (0, 1, 2, 3, 8)),
        (" 2 - 3 ", (2, 3)),
    ],
)
def test_layers_are_numbers_or_ranges(given: Any, layers: tuple[int, ...] | None) -> None:
    assert LoRAConfig(layers_to_transform=given).layers_to_transform == layers


def test_patterns_the_first_match_counts() -> None:
    config = LoRAConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"layers.0.q_proj": 2, "q_proj": 4, r"layers\.[2-3]\..*": 32},
        alpha_pattern={"^a.v_proj": 6, "v_proj": 3},
    )
    paths = ("m.layers.0.q_proj", "m.layers.1.q_proj", "m.layers.2.v_proj", "m.xq_proj", "layers.3.up")
    assert [config.rank_at(path) for path in paths] == [2, 4, 32, 8, 32]
    assert [config.alpha_at(path) for path in ("a.v_proj", "b.a.v_proj", "q_proj")] == [6.0, 3.0, 16.0]
    assert config.scaling_at("layers.0.q_proj") == 16 / math.sqrt(2)


def test_adalora_keeps_the_scaling_of_its_first_rank() -> None:
    config = LoRAConfig(r=8, lora_alpha=4, method="adalora", rank_pattern={"q_proj": 2})
    assert (config.scaling_at("q_proj"), config.scaling_at("v_proj")) == (0.5, 0.5)


def test_use_dora_is_the_method() -> None:
    assert LoRAConfig(use_dora=True) == LoRAConfig(method="dora")


def test_a_config_is_a_value() -> None:
    config = LoRAConfig(rank_pattern={"q": 2}, modules_to_save="head, embed")
    assert config.modules_to_save == ("head", "embed")
    assert hash(config) == hash(LoRAConfig(rank_pattern=(("q", 2),), modules_to_save=["head", "embed"]))
    with pytest.raises(AttributeError):
        config.r = 4  # type: ignore[misc]
