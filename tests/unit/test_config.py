"""Configuration: values, precedence, origins, the tables of keys, and the saved file that runs again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lorakit import hardware
from lorakit.config.keys import OTHER_NAMES, UNBUILT
from lorakit.config.load import Run, load, load_mapping
from lorakit.config.resolve import Resolved, resolve
from lorakit.config.schema import TrainConfig, help_texts
from lorakit.errors import ConfigError

NOTES = {"origins", "warnings"}
BASIC = {"model_name_or_path": "smollm2-135m-instruct", "dataset": "train.jsonl", "output_dir": "out"}

# What LLaMA-Factory's users write for a LoRA run of Llama 3.
LLAMA3_LORA_SFT = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # or wandb, tensorboard

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""


def write(folder: Path, text: str, name: str = "sft.yaml") -> Path:
    lines = "".join(f"{key}: {value}\n" for key, value in BASIC.items() if f"{key}:" not in text)
    path = folder / name
    path.write_text(text + lines, encoding="utf-8")
    return path


def mapped(**values: Any) -> Run:
    return load_mapping({**BASIC, **values}, Path("/base"))


def values_of(resolved: Resolved) -> dict[str, Any]:
    return resolved.model_dump(exclude=NOTES)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(device: str, *supported: str) -> None:
        monkeypatch.setattr(hardware, "device", lambda: device)
        monkeypatch.setattr(hardware, "supports", lambda precision: precision in {"fp32", *supported})

    return pretend


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_scientific_notation_is_a_float(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, f"learning_rate: {text}\n")).config.learning_rate == 1e-4


def test_yaml_1_2_words_stay_texts_and_whole_numbers_serve_as_floats(tmp_path: Path) -> None:
    path = write(tmp_path, "output_dir: on\nmodel_revision: 2026-01-01\nnum_train_epochs: 2\nseed: 017\n")
    config = load(path).config
    assert config.output_dir == "on"
    assert config.model_revision == "2026-01-01"
    assert config.num_train_epochs == 2.0
    assert config.seed == 17


def test_byte_order_mark_of_utf8_is_no_obstacle(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffseed: 7\n")
    assert load(path).config.seed == 7


def test_lists_and_comma_strings_are_the_same(tmp_path: Path) -> None:
    comma = load(write(tmp_path, "lora_target: q_proj, v_proj\ndataset: a.jsonl,b.jsonl\n")).config
    listed = load(write(tmp_path, "lora_target: [q_proj, v_proj]\ndataset:\n- a.jsonl\n- b.jsonl\n")).config
    assert comma == listed
    assert comma.lora_target == ("q_proj", "v_proj")
    assert load(write(tmp_path, "lora_target: [all]\n")).config.lora_target == "all"


def test_minus_one_step_means_by_epochs(tmp_path: Path) -> None:
    assert load(write(tmp_path, "max_steps: -1\n")).config.max_steps is None
    with pytest.raises(ConfigError, match="`max_steps` must be a whole number of at least 1, not 0"):
        load(write(tmp_path, "max_steps: 0\n"))


def test_the_configuration_is_frozen() -> None:
    resolved = resolve(mapped())
    with pytest.raises(ValidationError, match="frozen"):
        resolved.lora_rank = 4


def test_resolved_values_pass_their_own_checks() -> None:
    """They are not checked again when they are made: each is a checked one, or derived."""
    for values in ({}, {"use_qlora": True, "lora_alpha": "r"}, {"preset": "gpu-80gb", "unfreeze_after": 0.5}):
        resolved = resolve(mapped(**values))
        assert Resolved.model_validate(dict(resolved)) == resolved


def test_every_key_has_a_help_text() -> None:
    assert [name for name in TrainConfig.model_fields if not help_texts().get(name)] == []


def test_overrides_win_and_origins_tell(tmp_path: Path) -> None:
    resolved = resolve(
        load(write(tmp_path, "lora_rank: 16\nseed: 1\nmax_steps: 5\n"), ["seed=2", "lora_dropout=0.1"])
    )
    assert (resolved.lora_rank, resolved.seed, resolved.lora_dropout, resolved.lora_alpha) == (
        16,
        2,
        0.1,
        32.0,
    )
    assert resolved.effective_batch == 8
    origins = resolved.origins
    assert origins["lora_rank"] == "sft.yaml:1"
    assert origins["seed"] == origins["lora_dropout"] == "command line"
    assert origins["lora_alpha"] == "derived: 2 × lora_rank"
    assert origins["cutoff_len"] == "default"
    assert origins["dataset_dir"] == "derived: folder of sft.yaml"
    assert origins["num_train_epochs"] == "default, unused: max_steps wins"
    assert set(origins) == set(values_of(resolved))


def test_an_override_replaces_a_bad_or_unbuilt_value(tmp_path: Path) -> None:
    path = write(tmp_path, "lora_rank: 0\nuse_galore: true\n")
    assert load(path, ["lora_rank=4", "use_galore=null"]).config.lora_rank == 4


def test_paths_start_where_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", "/home/someone")
    path = write(tmp_path, "model_name_or_path: model\ndataset: [a.jsonl, ../b, ~/c]\n")
    resolved = resolve(load(path, ["output_dir=runs/1", "eval_dataset=test.jsonl"]))
    assert resolved.dataset == (f"{tmp_path}/a.jsonl", f"{tmp_path.parent}/b", "/home/someone/c")
    assert resolved.eval_dataset == (f"{here}/test.jsonl",)
    assert resolved.output_dir == f"{here}/runs/1"
    assert resolved.model_name_or_path == f"{tmp_path}/model"
    assert resolved.do_eval
    assert resolve(load(path, ["dataset_dir=/data"])).dataset[0] == "/data/a.jsonl"


def test_hub_ids_and_aliases_are_kept(tmp_path: Path) -> None:
    for name in ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert resolve(load(write(tmp_path, f"model_name_or_path: {name}\n"))).model_name_or_path == name


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing", "~/nothing", "some.gguf", "a/b/c", "x" * 300 + ".gguf"]
)
def test_what_looks_like_a_path_must_exist(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        resolve(mapped(model_name_or_path=name))


EMULATED = "a CPU only emulates it"


@pytest.mark.parametrize(
    ("hardware_has", "keys", "precision", "origin"),
    [
        (("cpu", "bf16"), {}, "bf16", "derived: best on this cpu"),
        (("cpu",), {}, "fp32", "derived: best on this cpu"),
        (("cuda", "fp16"), {}, "fp32", "derived: best on this cuda"),
        (("cuda", "fp16", "bf16"), {"fp16": True}, "fp16", "argument"),
        (("cpu", "bf16"), {"bf16": True}, "bf16", "argument"),
        (("cpu", "bf16"), {"bf16": False}, "fp32", "argument"),
        (("cpu", "bf16"), {"bf16": False, "fp16": False}, "fp32", "argument"),
        (("cpu", "bf16"), {"fp16": True}, "bf16", f"derived: not fp16, as {EMULATED} (argument)"),
        (("cpu",), {"fp16": True}, "fp32", f"derived: not fp16, as {EMULATED} (argument)"),
    ],
)
def test_precision(machine: Any, hardware_has: Any, keys: dict[str, bool], precision: str, origin: str) -> None:
    machine(*hardware_has)
    resolved = resolve(mapped(**keys))
    assert (resolved.precision, resolved.origins["precision"]) == (precision, origin)
    assert (resolved.bf16, resolved.fp16) == (precision == "bf16", precision == "fp16")
    assert len(resolved.warnings) == ("not fp16" in origin)


def test_fp16_on_a_cpu_is_warned_of_and_bf16_without_hardware_is_refused(machine: Any, tmp_path: Path) -> None:
    machine("cpu")
    (warning,) = resolve(load(write(tmp_path, "fp16: true\n"))).warnings
    assert warning == f"sft.yaml:1: `fp16` is not used, as {EMULATED}: computing in fp32"
    with pytest.raises(ConfigError) as caught:
        resolve(load(write(tmp_path, "bf16: true\n")))
    assert "`bf16` is true, but the hardware has no bf16 arithmetic" in caught.value.render()
    assert "sft.yaml:1:7" in caught.value.render()
    assert "remove the key to compute in fp32" in caught.value.render()


def test_unusual_learning_rates_are_warned_of(tmp_path: Path) -> None:
    (warning,) = load(write(tmp_path, "learning_rate: 0.1\n")).warnings
    assert warning.startswith("sft.yaml:1: `learning_rate` is outside the usual range of LoRA")
    assert load(write(tmp_path, "learning_rate: 1e-3\n")).warnings == ()


@pytest.mark.parametrize(
    "keys",
    [
        {"bf16": True, "fp16": True},
        {"warmup_ratio": 0.1, "warmup_steps": 5},
        {"gradient_checkpointing": True, "disable_gradient_checkpointing": True},
        {"predict_with_generate": True, "do_eval": False, "eval_dataset": "e.jsonl"},
        {"eval_on_start": True, "do_eval": False, "eval_dataset": "e.jsonl"},
        {"packing": False, "neat_packing": True},
        {"packing": True, "group_by_length": True},
        {"neat_packing": True, "group_by_length": True},
        {"packing": True, "max_tokens_per_batch": 4096},
        {"max_tokens_per_batch": 1000, "cutoff_len": 1024},
    ],
)
def test_contradictions_show_both_keys(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        mapped(**keys)
    (problem,) = caught.value.problems
    shown = {place.source.partition("=")[0] for place in problem.places}
    assert len(shown) == 2
    assert shown <= set(keys)


def test_spellings_that_do_not_contradict() -> None:
    assert resolve(mapped(warmup_ratio=0.1, warmup_steps=0)).warmup_steps is None
    assert resolve(mapped(disable_gradient_checkpointing=False)).gradient_checkpointing is True
    assert resolve(mapped(disable_gradient_checkpointing=True)).gradient_checkpointing is False
    for keys in ({"packing": True}, {"neat_packing": True}, {"packing": True, "neat_packing": True}):
        assert resolve(mapped(**keys)).packing is True
    for keys in ({}, {"packing": False}, {"neat_packing": False}, {"packing": False, "neat_packing": False}):
        assert resolve(mapped(**keys)).packing is False


def test_a_wrong_value_does_not_trigger_rules_about_it() -> None:
    with pytest.raises(ConfigError) as caught:
        mapped(eval_dataset=3, eval_on_start=True)
    assert [problem.key for problem in caught.value.problems] == ["eval_dataset"]


def test_python_values_get_the_same_checks() -> None:
    assert mapped(output_dir=Path("out"), lora_target=("q_proj",)).config.lora_target == ("q_proj",)
    with pytest.raises(ConfigError, match="2 problems in the arguments") as caught:
        mapped(lora_rnak=8, seed=True)
    assert "lora_rnak=8" in caught.value.render()


def test_llama_factory_example_runs_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "llama3_lora_sft.yaml"
    path.write_text(LLAMA3_LORA_SFT)
    config = load(path).config
    assert (config.learning_rate, config.max_samples, config.dataset) == (
        1e-4,
        1000,
        ("identity", "alpaca_en_demo"),
    )


def test_the_tables_of_keys_do_not_overlap() -> None:
    fields = set(TrainConfig.model_fields)
    assert len(UNBUILT) >= 100
    assert fields.isdisjoint(UNBUILT)
    assert fields.isdisjoint(OTHER_NAMES)
    assert set(UNBUILT).isdisjoint(OTHER_NAMES)
    assert set(OTHER_NAMES.values()) <= fields


@pytest.mark.parametrize("key", UNBUILT)
def test_an_unbuilt_key_is_accepted_if_neutral_and_else_refused_by_name(key: str) -> None:
    for value in (None, *UNBUILT[key].neutral):
        mapped(**{key: value})
    with pytest.raises(ConfigError) as caught:
        mapped(**{key: "something"})
    assert caught.value.problems[0].message == f"`{key}` is known but not built yet: {UNBUILT[key].reason}"


def test_zero_is_not_false() -> None:
    with pytest.raises(ConfigError, match="use_galore"):
        mapped(use_galore=0)


PATHS = st.text(min_size=1, max_size=12).filter(lambda text: "\x00" not in text and not text.startswith("~"))
CONFIGS = st.fixed_dictionaries(
    {
        "model_name_or_path": st.from_regex(r"[A-Za-z0-9_-]{1,9}(/[A-Za-z0-9_.-]{1,9}x)?", fullmatch=True),
        "dataset": st.lists(PATHS, min_size=1, max_size=3),
        "output_dir": PATHS,
    },
    optional={
        "lora_rank": st.integers(1, 4096),
        "lora_alpha": st.floats(1e-6, 1e6),
        "lora_dropout": st.floats(0, 1, exclude_max=True),
        "lora_target": st.lists(PATHS, min_size=1, max_size=3),
        "dataset_dir": PATHS,
        "eval_dataset": st.lists(PATHS, min_size=1, max_size=2),
        "model_revision": PATHS,
        "learning_rate": st.floats(0, 1, exclude_min=True),
        "max_steps": st.integers(1, 10**6),
        "warmup_steps": st.integers(0, 100),
        "fp16": st.booleans(),
        "disable_gradient_checkpointing": st.booleans(),
        "lr_scheduler_type": st.sampled_from(["linear", "constant"]),
        "seed": st.integers(0, 2**32 - 1),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=CONFIGS)
def test_the_saved_configuration_resolves_to_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    first = resolve(load_mapping(values, Path("/somewhere")))
    saved = tmp_path / "config.resolved.yaml"
    saved.write_text(first.to_yaml(), encoding="utf-8", newline="")
    second = resolve(load(saved))
    assert values_of(second) == values_of(first)
    saved.write_text(second.to_yaml(), encoding="utf-8", newline="")
    third = resolve(load(saved))
    assert third.to_yaml() == second.to_yaml()


def test_saved_text_is_plain_yaml_with_origins(tmp_path: Path) -> None:
    text = resolve(load(write(tmp_path, "lora_rank: 16\nlora_target: q_proj\n"))).to_yaml()
    lines = {line.partition(":")[0]: line for line in text.splitlines()}
    assert lines["lora_rank"].split("#")[1] == " sft.yaml:1"
    assert lines["lora_target"].split() == ["lora_target:", "[q_proj]", "#", "sft.yaml:2"]
    assert lines["lora_alpha"].split("  ")[0] == "lora_alpha: 32.0"
    assert "precision" not in lines


def test_loading_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    path = write(tmp_path, "lora_rank: 16\n")
    program = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from lorakit.config.load import load\n"
        "from lorakit.config.resolve import resolve\n"
        f"resolve(load({str(path)!r}))\n"
        "print(time.process_time() - start, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert all(run[1:] == ["False", "False"] for run in runs)
    assert min(float(run[0]) for run in runs) < 0.5  # 0.15 s on a machine at rest, most of it pydantic's import
