"""Weight files nobody vouches for: refused with exit code 4 before anything is allocated, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.config.quantization import Quantization
from lorakit.errors import ModelError
from lorakit.models.load import load_model
from lorakit.models.quantized import quantize_model
from lorakit.models.sources import locate

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model in three shards, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="160KB")
    assert (folder / FIRST).exists()
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def remap(folder: Path, file: str) -> None:
    """Let the index put its first tensor into ``file``."""
    edit(folder / INDEX, lambda index: index["weight_map"].update({min(index["weight_map"]): file}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_size(path: Path) -> None:
    """A header that promises a terabyte."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / FIRST).rename(outside)
    (folder / FIRST).symlink_to(outside)


def pipe(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)


def copy_shard(folder: Path) -> None:
    """The same tensors twice."""
    shutil.copy(folder / FIRST, folder / "more.safetensors")
    edit(folder / INDEX, lambda index: index["weight_map"].update({"extra": "more.safetensors"}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard that is cut": (lambda f: cut(f / FIRST), f"{FIRST} is damaged or incomplete"),
    "an empty shard": (lambda f: (f / FIRST).write_bytes(b""), f"{FIRST} is damaged or incomplete"),
    "a web page": (
        lambda f: (f / FIRST).write_text("<!DOCTYPE html><html><body>404</body></html>"),
        f"{FIRST} is damaged or incomplete",
    ),
    "a shard that promises a terabyte": (
        lambda f: lie_about_size(f / FIRST), f"{FIRST} is damaged or incomplete",
    ),
    "no shard": (lambda f: (f / FIRST).unlink(), f"missing weights: {FIRST}"),
    "a folder for a shard": (
        lambda f: ((f / FIRST).unlink(), (f / FIRST).mkdir()), f"{FIRST} is not a regular file",
    ),
    "a pipe for a shard": (pipe, f"{FIRST} is not a regular file"),
    "a device": (
        lambda f: ((f / FIRST).unlink(), (f / FIRST).symlink_to("/dev/zero")),
        f"{FIRST} is not a regular file",
    ),
    "a link to nowhere": (
        lambda f: ((f / FIRST).unlink(), (f / FIRST).symlink_to("gone")), f"missing weights: {FIRST}",
    ),
    "a link out of the folder": (link_outside, f"{FIRST} is a link to a file outside its folder"),
    "a path up": (lambda f: remap(f, "../../etc/passwd"), f"{INDEX} names something other than a weight"),
    "an absolute path": (lambda f: remap(f, "/etc/passwd"), f"{INDEX} names something other than a weight"),
    "a pickle": (lambda f: remap(f, "pytorch_model.bin"), f"{INDEX} names something other than a weight"),
    "no text for a file": (lambda f: remap(f, 7), f"{INDEX} names something other than a weight"),
    "an index for other shards": (lambda f: remap(f, "model-00003-of-00003.safetensors"), f"{INDEX} says that"),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX} has no `weight_map`"),
    "an index that is cut": (lambda f: cut(f / INDEX), f"{INDEX} is not valid JSON"),
    "a tensor in two shards": (copy_shard, "is in two files"),
    "a kernel from the hub": (
        lambda f: edit(f / "config.json", lambda c: c.update(attn_implementation="someone/kernel")),
        "config.json asks for code from elsewhere: 'attn_implementation'",
    ),
    "a kernel, deep inside": (
        lambda f: edit(
            f / "config.json", lambda c: c.update(parts=[{"_attn_implementation": {"": "some/kernel"}}])
        ),
        "config.json asks for code from elsewhere: '_attn_implementation'",
    ),
    "trust that it gives itself": (
        lambda f: edit(f / "config.json", lambda c: c.update(text_config={"trust_remote_code": True})),
        "config.json asks for code from elsewhere: 'trust_remote_code'",
    ),
    "another quantisation": (
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
        "the weights in this folder are quantised with awq",
    ),
    "a quantisation that is no mapping": (
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config=[4])),
        "quantization_config is not a JSON object",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_refused_from_the_outside(folder: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(ModelError) as caught:
        locate(str(folder))
    assert caught.value.exit_code == 4
    assert message in caught.value.message
    assert caught.value.place


def test_links_of_the_hubs_cache_are_fine(folder: Path) -> None:
    repository = folder.parent / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(repository / "blobs" / str(number))
    load_model(locate(str(snapshot)), precision="fp32", quantization=Quantization())


def test_a_link_to_the_folder_is_fine(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    load_model(locate(str(link)), precision="fp32")


# ---------------------------------------------------------------------------------- quantised already


@pytest.fixture
def stored(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model as bitsandbytes writes it, to be damaged."""
    folder = tmp_path / "stored"
    shutil.copytree(tiny_llama, folder)
    model = quantize_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    model.save_pretrained(folder)
    described = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }  # fmt: skip
    edit(folder / "config.json", lambda config: config.update(quantization_config=described))
    return folder


def change(folder: Path, update: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    update(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_that_are_quantised_already_load_as_they_are(stored: Path, tiny_llama: Path) -> None:
    expected = quantize_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    ids = torch.tensor([[1, 9, 4, 4]])
    for asked in (None, Quantization()):
        model = load_model(locate(str(stored)), precision="fp32", quantization=asked)
        assert torch.equal(model(ids).logits, expected(ids).logits)
    for other in (Quantization(kind="int8", double=False), Quantization(double=False)):
        with pytest.raises(ModelError, match=f"are nf4 with double quantisation already, not {other}"):
            load_model(locate(str(stored)), precision="fp32", quantization=other)


WEIGHT = "model.layers.0.self_attn.q_proj.weight"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no weight": (lambda t: t.pop(WEIGHT), f"the weights hold constants of {WEIGHT}, but not it"),
    "no constants": (lambda t: t.pop(f"{WEIGHT}.absmax"), WEIGHT),
    "too few constants": (lambda t: t.update({f"{WEIGHT}.absmax": t[f"{WEIGHT}.absmax"][:-1]}), WEIGHT),
    "a state that is no JSON": (
        lambda t: t[f"{WEIGHT}.quant_state.bitsandbytes__nf4"].fill_(123), WEIGHT,
    ),
    "too few codes": (lambda t: t.update({WEIGHT: t[WEIGHT][:-3]}), WEIGHT),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_quantised_weights_that_are_damaged(stored: Path, name: str) -> None:
    update, message = CHANGES[name]
    change(stored, update)
    with pytest.raises(ModelError) as caught:
        load_model(locate(str(stored)), precision="fp32")
    assert message in str(caught.value)


def test_a_configuration_that_only_says_so(folder: Path) -> None:
    described = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    edit(folder / "config.json", lambda config: config.update(quantization_config=described))
    with pytest.raises(ModelError, match="says that the weights are quantised, but none of them is"):
        load_model(locate(str(folder)), precision="fp32")


def test_a_quantised_embedding(stored: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(WEIGHT)]:
            tensors[name.replace(WEIGHT, "model.embed_tokens.weight")] = tensors.pop(name)

    change(stored, rename)
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight is quantised, but not of a linear layer"):
        load_model(locate(str(stored)), precision="fp32")


def test_a_shape_in_the_state_that_is_not_the_models(stored: Path) -> None:
    def turn(tensors: dict[str, torch.Tensor]) -> None:
        key = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist()))
        changed = json.dumps({**state, "shape": [128, 32]}).encode()
        tensors[key] = torch.tensor(list(changed), dtype=torch.uint8)

    change(stored, turn)
    with pytest.raises(ModelError, match=f"the wrong shape for {WEIGHT}"):
        load_model(locate(str(stored)), precision="fp32")
