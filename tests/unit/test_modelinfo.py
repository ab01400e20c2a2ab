"""Facts of models: against transformers' models on the meta device, published totals, and files made here."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from lorakit.errors import ModelError
from lorakit.modelinfo import table
from lorakit.modelinfo.architectures import facts_of
from lorakit.modelinfo.facts import ModelFacts
from lorakit.modelinfo.find import find_facts

# By their authors or model cards; of pictures with the head for 1000 classes, DINOv2 and BERT without.
PUBLISHED = {
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192, "llama-3-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384, "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320, "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472, "gemma-3-12b": 12_187_325_040, "gemma-3-27b": 27_432_406_640,
    "phi-3-mini": 3_821_079_552, "phi-3-medium": 13_960_238_080, "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200, "bert-base-uncased": 109_482_240, "bert-large-uncased": 335_141_888,
    "vit-base": 86_567_656, "vit-large": 304_326_632, "vit-huge": 632_045_800, "dinov2-small": 22_056_576,
    "dinov2-base": 86_580_480, "dinov2-large": 304_368_640, "dinov2-giant": 1_136_480_768,
    "resnet-18": 11_689_512, "resnet-34": 21_797_672, "resnet-50": 25_557_032, "resnet-101": 44_549_160,
    "resnet-152": 60_192_808,
}  # fmt: skip

# One of each family and shape: few blocks, all else as published.
BUILT = (
    "llama-3.2-1b", "llama-2-7b", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2b", "gemma-2-2b",
    "gemma-3-1b", "gemma-3-4b", "phi-3-mini", "phi-4-mini", "mixtral-8x7b", "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b", "gpt2", "bert-base-uncased", "vit-base", "dinov2-small", "dinov2-giant",
    "resnet-18", "resnet-50",
)  # fmt: skip
HEADS = {
    "gpt2": "AutoModelForCausalLM", "bert": "AutoModel", "dinov2": "AutoModel",
    "vit": "AutoModelForImageClassification", "resnet": "AutoModelForImageClassification",
    "gemma3": "AutoModelForImageTextToText",
}  # fmt: skip


def build(config: Mapping[str, Any], auto: str) -> nn.Module:
    """The model that transformers makes of a configuration, without memory for its weights."""
    import transformers
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    made = AutoConfig.for_model(config["model_type"], **values)
    with torch.device("meta"):
        return vars(transformers).get(auto, getattr(transformers, auto)).from_config(made)


def linear_layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    from transformers.pytorch_utils import Conv1D

    shapes = {path: tuple(m.weight.shape) for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return shapes | {
        path: tuple(m.weight.T.shape) for path, m in model.named_modules() if isinstance(m, Conv1D)
    }


def check_against(model: nn.Module, facts: ModelFacts) -> None:
    ours = {path: m.shape for m in facts.modules if m.kind == "linear" for path in m.paths()}
    assert ours == linear_layers(model)
    convolutions = {p: tuple(m.weight.shape) for p, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {path: m.shape for m in facts.modules if m.kind == "conv" for path in m.paths()} == convolutions
    names = {name for name, _ in model.named_parameters()}
    paths = {name.removesuffix(".weight") for name in names}
    paths -= {name for name in names if name.removesuffix(".bias") + ".weight" in names - {name}}
    assert {path for m in facts.modules if not m.shared for path in m.paths()} == paths
    assert facts.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", BUILT)
def test_modules_are_those_of_transformers(name: str) -> None:
    config = table.config_of(name)
    assert config is not None
    small: dict[str, Any] = {"num_hidden_layers": 2} if "num_hidden_layers" in config else {}
    if "n_layer" in config:
        small = {"n_layer": 2}
    if "text_config" in config:
        vision = {**config["vision_config"], "num_hidden_layers": 2, "vision_use_head": False}
        small = {"text_config": {**config["text_config"], "num_hidden_layers": 2}, "vision_config": vision}
    config = {**config, **small}
    model = build(config, HEADS.get(config["model_type"], "AutoModelForCausalLM"))
    check_against(model, facts_of(config, name, "here"))


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("bert", "BertForMaskedLM"), ("bert", "BertForSequenceClassification"), ("bert", "BertForPreTraining"),
        ("vit", "ViTModel"), ("dinov2", "Dinov2ForImageClassification"), ("resnet", "ResNetModel"),
    ],
)  # fmt: skip
def test_heads(kind: str, architecture: str) -> None:
    import transformers

    name = {"bert": "bert-base-uncased", "vit": "vit-base", "dinov2": "dinov2-small", "resnet": "resnet-34"}[
        kind
    ]
    config = {**(table.config_of(name) or {}), "architectures": [architecture], "num_labels": 7}
    model = build(config, "AutoModel")
    with torch.device("meta"):
        model = getattr(transformers, architecture)(model.config)
    check_against(model, facts_of(config, name, "here"))


def test_published_totals() -> None:
    found = {name: facts_of(config, name, "table").parameters for name, config in table.known_configs()}
    assert {name: found[name] for name in PUBLISHED} == PUBLISHED
    assert len(found) >= 70
    assert all(total > 10**7 for total in found.values())


def test_experts_that_one_token_meets() -> None:
    # "47B parameters, 13B active" of the Mixtral paper (2401.04088); Qwen's 3B of 30B and 22B of 235B.
    assert find_facts("mixtral-8x7b").active_parameters == 12_879_925_248
    assert round(find_facts("qwen3-30b-a3b").active_parameters / 1e9, 1) == 3.4
    assert round(find_facts("qwen3-235b-a22b").active_parameters / 1e9) == 22


@pytest.mark.parametrize(
    ("written", "total"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616), ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552), ("Qwen/Qwen2.5-Coder-7B", 7_615_616_512),
        ("google/gemma-2-2b-it", 2_614_341_888), ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008), ("smollm2-135m-instruct", 134_515_008),
        ("openai-community/gpt2-xl", 1_557_611_200), ("google/vit-base-patch16-224", 86_567_656),
        ("facebook/dinov2-giant", 1_136_480_768), ("llama3-8b", 8_030_261_248), ("LLaMA-7B", 6_738_415_616),
    ],
)  # fmt: skip
def test_usual_names(written: str, total: int) -> None:
    assert find_facts(written).parameters == total


def test_one_matrix() -> None:
    facts = find_facts("4096x1024")
    assert (facts.parameters, facts.modules[0].matrix) == (4_194_304, (4096, 1024))


# ------------------------------------------------------------------------------------------------- files


def small_llama(folder: Path, *, tied: bool, shards: int, kind: str = "llama") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        vocab_size=200, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="60KB" if shards > 1 else "1GB")
    if kind != "llama":
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, "model_type": kind}))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_folder_by_configuration_and_by_headers(tmp_path: Path, tied: bool) -> None:
    known = find_facts(str((small_llama(tmp_path / "a", tied=tied, shards=1), tmp_path / "a")[1]))
    model = small_llama(tmp_path / "b", tied=tied, shards=4, kind="nobody_knows")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    headers = find_facts(str(tmp_path / "b"))
    check_against(model, known)
    assert (known.family, known.tied) == ("llama", tied)
    assert (headers.family, headers.parameters) == ("unknown", known.parameters)
    linear = {p: m.shape for m in headers.modules if m.kind == "linear" for p in m.paths()}
    expected = {path: shape for path, shape in linear_layers(model).items() if path != "lm_head" or not tied}
    assert linear == expected
    assert headers.head == (None if tied else "lm_head")
    kinds = Counter(m.kind for m in headers.modules)
    assert kinds == {"linear": 7 + (not tied), "embedding": 1, "norm": 3}


def test_single_file_and_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"layer.weight": np.zeros((4, 6), "float32"), "layer.bias": np.zeros(4, "float32")}, path)
    facts = find_facts(str(path))
    assert (facts.parameters, facts.modules[0].extra) == (28, 4)
    whole = path.read_bytes()
    faults = {
        "cut": whole[:20], "empty": b"", "long": (10**12).to_bytes(8, "little") + whole[8:],
        "shape": struct.pack("<Q", 36) + b'{"a": {"shape": ["x"], "dtype": ""}} ',
        "no shape": struct.pack("<Q", 11) + b'{"a": {} }  ', "list": struct.pack("<Q", 4) + b"[1] ",
    }  # fmt: skip
    for content in faults.values():
        path.write_bytes(content)
        with pytest.raises(ModelError, match="no usable weight file"):
            find_facts(str(path))


def gguf_text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def write_gguf(
    path: Path, architecture: str, fields: dict[str, int], tensors: dict[str, tuple[int, ...]]
) -> None:
    """A GGUF file with settings and a table of tensors; the numbers themselves are left out."""
    told = {f"{architecture}.{key}": value for key, value in fields.items()}
    data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(told) + 2)
    data += gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text(architecture)
    words = b"".join(gguf_text(word) for word in ("a", "b"))
    data += gguf_text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + words
    for key, value in told.items():
        data += gguf_text(key) + struct.pack("<II", 4, value)
    for name, shape in tensors.items():
        data += gguf_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        data += struct.pack("<IQ", 0, 0)
    path.write_bytes(data)


LLAMA_FIELDS = {
    "embedding_length": 576, "block_count": 30, "attention.head_count": 9, "attention.head_count_kv": 3,
    "feed_forward_length": 1536, "context_length": 2048,
}  # fmt: skip


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, "llama", LLAMA_FIELDS, {"token_embd.weight": (49152, 576)})
    facts = find_facts(str(path))
    assert (facts.family, facts.parameters, facts.tied, facts.context) == ("llama", 134_515_008, True, 2048)
    write_gguf(path, "strange", {}, {"token_embd.weight": (10, 4), "blk.0.x.weight": (4, 4)})
    assert find_facts(str(path)).parameters == 56
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ModelError, match="not a usable GGUF"):
        find_facts(str(path))


def test_hub_cache_is_read_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "models--some--model"
    small_llama(folder / "snapshots" / "abc", tied=True, shards=1)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert find_facts("some/model").parameters == find_facts(str(folder / "snapshots" / "abc")).parameters
    assert find_facts("some/model", "abc").family == "llama"


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-2-8b", "did you mean .*llama-2-7b"), ("./nowhere", "there is no model"),
        ("no model at all", "owner/name"), ("0x5", "is empty"), ("owner/unheard-of", "cannot get config.json"),
        ("a" * 5000, "owner/name"), ("a\0b", "owner/name"),
    ],
)  # fmt: skip
def test_unknown_names(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=message):
        find_facts(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "no hidden_size"), ({"hidden_size": "48"}, "hidden_size .* cannot be '48'"),
        ({"num_hidden_layers": 10**12}, "cannot be"), ({"model_type": "nobody"}, "not in the table"),
        ({"model_type": ["llama"]}, "not in the table"), ({"vocab_size": True}, "cannot be True"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {**(table.config_of("smollm2-135m") or {}), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        find_facts(str(tmp_path))


def test_folder_without_anything(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        find_facts(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        find_facts(str(tmp_path))
