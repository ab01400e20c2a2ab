"""Loading quantised, tensor by tensor, against loading dense and quantising afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.config.quantization import Quantization
from lorakit.errors import ModelError, TargetError
from lorakit.models.load import dense_weights, load_model
from lorakit.models.quantized import quantization_of, quantize_model
from lorakit.models.sources import locate
from lorakit.quant.modules import QuantLinear

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama, tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**GROUPED),
    "qwen2, with biases": transformers.Qwen2Config(**GROUPED),
    "gemma": transformers.GemmaConfig(**GROUPED, head_dim=16),
    "phi3, fused projections": transformers.Phi3Config(**GROUPED),
    "gpt2, transposed": transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=32
    ),
    "mixtral, experts fused in loading": transformers.MixtralConfig(**GROUPED, num_local_experts=3),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "opt, other names": transformers.OPTConfig(
        vocab_size=96, hidden_size=64, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=64,
    ),
}  # fmt: skip
IDS = torch.tensor([[5, 17, 3, 80, 41, 9]])
KINDS = {
    "nf4": Quantization(),
    "fp4": Quantization(kind="fp4", double=False),
    "int8": Quantization(kind="int8", double=False),
}


def saved(config: transformers.PreTrainedConfig, folder: Path, **how: object) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms, too
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **how)
    return folder


def packed(model: nn.Module) -> dict[str, Tensor]:
    layers = {path: m for path, m in model.named_modules() if isinstance(m, QuantLinear)}
    return {f"{path}.{key}": t for path, m in layers.items() for key, t in m.tensors().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    assert left and left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(FAMILIES["llama"], tmp_path_factory.mktemp("llama"), max_shard_size="60KB")


@pytest.mark.parametrize("name", FAMILIES)
def test_as_if_loaded_dense_and_quantised_then(name: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[name], tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize_model(expected.requires_grad_(False))
    model = load_model(locate(str(folder)), precision="fp32", quantization=Quantization())
    assert same(packed(model), packed(expected))
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    tied = model.config.tie_word_embeddings
    assert (head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_alone_decides_the_codes(llama: Path, kind: str) -> None:
    full, half = (
        load_model(locate(str(llama)), precision=precision, quantization=KINDS[kind])
        for precision in ("fp32", "bf16")
    )
    assert same(packed(full), packed(half))
    assert (full.lm_head.weight.dtype, half.lm_head.weight.dtype) == (torch.float32, torch.bfloat16)
    assert {m.compute_dtype for m in half.modules() if isinstance(m, QuantLinear)} == {torch.bfloat16}
    found = quantization_of(half)
    assert found is not None
    assert (found.kind, found.double) == (kind, KINDS[kind].double)


def test_nothing_of_the_loading_stays(llama: Path) -> None:
    model = load_model(locate(str(llama)), precision="fp32", quantization=Quantization())
    plain = load_model(locate(str(llama)), precision="fp32")
    assert not hasattr(model, "hf_quantizer")
    assert "quantization_config" not in model.config.to_dict()
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_the_compute_format_can_differ(llama: Path) -> None:
    chosen = Quantization(compute="bf16")
    model = load_model(locate(str(llama)), precision="fp32", quantization=chosen)
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32


def test_modules_to_skip(llama: Path) -> None:
    chosen = Quantization(skip=("down_proj", "layers.0.self_attn", "lm_head"))
    model = load_model(locate(str(llama)), precision="fp32", quantization=chosen)
    dense = {path for path, m in model.named_modules() if type(m) is nn.Linear}
    first = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
    assert dense == {"lm_head", *first, *(f"model.layers.{i}.mlp.down_proj" for i in range(2))}
    with pytest.raises(TargetError, match="the model has no module 'down_projj'"):
        load_model(locate(str(llama)), precision="fp32", quantization=Quantization(skip=("down_projj",)))


@pytest.mark.parametrize("quantization", [None, Quantization()])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none(
    tmp_path: Path, tiny_llama: Path, quantization: Quantization | None, value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(ModelError, match=f"NaN or infinity in {name}"):
        load_model(locate(str(tmp_path)), precision="bf16", quantization=quantization)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    saved(FAMILIES["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"the wrong shape for model.layers.0.mlp.down_proj.weight"):
        load_model(locate(str(tmp_path)), precision="fp32", quantization=Quantization())
    more = {**config, "num_hidden_layers": 3, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(more))
    with pytest.raises(ModelError, match=r"the weights lack model.layers.2.input_layernorm.weight"):
        load_model(locate(str(tmp_path)), precision="fp32", quantization=Quantization())


def test_a_model_without_linear_layers_of_a_known_kind(tmp_path: Path) -> None:
    config = transformers.FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(TargetError, match="no linear layer to quantise"):
        load_model(locate(str(saved(config, tmp_path))), precision="fp32", quantization=Quantization())


@pytest.mark.parametrize("name", ["llama", "gpt2, transposed", "opt, other names"])
def test_the_dense_weights_of_a_quantised_model(name: str, tmp_path: Path) -> None:
    source = locate(str(saved(FAMILIES[name], tmp_path, max_shard_size="60KB")))
    model = load_model(source, precision="bf16", quantization=Quantization())
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    read = dense_weights(source, model)
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            weight = dense.get_submodule(path).weight
            assert torch.equal(read(path), weight.T if module.transposed else weight)


PEAK = """
import sys, tempfile
from pathlib import Path
import torch, transformers
from lorakit import hardware
from lorakit.config.quantization import Quantization
from lorakit.models.load import load_model
from lorakit.models.sources import locate

def load(folder):
    return load_model(locate(folder), precision="bf16", quantization=Quantization(kind="int8", double=False))

with tempfile.TemporaryDirectory() as folder:  # code and caches that any loading needs
    small = transformers.LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    transformers.LlamaForCausalLM(small).save_pretrained(folder)
    load(folder)
hardware.give_back_memory()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
base = hardware.memory_peak()
model = load(sys.argv[1])
size = sum(t.nbytes for t in model.state_dict().values())
print(hardware.memory_peak() - base, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_stays_near_that_of_the_result(tmp_path: Path) -> None:
    """In a fresh process: at most twice the largest tensor above what the model has in the end."""
    config = transformers.LlamaConfig(
        vocab_size=16384, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
    )
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    weights = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in empty.state_dict().items()}
    names = sorted(weights)
    for i in range(4):
        part = {name: weights[name] for name in names[i::4]}
        save_file(part, tmp_path / f"model-{i}.safetensors", metadata={"format": "pt"})
    index = {name: f"model-{names.index(name) % 4}.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config.save_pretrained(tmp_path)
    largest, dense = max(w.nbytes for w in weights.values()), sum(w.nbytes for w in weights.values())
    del weights
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peak, size = map(int, found.stdout.splitlines()[-1].split())
    assert size + 2 * largest < dense, "the bound would hold for a loader that keeps everything"
    assert size < peak <= size + 2 * largest
