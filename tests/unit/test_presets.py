"""Presets, strengths in terms of the rank, sets of layers: what they say, what wins over them, who is told."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from lorakit.cli.main import main
from lorakit.config.load import load, load_mapping
from lorakit.config.names import AlphaMode, PresetName
from lorakit.config.presets import ALPHA_MODES, GUIDES, PRESETS, TARGET_SETS, find_preset
from lorakit.config.resolve import Resolved, resolve
from lorakit.errors import ConfigError, UsageError
from lorakit.modelinfo.architectures import facts_of
from lorakit.modelinfo.facts import ModelFacts
from lorakit.modelinfo.table import known_configs
from lorakit.patterns import matching
from lorakit.planning.memory import memory
from lorakit.planning.setup import setup_of

OWN: dict[str, Any] = {"model_name_or_path": "gpt2", "dataset": "rows.jsonl", "output_dir": "run"}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")

# The guides' own values, read off once more: preset → (rank, alpha, rate or None, epochs or None).
CORE = {
    "gpu-16gb": (8, 16, 1e-4, 3), "gpu-24gb": (16, 32, 2e-4, 3), "gpu-80gb": (64, 128, 1e-4, 3),
    "instructions": (64, 128, None, None), "code": (32, 64, None, None), "summaries": (16, 32, None, None),
    "vision": (8, 16, 1e-4, 10), "vision-small": (4, 16, 5e-5, 10), "vision-best": (16, 32, 5e-5, 20),
    "classic": (8, 16, 2e-4, 3),
}  # fmt: skip


def resolved(**values: Any) -> Resolved:
    return resolve(load_mapping({**OWN, **values}, Path("/base")))


def test_names_are_those_of_the_schema() -> None:
    assert tuple(PRESETS) == get_args(PresetName)
    assert tuple(ALPHA_MODES) == get_args(AlphaMode)
    assert {preset.source[:2] for preset in PRESETS.values()} <= GUIDES.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_r01_to_r10(name: str) -> None:
    rank, alpha, rate, epochs = CORE[name]
    found = resolved(preset=name)
    assert (found.lora_rank, found.lora_alpha) == (rank, alpha)
    assert found.learning_rate == (rate or 1e-4)
    assert found.num_train_epochs == (epochs or 3)
    for key in PRESETS[name].values:
        assert found.origins[key].startswith(f"preset {name}"), key
    assert found.preset is None  # what it said has become keys: the file that a run leaves needs no preset
    again = load_mapping({**OWN, **{key: dict(found)[key] for key in PRESETS[name].values}}, Path("/base"))
    assert {k: dict(resolve(again))[k] for k in PRESETS[name].values} == {
        k: dict(found)[k] for k in PRESETS[name].values
    }


def test_r01_to_r03_in_full() -> None:
    course = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "logging_steps": 10}
    expected: dict[str, dict[str, Any]] = {
        "gpu-16gb": {"quantization_bit": 4, "lora_dropout": 0.1, "cutoff_len": 1024, "effective_batch": 8,
                     "per_device_train_batch_size": 1, "gradient_checkpointing": True, "save_steps": 500},
        "gpu-24gb": {"quantization_bit": None, "lora_dropout": 0.05, "cutoff_len": 2048, "effective_batch": 8,
                     "per_device_train_batch_size": 2, "gradient_checkpointing": True, "save_steps": 500},
        "gpu-80gb": {"quantization_bit": None, "lora_dropout": 0.05, "cutoff_len": 4096, "effective_batch": 8,
                     "per_device_train_batch_size": 4, "gradient_checkpointing": True, "save_steps": 200,
                     "use_rslora": True, "use_dora": True},
    }  # fmt: skip
    for name, values in expected.items():
        found = dict(resolved(preset=name))
        assert {key: found[key] for key in (*values, *course)} == {**values, **course}


def test_own_keys_and_the_command_line_win(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("preset: gpu-24gb\nlora_rank: 4\n" + "".join(f"{k}: {v}\n" for k, v in OWN.items()))
    found = resolve(load(path, ["learning_rate=3e-4"]))
    assert (found.lora_rank, found.lora_alpha, found.learning_rate, found.lora_dropout) == (4, 8, 3e-4, 0.05)
    origins = {k: found.origins[k] for k in ("lora_rank", "lora_alpha", "learning_rate", "lora_dropout")}
    assert origins == {
        "lora_rank": "c.yaml:2", "lora_alpha": "preset gpu-24gb: 2r", "learning_rate": "command line",
        "lora_dropout": "preset gpu-24gb",
    }  # fmt: skip
    assert resolve(load(path, ["preset=gpu-80gb"])).use_dora
    again = tmp_path / "again.yaml"
    again.write_text(found.to_yaml())
    assert dict(resolve(load(again))) | {"origins": 0} == dict(found) | {"origins": 0}


def test_an_alias_is_an_own_key() -> None:
    assert resolved(preset="gpu-16gb", bnb_4bit_quant_type="fp4").quantization_type == "fp4"
    assert resolved(preset="gpu-16gb", use_qlora=True).quantization_bit == 4


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean `gpu-16gb`"):
        resolved(preset="gpu-16bg")
    with pytest.raises(UsageError, match="did you mean summaries"):
        find_preset("summary")
    with pytest.raises(ConfigError, match="`preset` must be one of the allowed values, not 3"):
        resolved(preset=3)


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        ({"warmup_steps": 5}, ("preset gpu-16gb", "warmup_ratio: 0.1", "`warmup_ratio: 0.0` undoes")),
        ({"load_in_8bit": True}, ("quantization_bit: 4", "`quantization_bit: null` undoes")),
        ({"disable_gradient_checkpointing": True}, ("gradient_checkpointing: true",
                                                    "`gradient_checkpointing: false` undoes")),
    ],
)  # fmt: skip
def test_contradictions_name_both_origins(own: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(preset="gpu-16gb", **own)
    text = caught.value.render()
    for part in (*parts, next(iter(own))):
        assert part in text
    undone: dict[str, dict[str, Any]] = {
        "warmup_steps": {"warmup_ratio": 0.0}, "load_in_8bit": {"quantization_bit": None},
        "disable_gradient_checkpointing": {"gradient_checkpointing": False},
    }  # fmt: skip
    found = resolved(preset="gpu-16gb", **own, **undone[next(iter(own))])
    assert found.lora_dropout == 0.1


def test_alpha_in_terms_of_the_rank() -> None:
    rng = random.Random(5)
    for mode, times in (("r", 1), ("2r", 2), ("4r", 4)):
        rank = rng.randint(1, 300)
        found = resolved(lora_rank=rank, lora_alpha=mode)
        assert found.lora_alpha == times * rank
        assert found.origins["lora_alpha"].endswith(f": {mode}")
    with pytest.raises(ConfigError, match="a number above 0 or one of the allowed values"):
        resolved(lora_alpha="3r")


def selected(facts: ModelFacts, name: str) -> set[str]:
    paths = [path for module in facts.modules if module.kind != "experts" for path in module.paths()]
    return set(matching(TARGET_SETS[name], paths))


def test_sets_of_layers_in_every_known_architecture() -> None:
    """Attention and feed-forward part are apart, and together all linear layers but routers and the like."""
    seen = set()
    for name, config in known_configs():
        facts = facts_of(config, name, "table")
        if facts.blocks is None or facts.family in seen:
            continue
        seen.add(facts.family)
        linear = {path for m in facts.modules if m.kind == "linear" for path in m.paths()} - {facts.head}
        attention, mlp = selected(facts, "attention"), selected(facts, "mlp")
        assert attention, name
        assert not attention & mlp, name
        assert attention | mlp <= linear, name
        left = {path.rpartition(".")[2] for path in linear - attention - mlp}
        assert left <= {"gate", "shared_expert_gate", "dense", "classifier"}, (name, left)
    assert len(seen) > 10


def test_sets_are_those_of_the_guides_on_a_llama() -> None:
    facts = facts_of(dict(known_configs())["llama-2-7b"], "llama-2-7b", "table")
    for name, names in (("qv", {"q_proj", "v_proj"}), ("attention", set(QKVO)),
                        ("mlp", {"gate_proj", "up_proj", "down_proj"})):  # fmt: skip
        assert {path.rpartition(".")[2] for path in selected(facts, name)} == names
    found = resolved(lora_target="attention, gate_proj")
    assert found.lora_target == (TARGET_SETS["attention"], "gate_proj")
    assert found.origins["lora_target"] == "argument: attention"


def test_the_presets_fit_the_memory_that_they_name() -> None:
    """By the plan; nothing of it was run on a GPU."""
    facts = facts_of(dict(known_configs())["llama-2-7b"], "llama-2-7b", "table")
    for name, gigabytes in (("gpu-16gb", 16), ("gpu-24gb", 24), ("gpu-80gb", 80)):
        total = memory(facts, replace(setup_of(resolved(preset=name)), device="cuda")).total
        assert total < gigabytes * 1e9, (name, total)
    plain = replace(setup_of(resolved(preset="gpu-80gb")), device="cuda", checkpointing=False)
    assert round(memory(facts, plain).total / 1e9) == 303  # what the note says


@pytest.mark.parametrize("name", PRESETS)
def test_shown_as_a_configuration(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "show", name]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "c.yaml"
    path.write_text(text + "".join(f"{k}: {v}\n" for k, v in OWN.items()), encoding="utf-8")
    shown, named = dict(resolve(load(path))), dict(resolved(preset=name))
    assert {k: shown[k] for k in PRESETS[name].values} == {k: named[k] for k in PRESETS[name].values}
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PRESETS[name].values)
    assert all(f"# {PRESETS[name].source}" in line for line in lines)


def test_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:]] == list(PRESETS)
    assert main(["presets", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["values"] for each in told] == [json.loads(json.dumps(p.values)) for p in PRESETS.values()]
    assert main(["presets", "show", "code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"]["lora_rank"] == 32
    assert main(["presets", "show", "cod"]) == 2
    assert "did you mean code" in capsys.readouterr().err
    assert main(["validate", "--help"]) == 0


def test_the_documentation_has_them_all() -> None:
    text = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        assert f"| `{name}` |" in text
        assert preset.source in text
    for name in (*TARGET_SETS, *ALPHA_MODES, *GUIDES.values()):
        assert name in text
