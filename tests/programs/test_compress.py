"""``lorakit compress``: a smaller adapter that loads in stock PEFT, and the loss before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from running import ROWS, Call, small_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def update(folder: Path, module: str) -> torch.Tensor:
    """s · B A of one module, by PEFT's description."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{factor}.weight"] for factor in "AB")
    alpha = config["alpha_pattern"].get(f"^{module}", config["lora_alpha"])
    return alpha / A.shape[0] * (B @ A)


def test_the_loss_of_the_run_is_measured_before_and_after(run: Path, lorakit: Call, tmp_path: Path) -> None:
    found = {}
    for rank in (1, 4):
        status, out, err = lorakit("compress", run, tmp_path / f"r{rank}", "--rank", rank, "--json")
        assert status == 0, err
        found[rank] = json.loads(out)
    for made in found.values():
        assert made["held_out_rows"] == len(ROWS)
        assert made["bytes_after"] < made["bytes_before"]
    assert (found[4]["ranks_before"], found[4]["ranks_after"]) == ("16", "4")
    assert found[1]["largest_error"] > found[4]["largest_error"] > 0
    before = found[1]["loss_before"]
    assert before == found[4]["loss_before"] < 0.05
    # Measured on what was written: the same number comes out of the files.
    status, out, _ = lorakit("compress", tmp_path / "r4", tmp_path / "r2", "--rank", 2, "--json", "--data",
                             run.parents[1] / "train.jsonl")  # fmt: skip
    assert status == 0
    assert json.loads(out)["loss_before"] == pytest.approx(found[4]["loss_after"], rel=1e-4)


def test_what_is_written_is_the_best_of_its_rank_and_loads_in_peft(
    run: Path, lorakit: Call, model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    status, stdout, err = lorakit("compress", run, out, "--energy", 0.9, "--json")
    assert status == 0, err
    made = json.loads(stdout)["modules"]
    assert len(set(made["after"].values())) > 1  # ranks differ by module
    for module, rank in made["after"].items():
        wanted, small = update(run / "adapter", module), update(out, module)
        values = torch.linalg.svdvals(wanted.double()).square()
        assert values[:rank].sum() >= 0.9 * values.sum() > values[: rank - 1].sum()
        assert torch.linalg.matrix_rank(small.double(), rtol=1e-5) == rank
        error = float((small - wanted).norm() / wanted.norm())
        assert error == pytest.approx(float((values[rank:].sum() / values.sum()).sqrt()), abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), out)
    messages = [{"role": "system", "content": "Address to JSON."}, {"role": "user", "content": ROWS[0][0]}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids["input_ids"].shape[1] :]
    _, ours, _ = lorakit("generate", out, ROWS[0][0], "--max-new-tokens", 48)
    assert ours == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_without_rows_it_says_that_nothing_was_measured(run: Path, lorakit: Call, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    status, out, err = lorakit("compress", alone, tmp_path / "small", "--json")
    assert status == 0, err
    assert "no held-out rows" in err
    made = json.loads(out)
    assert (made["loss_before"], made["loss_after"], made["held_out_rows"]) == (None, None, 0)
    assert made["largest_error"] <= 0.1 + 1e-6  # √(1 − 0.99)


def test_what_is_refused(run: Path, folder: Path, lorakit: Call, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert lorakit("compress", run, tmp_path / "there", "--rank", 2)[0] == 8
    for options, message in (
        (("--rank", 2, "--energy", 0.5), "both decide what is kept"),
        (("--rank", 16), "the largest rank of the adapter is 16"),
        (("--energy", 1.5), "1.5 is not in the range"),
    ):
        status, _, err = lorakit("compress", run, tmp_path / "out", *options)
        assert status == 2 and message in err
    status, _, err = lorakit("compress", run, tmp_path / "out", "--data", tmp_path / "missing.jsonl")
    assert status == 3 and "missing.jsonl" in err
    status, _, err = lorakit("compress", folder, tmp_path / "out")
    assert status == 4 and "neither an adapter folder nor a run" in err
    assert not (tmp_path / "out").exists()


def test_dora_is_refused_with_the_reason(folder: Path, lorakit: Call, tmp_path: Path) -> None:
    assert lorakit(*small_run(folder, tmp_path / "dora", "use_dora=true"))[0] == 0
    status, _, err = lorakit("compress", tmp_path / "dora", tmp_path / "out")
    assert status == 2 and "DoRA adapter, whose update is no product B A" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [("compress",), ("convert",)])
def test_an_anchored_start_becomes_plain(
    verb: tuple[str, ...], folder: Path, lorakit: Call, tmp_path: Path
) -> None:
    """PiSSA is written with its anchor, at twice its rank; what is made of it is read as what it is."""
    assert lorakit(*small_run(folder, tmp_path / "pissa", "pissa_init=true", "lora_rank=4"))[0] == 0
    status, _, err = lorakit(*verb, tmp_path / "pissa", tmp_path / "plain", "--rank", 8 - 1)
    assert status == 0, err
    notes = json.loads((tmp_path / "plain" / "lorakit.json").read_text())
    assert "start" not in notes
    status, _, err = lorakit("generate", tmp_path / "plain", ROWS[0][0], "--max-new-tokens", 8)
    assert status == 0, err
