"""Where models come from, what is refused before anything is loaded, and what a loaded one is like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as chatter

from lorakit.config.quantization import Quantization
from lorakit.errors import ModelError
from lorakit.modelinfo.demo import DEMO_MODEL
from lorakit.models.load import check_vocabulary, load_model, load_tokenizer
from lorakit.models.quantized import quantize_model
from lorakit.models.sources import ModelSource, local_folder, locate

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty cache, except for the tests of the real model."""
    folder = tmp_path / "cache"
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("LORAKIT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama with random weights and a byte-level vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = SPECIAL + sorted(ByteLevel.alphabet()) + ["he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["h e", "l l"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    shapes = {
        "token_embd.weight": (len(tokens), 16),
        "output_norm.weight": (16,),
        "blk.0.attn_norm.weight": (16,),
        "blk.0.ffn_norm.weight": (16,),
        "blk.0.attn_q.weight": (16, 16),
        "blk.0.attn_k.weight": (8, 16),
        "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_output.weight": (16, 16),
        "blk.0.ffn_gate.weight": (32, 16),
        "blk.0.ffn_up.weight": (32, 16),
        "blk.0.ffn_down.weight": (16, 32),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(name: str | Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        locate(str(name))
    return caught.value


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder(tiny_llama: Path) -> None:
    source = locate(str(tiny_llama))
    assert source == ModelSource(str(tiny_llama), "folder", tiny_llama)
    assert local_folder(source) == tiny_llama
    assert (source.hub_id, source.license) == (None, None)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "owner/name.v1_x"])
def test_a_hub_id(name: str) -> None:
    source = locate(name, "v1.0")
    assert source == ModelSource(name, "hub", None, "v1.0")
    assert source.hub_id == name


@pytest.mark.parametrize("name", ["no spaces", "a--b", "a..b", "owner/-name", "name.", "what?", ""])
def test_names_that_are_no_hub_id(name: str, tmp_path: Path) -> None:
    if name:
        error = refused(name)
        assert error.message == f"`{name}` is no model: no such folder, and not a hub id"
        assert DEMO_MODEL in str(error.remedy)
    else:
        assert "no config.json" in refused(tmp_path).message


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "a/b/c"])
def test_paths_that_do_not_exist(name: str) -> None:
    assert refused(name).message == f"there is no folder `{name}`"


def test_a_file_is_no_model(folder: Path) -> None:
    error = refused(folder / "model.safetensors")
    assert error.message.endswith("is a file, but not a .gguf file")
    assert error.remedy == "name the folder it is in"


def test_a_revision_of_something_local(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="revision `main` is for hub models"):
        locate(str(tiny_llama), "main")


def test_a_folder_without_a_model_lists_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    error = refused(tmp_path)
    assert error.message == "this folder holds no model: there is no config.json in it"
    assert str(error.remedy).startswith("found notes.txt; name a folder made by `save_pretrained`")


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder)
    assert error.message == ("the weights are pickled (pytorch_model.bin), and reading a pickle can run code")
    assert "save_pretrained" in str(error.remedy)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder).message == "missing weights: model.safetensors"


@pytest.mark.parametrize("keep", [0, 6, 500, -1000])
def test_cut_weights(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    error = refused(folder)
    assert error.message.startswith("model.safetensors is damaged or incomplete")
    assert error.place == str(path)


def test_a_web_page_saved_as_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    assert refused(folder).message.startswith("model.safetensors is damaged or incomplete")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "sub/shard.safetensors", "..\\x", "..", "x.bin"]
)
def test_an_index_that_leaves_its_folder(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    assert refused(folder).message == (
        f"model.safetensors.index.json names something other than a weight file beside it: `{name}`"
    )


def test_a_missing_shard(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "part2.safetensors"}}))
    assert refused(folder).message == "missing weights: part2.safetensors"
    index.write_text("{}")
    assert refused(folder).message == "model.safetensors.index.json has no `weight_map`"


def test_a_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert refused(folder).message.startswith("config.json is not valid JSON")
    (folder / "config.json").write_text("[]")
    assert refused(folder).message == "config.json is not a JSON object"


def test_quantized_weights(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "gptq"})
    message = "the weights in this folder are quantised with gptq, which cannot be read here"
    assert refused(folder).message == message


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "it ends within its header (0 bytes)"),
        (b"GGUF\3\0\0\0", "it ends within its header (8 bytes)"),
        (b"<html><title>404</title></html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"PK\3\4 and so on and so on and so on", r"it begins with b'PK\x03\x04' instead of b'GGUF'"),
    ],
)
def test_files_that_are_no_gguf(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert refused(path).message.startswith(f"this is not a GGUF file: {cause}")


def test_a_missing_gguf(tmp_path: Path) -> None:
    assert (
        refused(tmp_path / "no.gguf").message
        == f"cannot read {tmp_path / 'no.gguf'}: No such file or directory"
    )


@pytest.mark.parametrize("keep", [100, 3000, -100])
def test_a_cut_gguf_leaves_nothing_behind(tiny_gguf: Path, tmp_path: Path, cache: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:keep])
    assert refused(path).message.startswith("this is not a usable GGUF file: ")
    assert not (cache / "models").exists()


def test_a_gguf_of_an_unknown_architecture_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "martian")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="this GGUF file cannot be converted"):
        local_folder(locate(str(tmp_path / "odd.gguf")))
    assert [made.name for made in (cache / "models").iterdir() if made.is_dir()] == []


def test_a_gguf_becomes_a_plain_folder_once(tiny_gguf: Path, cache: Path, capfd: pytest.CaptureFixture) -> None:
    bars = chatter.is_progress_bar_enabled()
    source = locate(str(tiny_gguf))
    folder = local_folder(source)
    assert capfd.readouterr() == ("", "")
    assert chatter.is_progress_bar_enabled() == bars
    assert source == ModelSource(str(tiny_gguf), "gguf", tiny_gguf)
    assert folder.parent == cache / "models"
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert local_folder(source) == local_folder(source, weights=False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    embedding = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(embedding, written["token_embd.weight"])
    assert model.dtype == torch.float32
    assert (model.generation_config.eos_token_id, tokenizer.eos_token) == (2, "<|im_end|>")
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.model_max_length == 64


def test_a_gguf_is_quantised_without_a_dense_copy(tiny_gguf: Path, cache: Path) -> None:
    source = locate(str(tiny_gguf))
    model = load_model(source, precision="fp32", quantization=Quantization())
    load_tokenizer(source)
    (made,) = (path for path in (cache / "models").iterdir() if path.is_dir())
    assert not list(made.glob("*.safetensors"))
    assert model.generation_config.eos_token_id == 2

    expected = quantize_model(load_model(source, precision="fp32"))  # by way of the dense folder
    ids = torch.tensor([[1, 5, 9, 2]])
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.model.layers[0].self_attn.q_proj.name == "nf4"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_loaded_model_is_frozen(tiny_llama: Path, precision: Any, dtype: torch.dtype) -> None:
    model = load_model(locate(str(tiny_llama)), precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    ids = torch.tensor([[1, 5, 9, 2]])
    assert torch.equal(model(ids).logits, stock(ids).logits)


def test_weights_of_another_size(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=96)
    with pytest.raises(ModelError, match=r"the weights have the wrong shape for model.layers.0.mlp.down_proj"):
        load_model(locate(str(folder)), precision="fp32")


def test_weights_that_are_absent(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3, layer_types=None)
    with pytest.raises(ModelError, match=r"the weights lack model.layers.2.input_layernorm.weight") as caught:
        load_model(locate(str(folder)), precision="fp32")
    assert caught.value.place == str(folder)


def test_an_unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="martian")
    with pytest.raises(ModelError, match=r"cannot load the model: .*martian"):
        load_model(locate(str(folder)), precision="fp32")


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit(folder / "config.json", model_type="martian", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelError, match="it needs Python code that came with it") as caught:
        load_model(locate(str(folder)), precision="fp32")
    assert "trust_remote_code: true" in str(caught.value.remedy)


def test_the_end_token_pads_where_there_is_no_other(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(locate(str(folder)))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_a_tokenizer_without_end(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="the tokenizer has no end-of-text token"):
        load_tokenizer(locate(str(folder)))


def test_no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(locate(str(folder)))


def test_a_vocabulary_larger_than_the_embedding(tiny_llama: Path) -> None:
    source = locate(str(tiny_llama))
    model, tokenizer = load_model(source, precision="fp32"), load_tokenizer(source)
    check_vocabulary(model, tokenizer)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=f"token '<new>' has id {rows}, but the embedding has {rows} rows"):
        check_vocabulary(model, tokenizer)


@pytest.mark.parametrize("load", [load_tokenizer, lambda source: load_model(source, precision="fp32")])
def test_a_hub_model_while_offline(load: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load(locate("nobody/nothing-at-all", "v2"))
    assert caught.value.message == (
        "cannot get `nobody/nothing-at-all` at revision `v2`: "
        "it is not in the local cache and the hub cannot be reached"
    )
    assert "HF_HUB_OFFLINE" in str(caught.value.remedy)
    assert DEMO_MODEL in str(caught.value.remedy)


def test_the_demo_model(smollm2: Path) -> None:
    source = locate(DEMO_MODEL)
    assert (source.kind, source.path) == ("alias", smollm2)
    model, tokenizer = load_model(source, precision="fp32"), load_tokenizer(source)
    check_vocabulary(model, tokenizer)
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert not model.generation_config.do_sample
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
