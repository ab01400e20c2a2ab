"""What `lorakit inspect` says: each number against its definition on the dense update."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.checkpoint.inspect import (
    Inspection,
    effective_rank,
    inspect,
    singular_values,
    stable_rank,
    tensor_facts,
)
from lorakit.checkpoint.peft_format import save_adapter
from lorakit.cli.main import main

WEIGHTS = "adapter_model.safetensors"
Run = Callable[..., tuple[int, str, str]]


class Net(nn.Module):
    """One module of every host."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 10)
        self.embed = nn.Embedding(12, 6)
        self.conv = nn.Conv2d(4, 8, 3)
        self.grouped = nn.Conv1d(4, 8, 3, groups=2)


def filled(**settings: Any) -> nn.Module:
    """An adapter on every module whose tensors are all random."""
    settings = {"r": 4, "target_modules": "linear,embed,conv,grouped", "seed": 1} | settings
    model = add_lora_to_model(Net(), **settings)
    generator = Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for name, parameter in layer.adapters["default"].named_parameters():
                if "magnitude" not in name:
                    parameter.normal_(generator=generator)
    return model


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """Module → ΔW [out, …], dense, from what a merge would do."""
    found = {}
    for path, layer in adapter_layers(model).items():
        delta = (layer.merged_weight() - layer.dense_weight()).detach()
        if path == "grouped":  # as a map from all inputs
            delta = torch.stack([torch.block_diag(*tap.chunk(2)) for tap in delta.unbind(2)], 2)
        found[path] = delta
    return found


def numbers(matrix: Tensor) -> tuple[float, float, float]:
    """Norm, effective and stable rank of a dense matrix, by their definitions."""
    values = torch.linalg.svdvals(matrix.double())
    p = values[values > 1e-6 * values[0]] / values.sum()
    norm = float(matrix.double().norm())
    return norm, math.exp(-float((p * p.log()).sum())), (norm / float(values[0])) ** 2


def check_updates(found: Inspection, expected: dict[str, Tensor]) -> None:
    assert len(expected) > 0
    assert {update.module for update in found.updates} == expected.keys()
    for update in found.updates:
        delta = expected[update.module].flatten(1)
        ours = (update.norm, update.effective_rank, update.stable_rank)
        assert ours == pytest.approx(numbers(delta), rel=1e-4), update.module


# ---------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(("out", "width", "r"), [(7, 11, 3), (11, 7, 3), (5, 6, 9), (4, 4, 1), (1, 9, 4)])
def test_singular_values_are_those_of_the_product(out: int, width: int, r: int) -> None:
    generator = Generator().manual_seed(out * width)
    A = torch.randn(r, width, dtype=torch.float64, generator=generator)
    B = torch.randn(out, r, dtype=torch.float64, generator=generator)
    dense = torch.linalg.svdvals(B @ A)
    ours = singular_values(A, B)
    count = min(r, out, width)
    torch.testing.assert_close(ours[:count], dense[:count], rtol=1e-10, atol=1e-12)
    assert float(dense[count:].sum() + ours[count:].sum()) < 1e-10


def test_ranks_that_are_known() -> None:
    for r in (1, 2, 5):
        equal = torch.full((r,), 0.3, dtype=torch.float64)
        assert effective_rank(equal) == pytest.approx(r)
        assert stable_rank(equal) == pytest.approx(r)
    one = torch.tensor([4.0, 0.0, 0.0])
    assert (effective_rank(one), stable_rank(one)) == (1.0, 1.0)
    assert (effective_rank(torch.zeros(3)), stable_rank(torch.zeros(3))) == (0.0, 0.0)
    assert (effective_rank(torch.zeros(0)), stable_rank(torch.zeros(0))) == (0.0, 0.0)
    # p = (3/4, 1/4): H = 2 ln 2 - 3/4 ln 3
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert stable_rank(torch.tensor([3.0, 1.0])) == pytest.approx(10 / 9)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64]
)
def test_norms_of_every_format(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 2], [2, 4, 0.0]]).to(dtype)
    facts = tensor_facts("x", tensor.shape, "any", [tensor[:1], tensor[1:]])
    assert facts.norm == pytest.approx(2 if dtype == torch.bool else 5)
    assert facts.finite
    assert facts.values == 6


def test_values_that_are_not_finite() -> None:
    for value in (math.nan, math.inf, -math.inf):
        facts = tensor_facts("x", (3,), "float32", [torch.tensor([1.0, value, 2.0])])
        assert (facts.norm, facts.finite) == (None, False)
    huge = tensor_facts("x", (2,), "float64", [torch.tensor([1e300, 1e300], dtype=torch.float64)])
    assert (huge.norm, huge.finite) == (None, True)


# ----------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {"conv": 2}, "alpha_pattern": {"linear": 100}},
        {"target_modules": "linear", "init_lora_weights": "pissa"},
        {"target_modules": "linear,conv", "method": "adalora"},
    ],
)
@pytest.mark.parametrize("name", ["adapter", "adapter.pth"])
def test_updates_of_our_adapters(tmp_path: Path, settings: dict[str, Any], name: str) -> None:
    model = filled(**settings)
    found = inspect(save_adapter(model, tmp_path / name))
    check_updates(found, deltas(model))
    assert (found.dead, found.non_finite, found.problems) == ([], [], [])
    assert found.notes["base"]["parameters"] == sum(p.numel() for p in Net().parameters())


def test_dora_is_judged_by_its_direction(tmp_path: Path) -> None:
    plain, dora = filled(target_modules="linear"), filled(target_modules="linear", use_dora=True)
    found = inspect(save_adapter(dora, tmp_path / "adapter"))
    check_updates(found, deltas(plain))
    assert [tensor.name for tensor in found.tensors if tensor.name.endswith("lora_magnitude_vector")] != []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=12, target_modules=["linear", "embed", "conv"], init_lora_weights=False),
        AdaLoraConfig(
            init_r=5, lora_alpha=12, target_modules=["linear"], total_step=10, init_lora_weights=False
        ),
    ],
)
def test_updates_of_peft_adapters(tmp_path: Path, config: Any) -> None:
    model = get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    layers = {
        path: layer for path, layer in model.base_model.model.named_children() if hasattr(layer, "lora_A")
    }
    layers = {path: layer for path, layer in layers.items() if path in config.target_modules}
    expected = {path: layer.get_delta_weight("default").detach() for path, layer in layers.items()}
    check_updates(inspect(tmp_path), expected)


def test_a_run_folder_and_single_files(tmp_path: Path) -> None:
    model = filled()
    folder = save_adapter(model, tmp_path / "run" / "adapter")
    found = inspect(tmp_path / "run")
    assert found.path == str(folder)
    assert found == inspect(folder)
    alone = inspect(folder / WEIGHTS)
    assert (alone.kind, alone.tensors, alone.config) == ("safetensors file", found.tensors, {})
    scaling = {update.module: update.scaling for update in found.updates}
    assert set(scaling.values()) == {2.0}
    assert all(update.scaling is None for update in alone.updates)
    halves = {update.module: update.norm / 2 for update in found.updates}
    assert {update.module: update.norm for update in alone.updates} == pytest.approx(halves)


def spoiled(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Inspection:
    folder = save_adapter(filled(), tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return inspect(folder)


PREFIX = "base_model.model."


def test_dead_and_broken_updates_are_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}linear.lora_B.weight"].zero_()
        tensors[f"{PREFIX}embed.lora_embedding_A"][0, 1] = math.nan
        del tensors[f"{PREFIX}conv.lora_A.weight"]
        tensors[f"{PREFIX}grouped.lora_B.weight"] = torch.ones(8, 3, 1)

    found = spoiled(tmp_path, change)
    assert found.dead == ["linear"]
    assert found.non_finite == [f"{PREFIX}embed.lora_embedding_A"]
    assert [update.module for update in found.updates] == ["linear"]
    dead = found.updates[0]
    assert (dead.norm, dead.effective_rank, dead.stable_rank) == (0.0, 0.0, 0.0)
    assert sorted(found.problems) == [
        "conv: its tensors do not make an update (B (8, 4, 1, 1))",
        "grouped: its tensors do not make an update (A (4, 4, 3), B (8, 3, 1))",
    ]


def test_a_description_that_cannot_be_used(tmp_path: Path) -> None:
    folder = save_adapter(filled(), tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": "much"}))
    found = inspect(folder)
    assert all(update.scaling is None for update in found.updates)
    assert len(found.problems) == 1
    assert found.problems[0].startswith("norms are without the scaling: not a usable adapter description: ")
    assert found.config["lora_alpha"] == "much"


# ---------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """Metadata of every type, and tensors in four number formats."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_bool("some.switch", True)
    writer.add_uint64("some.count", 7)
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer.add_tensor("plain.weight", values)
    writer.add_tensor("half.weight", values.astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
        writer.add_tensor(f"{kind.name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("codes", np.arange(6, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main(["inspect", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


def test_gguf(gguf_file: Path, run: Run) -> None:
    status, out, _ = run(gguf_file, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["kind"] == "GGUF file"
    rows = {row["name"]: row for row in found["tensors"]}
    assert {name: (row["shape"], row["dtype"]) for name, row in rows.items()} == {
        "plain.weight": ([4, 64], "F32"),
        "half.weight": ([4, 64], "F16"),
        "Q8_0.weight": ([4, 64], "Q8_0"),
        "Q4_1.weight": ([4, 64], "Q4_1"),
        "codes": ([6], "I32"),
    }
    exact = float(np.linalg.norm(np.random.default_rng(0).normal(size=(4, 64))))
    for name, tolerance in (("plain", 1e-6), ("half", 1e-3), ("Q8_0", 1e-2), ("Q4_1", 5e-2)):
        assert rows[f"{name}.weight"]["norm"] == pytest.approx(exact, rel=tolerance)
    assert rows["codes"]["norm"] is None  # the library unpacks numbers of networks only
    assert found["non_finite"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cannot mmap an empty file"),
        (lambda data: b"GG", "it ends too early"),
        (lambda data: b"PK\x03\x04" + data[4:], "it begins with b'PK\\x03\\x04' instead of b'GGUF'"),
        (lambda data: data[:4] + b"\x09" + data[5:], "version 9 is not one of (2, 3)"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "it claims 18446744073709551615 entries"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "it claims 18446744073709551615 entries"),
        (lambda data: data[:24] + b"\xff" * 8 + data[32:], "it ends too early"),
        (lambda data: data.replace(b"tokens\x09", b"tokens\x63"), "unknown type 99 in its metadata"),
        (lambda data: data.replace(b"plain.weight\x02", b"plain.weight\x63"), "has 99 dimensions"),
        (lambda data: data[:-200], "claims bytes beyond its end"),
        (lambda data: data[:300], "it ends too early"),
    ],
)
def test_gguf_that_lies(gguf_file: Path, run: Run, change: Callable[[bytes], bytes], message: str) -> None:
    data = gguf_file.read_bytes()
    changed = change(data)
    assert changed != data
    gguf_file.write_bytes(changed)
    status, out, err = run(gguf_file)
    assert (status, out) == (4, "")
    assert err.startswith("error[E-MODEL]: this is not a usable GGUF file: ")
    assert message in err
    assert f"--> {gguf_file}" in err


# ---------------------------------------------------------------------------------------------------- verb


def test_text(tmp_path: Path, run: Run) -> None:
    folder = save_adapter(filled(), tmp_path / "adapter", base_model="tiny", notes={"system": "Hi."})
    status, out, err = run(folder, "--limit", 2)
    assert (status, err) == (0, "")
    head, updates, tensors = out.rstrip("\n").split("\n\n")
    facts = dict(line.split(maxsplit=1) for line in head.splitlines() if not line.startswith("base "))
    assert facts["kind"] == "adapter folder"
    assert facts["base_model_name_or_path"] == "tiny"
    assert facts["system"] == "Hi."
    assert facts["tensors"] == "8"
    assert "base weights" in head
    columns = ["module", "r", "scaling", "norm of ΔW", "effective rank", "stable rank"]
    columns += ["rank 90 %", "rank 99 %"]
    assert re.split(r"  +", updates.splitlines()[0]) == columns
    assert len(updates.splitlines()) == 4
    assert updates.endswith("… 2 more (--limit 0 shows all)")
    assert tensors.endswith("… 6 more (--limit 0 shows all)")
    everything = run(folder, "--limit", 0)[1]
    assert "more" not in everything
    assert f"{PREFIX}conv.lora_A.weight" in everything
    assert "4×4×3×3" in everything


def test_trouble_is_shown(tmp_path: Path, run: Run) -> None:
    model = filled(target_modules="linear,conv")
    adapter_layers(model)["conv"].adapter("default").lora_B.data.zero_()
    folder = save_adapter(model, tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{PREFIX}linear.lora_A.weight"][0, 0] = math.inf
    save_file({**tensors, "\x1b[2Jgone": torch.zeros(1)}, folder / WEIGHTS)
    status, out, _ = run(folder)
    assert status == 0
    assert "dead (ΔW = 0): conv" in out
    assert f"NaN or infinity in: {PREFIX}linear.lora_A.weight" in out
    assert "\\x1b[2Jgone" in out
    assert "\x1b" not in out
    found = json.loads(run(folder, "--json")[1])
    assert found["dead"] == ["conv"]
    assert found["non_finite"] == [f"{PREFIX}linear.lora_A.weight"]


def test_json_has_everything(tmp_path: Path, run: Run) -> None:
    folder = save_adapter(filled(), tmp_path)
    found = json.loads(run(folder, "--json", "--limit", 1)[1])
    assert len(found["tensors"]) == 8
    assert len(found["updates"]) == 4
    assert found["config"]["peft_type"] == "LORA"
    assert found["notes"]["base"].keys() == {"parameters", "shapes", "weights"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "cannot read nowhere: No such file or directory"),
        ("nowhere.pth", "cannot read nowhere.pth: No such file or directory"),
        ("nowhere.safetensors", "cannot read nowhere.safetensors: No such file or directory"),
        ("nowhere.gguf", "cannot read nowhere.gguf: No such file or directory"),
        ("folder", "neither an adapter folder nor a run folder: there is no adapter_config.json"),
        ("notes.txt", "a file of kind '.txt' cannot hold weights here"),
        ("empty.pth", "cannot read the weights: it is not an archive of torch.save"),
        ("empty.safetensors", "cannot read the weights: its header claims 0 bytes, the file has 0"),
    ],
)
def test_what_is_unusable_ends_with_four(tmp_path: Path, run: Run, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    for empty in ("notes.txt", "empty.pth", "empty.safetensors"):
        (tmp_path / empty).touch()
    status, out, err = run(tmp_path / name)
    assert (status, out) == (4, "")
    assert message in err.splitlines()[0]
    assert json.loads(run(tmp_path / name, "--json")[2])["message"].startswith(message)
