"""Malformed configurations: each gets a message that names place, cause and remedy, never a traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from syrupy.assertion import SnapshotAssertion

from lorakit.config.load import load
from lorakit.config.resolve import resolve
from lorakit.errors import ConfigError

FOLDER = Path(__file__).parent / "configs"
CASES = sorted(path.name for path in FOLDER.glob("*.yaml"))
GOOD = "model_name_or_path: smollm2-135m-instruct\ndataset: train.jsonl\noutput_dir: out\n"

OVERRIDES = {
    "no equals sign": ["lora_rank"],
    "typo": ["lora_rnak=16"],
    "out of range": ["lora_rank=0"],
    "wrong type": ["seed=fast"],
    "broken YAML": ["lora_target=[q_proj"],
    "star": ["dataset=*.jsonl"],
    "python tag": ["seed=!!python/name:os.system x"],
    "twice": ["seed=1", "seed=2"],
    "not built yet": ["rope_scaling=linear"],
    "empty": ["output_dir="],
    "contradicts the file": ["fp16=true"],
    "control characters": ["seed=\x1b[31mred"],
}


def refusal(name: str, overrides: list[str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(name, overrides)
    error = caught.value
    assert error.exit_code == 2
    assert "Traceback" not in error.render()
    assert error.to_dict()["problems"]
    return error


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("name", CASES)
def test_message_of_malformed_file(
    name: str, snapshot: SnapshotAssertion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER)
    assert refusal(name, []).render() == snapshot


@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_message_of_malformed_override(
    overrides: list[str], snapshot: SnapshotAssertion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(GOOD + "bf16: true\n")
    assert refusal("sft.yaml", overrides).render() == snapshot


def test_a_missing_file_names_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(GOOD)
    text = refusal("stf.yaml", []).render()
    assert "cannot read the file: No such file or directory" in text
    assert "--> stf.yaml" in text
    assert "did you mean sft.yaml?" in text


def test_a_missing_model_folder_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").touch()
    (tmp_path / "sft.yaml").write_text("model_name_or_path: models/tyni.gguf\ndataset: d\noutput_dir: o\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve(load("sft.yaml"))
    text = caught.value.render()
    assert f"there is no model at {tmp_path}/models/tyni.gguf" in text
    assert "sft.yaml:1:21" in text
    assert "did you mean tiny.gguf?" in text


def test_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(str(tmp_path), []).render()
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"# padding\n" * 150_000)
    assert "larger than 1 MiB" in refusal(str(huge), []).render()


def test_an_alias_bomb_is_refused_at_once() -> None:
    start = time.process_time()
    refusal(str(FOLDER / "alias_bomb.yaml"), [])
    assert time.process_time() - start < 1


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / "deep.yaml"
    deep.write_text("lora_target: " + "[" * 1000)
    assert "nested too deeply" in refusal(str(deep), []).render()


def test_all_problems_come_in_one_error_in_the_order_of_their_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER)
    error = refusal("many_problems.yaml", ["seed=-1"])
    assert error.message == "8 problems in many_problems.yaml"
    assert [problem.key for problem in error.problems] == [
        "lora_rnak",
        "lora_alpha",
        "warmup_ratio",
        "use_galore",
        "lr_scheduler_type",
        "seed",
        "dataset",
        "output_dir",
    ]
    assert [at["line"] for at in error.to_dict()["problems"][2]["places"]] == [4, 5]
