"""`LoRAConfig`: both spellings, defaults, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lorakit.adapters.spec import LoRAConfig, check_adapter_name, parse_targets
from lorakit.errors import UsageError


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
