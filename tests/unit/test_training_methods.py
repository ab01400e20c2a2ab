"""What the configuration's adapter keys do to a run: the right tensors train, with the right rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorakit import add_lora_to_model, train
from lorakit.adapters.attach import rank_allocator
from lorakit.errors import ConfigError, TargetError, UsageError


def _paths(block: str, *names: str) -> list[str]:
    return [f"model.layers.{block}.{name}" for name in names]


MLP = _paths("0.mlp", "down_proj", "up_proj")
V = _paths("0.self_attn", "v_proj") + _paths("1.self_attn", "v_proj")


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"{i}?", "output": f"{i}."}) + "\n" for i in range(8)))
    return {
        "model_name_or_path": str(tiny_llama),
        "dataset": str(rows),
        "output_dir": str(tmp_path / "run"),
        "lora_rank": 4,
        "max_steps": 10,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lora_target": "q_proj,v_proj",
    }


def adapter(settings: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    folder = train(settings).adapter
    return load_file(folder / "adapter_model.safetensors"), json.loads(
        (folder / "adapter_config.json").read_text()
    )


def test_adalora_ends_with_the_target_rank(settings: dict[str, Any]) -> None:
    tensors, config = adapter(settings | {"use_adalora": True, "adalora_target_r": 1})
    E = [tensor for key, tensor in tensors.items() if key.endswith("lora_E")]
    assert len(E) == 4  # two layers, q and v
    assert sum(int((e != 0).sum()) for e in E) == 4 * 1
    assert (config["peft_type"], config["init_r"], config["target_r"], config["total_step"]) == (
        "ADALORA",
        4,
        1,
        10,
    )
    assert (config["tinit"], config["tfinal"]) == (1, 2)


def test_lora_fa_trains_b_alone(settings: dict[str, Any]) -> None:
    short, _ = adapter(settings | {"lora_fa": True, "max_steps": 1, "output_dir": settings["output_dir"] + "1"})
    long, _ = adapter(settings | {"lora_fa": True})
    for key, tensor in long.items():
        assert torch.equal(tensor, short[key]) == ("lora_A" in key), key


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"use_dora": True}, {"use_dora": True}),
        ({"pissa_init": True}, {"r": 8, "lora_alpha": 16}),
        ({"rank_pattern": {"k_proj|v_proj": 2}}, {"rank_pattern": {f"^{p}": 2 for p in V}}),
        ({"additional_target": "norm"}, {"modules_to_save": ["model.norm"]}),
        ({"layers_to_transform": "1"}, {"target_modules": _paths("1.self_attn", "q_proj", "v_proj")}),
        ({"lora_target": r".*0\.mlp\.(up|down)_proj"}, {"target_modules": MLP}),
        ({"exclude_modules": "q_proj"}, {"target_modules": ["v_proj"]}),
    ],
)  # fmt: skip
def test_keys_reach_the_adapter(settings: dict[str, Any], keys: dict[str, Any], found: dict[str, Any]) -> None:
    _, config = adapter(settings | keys | {"max_steps": 2})
    assert {key: config[key] for key in found} == found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_adalora": True, "use_dora": True}, "`use_adalora` and `use_dora` are two methods"),
        ({"use_adalora": True, "lora_fa": True}, "`lora_fa` freezes A"),
        ({"use_adalora": True, "adalora_target_r": 5}, "`adalora_target_r` is more than"),
        ({"use_adalora": True, "loraplus_lr_ratio": 4}, "`loraplus_lr_ratio` is about a B"),
        ({"pissa_init": True, "init_lora_weights": "olora"}, "name two starts"),
    ],
)
def test_contradictions(settings: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(settings | keys)
    assert not Path(settings["output_dir"]).exists()


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ({"init_lora_weights": "xavier"}, ConfigError, "`init_lora_weights` must"),
        ({"rank_pattern": {"k_proj": 2}}, TargetError, "matches none of the adapted modules"),
        ({"layers_to_transform": "7"}, TargetError, "names layer 7"),
        ({"additional_target": "nrom"}, TargetError, "matches no module"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    settings: dict[str, Any], keys: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        train(settings | keys)
    assert not any(Path(settings["output_dir"]).glob("*"))


def test_an_adapter_without_a_schedule_has_no_allocator() -> None:
    model = add_lora_to_model(nn.Sequential(nn.Linear(4, 6)), r=2, method="adalora")
    with pytest.raises(UsageError, match="no rank schedule"):
        rank_allocator(model)
