"""A run on a quantised base, from the configuration to the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROWS, Call, settings_of, small_run
from transformers import AutoModelForCausalLM

from lorakit.checkpoint.peft_format import load_adapter
from lorakit.cli.main import main
from lorakit.config.quantization import Quantization
from lorakit.evals.session import open_session
from lorakit.models.load import load_model
from lorakit.models.quantized import quantization_of
from lorakit.models.sources import locate
from lorakit.quant.modules import QuantLinear

IDS = torch.tensor([[1, 44, 9, 120, 77]])


@pytest.fixture(scope="module")
def four(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on a base in 4 bits, whose adapter changes something."""
    out = tmp_path_factory.mktemp("runs") / "four"
    assert main([str(each) for each in small_run(folder, out, "use_qlora=true", "max_steps=12")]) == 0
    return out


def notes(run: Path) -> dict[str, Any]:
    return json.loads((run / "adapter" / "lorakit.json").read_text())


def test_what_a_run_says_of_its_base(four: Path) -> None:
    settings = settings_of(four)
    assert (settings["quantization_bit"], settings["quantization_type"]) == (4, "nf4")
    assert settings["double_quantization"] is True
    assert notes(four)["quantization"] == Quantization(compute="fp32").to_dict()
    assert notes(four)["base"]["quantised"] == "nf4"
    targets = json.loads((four / "run.json").read_text())["adapter"]["targets"]
    assert {"name": "q_proj", "modules": 2, "shape": [64, 64], "parameters": 2 * 16 * 128} in targets


def test_opened_as_it_was_trained(four: Path, model_folder: Path) -> None:
    session = open_session(str(four), precision="fp32")
    found = quantization_of(session.model)
    assert found is not None
    assert found.kind == "nf4"
    expected = load_model(locate(str(model_folder)), precision="fp32", quantization=Quantization())
    load_adapter(expected, four / "adapter")
    assert torch.equal(session.model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_verbs_on_a_dense_base_tell_the_difference(four: Path, folder: Path, lorakit: Call, verb: str) -> None:
    rest = [ROWS[0][0]] if verb == "generate" else [folder / "train.jsonl", "--no-generate"]
    status, out, err = lorakit(verb, four, *rest)
    assert (status, "on this dense one" in err) == (0, False), err
    status, other, err = lorakit(verb, four, *rest, "--quantization-bit", "none")
    assert status == 0, err
    assert "trained on a base in nf4 with double quantisation; on this dense one its logits differ by" in err
    assert out and other


def test_merging_is_refused_with_the_ways_out(four: Path, tmp_path: Path, lorakit: Call) -> None:
    status, _, err = lorakit("merge", four, tmp_path / "merged")
    assert status == 8
    assert "the adapter's base is quantised (nf4 with double quantisation)" in err
    assert "--dequantize" in err and "--requantize" in err
    status, _, err = lorakit("merge", four, tmp_path / "merged", "--dequantize", "--requantize")
    assert (status, "exclude each other" in err) == (2, True)
    assert not (tmp_path / "merged").exists()


def test_merged_into_dense_weights(four: Path, tmp_path: Path, lorakit: Call) -> None:
    status, out, err = lorakit("merge", four, tmp_path / "merged", "--dequantize", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert (found["weights"], found["top1_agreement"]) == ("dense", 1.0)
    assert found["max_logit_difference"] < 1e-4
    certificate = json.loads((tmp_path / "merged" / "merge_certificate.json").read_text())
    assert {"merged": found["merged"], **certificate} == {"adapter": str(four), **found}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    session = open_session(str(four), precision="fp32")
    assert torch.allclose(plain(IDS).logits, session.model(IDS).logits, atol=1e-4)
    status, _, err = lorakit("merge", four, tmp_path / "merged", "--dequantize")
    assert (status, "is there already" in err) == (8, True)


def test_merged_and_quantised_again(four: Path, tmp_path: Path, lorakit: Call) -> None:
    out = tmp_path / "merged"
    status, text, err = lorakit("merge", four, out, "--requantize", "--json")
    assert status == 0, err
    found = json.loads(text)
    assert found["weights"] == "nf4 with double quantisation"
    assert 0 < found["weight_error"] < 0.2
    assert found["update_error"] > found["weight_error"]
    assert found["max_logit_difference"] > 1e-3
    model = load_model(locate(str(out)), precision="fp32")
    assert type(model.model.layers[0].mlp.up_proj) is QuantLinear
    dense = load_model(locate(str(tmp_path / "merged")), precision="bf16")
    assert dense.lm_head.weight.dtype == torch.bfloat16
    # It is a base like any other.
    status, answer, err = lorakit("generate", out, ROWS[0][0], "--max-new-tokens", 4)
    assert status == 0 and answer, err


def test_the_written_model_in_stock_bitsandbytes(four: Path, tmp_path: Path, lorakit: Call) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    assert lorakit("merge", four, tmp_path / "merged", "--requantize")[0] == 0
    ours = load_model(locate(str(tmp_path / "merged")), precision="fp32")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    layers = {path: m for path, m in ours.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    for path, layer in layers.items():
        other = stock.get_submodule(path)
        assert type(other) is bitsandbytes.nn.Linear4bit
        state = other.weight.quant_state
        assert torch.equal(other.weight.data, layer.weight)
        assert torch.equal(state.absmax, layer.get_buffer("absmax"))
        assert torch.equal(state.state2.absmax, layer.get_buffer("nested_absmax"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("quantization_bit=8", "llm_int8_threshold=6.0"),
        ("quantization_bit=4", "quantization_method=bnb", "bnb_4bit_quant_type=fp4"),
        ("quantization_bit=4", "init_lora_weights=loftq", "gradient_checkpointing=true"),
        ("load_in_4bit=true", "use_dora=true", "bnb_4bit_compute_dtype=float32", "packing=true"),
        ("quantization_bit=4", "use_adalora=true", "llm_int8_skip_modules=down_proj"),
    ],
    ids=lambda given: given[-1],
)
def test_trains_and_answers(folder: Path, tmp_path: Path, lorakit: Call, overrides: tuple[str, ...]) -> None:
    if "quantization_method=bnb" in overrides:
        pytest.importorskip("bitsandbytes")
    status, _, err = lorakit(*small_run(folder, tmp_path / "run", *overrides))
    assert status == 0, err
    assert "linear layers in" in err
    status, out, err = lorakit("generate", tmp_path / "run", ROWS[0][0], "--max-new-tokens", 4)
    assert status == 0 and out, err


def test_notes_that_were_tampered_with(four: Path, tmp_path: Path, lorakit: Call) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (four / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    changed = {**notes(four), "quantization": {"kind": "nf4"}}
    (adapter / "lorakit.json").write_text(json.dumps(changed))
    status, _, err = lorakit("generate", adapter, "Hi")
    assert status == 4
    assert "the note of how the base was quantised cannot be used: double is None" in err
