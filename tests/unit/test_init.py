"""`lorakit init`: what it writes is right, fits, says why, and trains."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import lorakit
from lorakit.cli.main import main
from lorakit.config.load import load
from lorakit.config.presets import PRESETS
from lorakit.config.resolve import resolve
from lorakit.data.estimate import estimate

WORDS = ["say", "one", "two", "three", "blue", "yellow", "answer", "question"]


def rows(path: Path, count: int, seed: int = 1, longest: int = 30) -> Path:
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            asked, said = (" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(2))
            stream.write(json.dumps({"instruction": asked, "output": said}) + "\n")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lengths_of_rows_against_the_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", 300)
    found = estimate([path], tiny_llama / "tokenizer.json")
    made = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    texts = [json.loads(line) for line in path.read_text().splitlines()]
    real = sorted(len(made.encode(f"{t['instruction']}\n{t['output']}").ids) + 16 for t in texts)
    assert (found.rows, found.counted) == (300, True)
    assert found.mean == pytest.approx(sum(real) / 300, rel=0.05)
    assert found.longest == pytest.approx(real[-1], rel=0.2)
    guessed = estimate([path])
    assert (guessed.rows, guessed.counted) == (300, False)
    assert guessed.longest >= guessed.most >= guessed.mean > 0


@pytest.mark.parametrize("count", [20, 300, 1500])
@pytest.mark.parametrize("options", [[], ["--task", "code"], ["--preset", "gpu-16gb"], ["--fit", "9GB"]])
def test_what_it_writes_is_right_and_fits(count: int, options: list[str], folder: Path) -> None:
    rows(folder / "rows.jsonl", count)
    assert main(["init", "--model", "meta-llama/Llama-3.1-8B", "--data", "rows.jsonl", *options]) == 0
    settings = resolve(load("sft.yaml"))
    assert settings.dataset == (str(folder / "rows.jsonl"),)
    assert settings.output_dir == str(folder / "runs" / "sft")
    epochs = 3.0 if options[:1] == ["--preset"] or count >= 1000 else 5.0
    assert settings.num_train_epochs == epochs
    assert settings.lora_rank == {"--task": 32, "--preset": 8}.get("".join(options[:1]), 16)
    assert settings.effective_batch == 8
    assert (settings.val_size > 0) == (count >= 50)
    plan = lorakit.plan("sft.yaml")
    if options[:1] == ["--fit"]:
        assert settings.quantization_bit == 4
        assert plan.memory.total < 9e9
    assert main(["validate", "sft.yaml"]) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_begins_with_any_preset(preset: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows(folder / "rows.jsonl", 60)
    arguments = ["init", "--model", "qwen2.5-1.5b", "--data", "rows.jsonl", "--preset", preset, "--fit", "80GB"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    settings = resolve(load("sft.yaml"))
    written = {each["key"] for each in told["advice"]}
    for key in PRESETS[preset].values:
        origin = settings.origins[key]
        assert origin.startswith("sft.yaml:" if key in written else f"preset {preset}"), (key, origin)
    assert lorakit.plan("sft.yaml", device="cuda").memory.total < 80e9


def test_paths_are_seen_from_the_file(folder: Path, tiny_llama: Path) -> None:
    (folder / "data").mkdir()
    rows(folder / "data" / "r w.jsonl", 60)
    (folder / "model").symlink_to(tiny_llama)
    out = folder / "configs" / "deep" / "x.yaml"
    arguments = ["init", "--model", "model", "--data", "data/r w.jsonl", "--data", "data", "--out"]
    assert main([*arguments, "configs/deep/x.yaml"]) == 0
    settings = resolve(load(out))
    assert settings.model_name_or_path == str(folder / "model")
    assert settings.dataset == (str(folder / "data" / "r w.jsonl"), str(folder / "data"))


def test_nothing_is_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sft.yaml").write_text("mine")
    assert main(["init"]) == 8
    assert "sft.yaml is there already" in capsys.readouterr().err
    assert (folder / "sft.yaml").read_text() == "mine"
    assert main(["init", "--out", "other.yaml"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["other.yaml", "sft.yaml"]
    assert resolve(load("other.yaml")).dataset == (str(folder / "rows.jsonl"),)


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--model", "lama-2-7b"], "did you mean llama-2-7b", 4),
        (["--data", "nowhere.jsonl"], "no such file", 3),
        (["--preset", "gpu-61gb"], "did you mean gpu-16gb", 2),
        (["--task", "poems"], "poems", 2), (["--fit", "much"], "no size of memory", 2),
        (["--preset", "code", "--model", "gpt2"], "q_proj", 4),
    ],
)  # fmt: skip
def test_errors(
    arguments: list[str], message: str, status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *arguments]) == status
    assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_what_cannot_fit_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--model", "llama-2-70b", "--fit", "8GB"]) == 0
    assert "does not fit" in capsys.readouterr().err
    text = (folder / "sft.yaml").read_text()
    assert "# It does not fit there" in text
    assert "write the model's hub id" in text
    assert main(["validate", "sft.yaml"]) == 0


def test_it_trains(folder: Path, tiny_llama: Path, one_thread: None) -> None:
    rows(folder / "rows.jsonl", 60, longest=6)
    assert main(["init", "--model", str(tiny_llama), "--data", "rows.jsonl"]) == 0
    lorakit.train("sft.yaml", ["num_train_epochs=1"])
    weights = list((folder / "runs" / "sft").rglob("adapter_model.safetensors"))
    assert weights
    assert weights[0].stat().st_size > 1000


def test_no_torch(folder: Path) -> None:
    rows(folder / "rows.jsonl", 60)
    code = (
        "import sys; from lorakit.cli.main import main\n"
        "status = main(['init', '--data', 'rows.jsonl', '--model', 'qwen3-8b', '--preset', 'gpu-16gb'])\n"
        "print(status, {'torch', 'transformers', 'numpy'} & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "0 set()", done.stderr
