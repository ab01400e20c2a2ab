"""PEFT as oracle: the same files, the same logits, the same training."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorakit.adapters.attach import adapter_layers, add_lora_to_model, attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.export import export_merged
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.data.encode import Row
from lorakit.errors import AdapterMismatchError, ConflictError
from lorakit.evals.objective import batching
from lorakit.optim.build import build_optimizer
from lorakit.optim.schedule import Schedule
from lorakit.optim.spec import OptimizerSpec
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.training.step import train_step

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODELS = ["tiny_llama", "smollm2"]


@pytest.fixture(params=MODELS)
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tokens(model: nn.Module, *, rows: int = 1, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def fill(model: nn.Module, seed: int = 7) -> None:
    """Random B matrices of the size that training gives them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01, generator=generator)


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny_llama", {"r": 4, "target_modules": ATTENTION}),
        ("tiny_llama", {"r": 3, "lora_alpha": 5.5, "use_rslora": True, "lora_dropout": 0.1}),
        ("smollm2", {"r": 4, "target_modules": ATTENTION}),
    ],
)
def test_our_folder_loads_in_stock_peft(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    base: Path = request.getfixturevalue(name)
    ours = stock(base)
    ids = tokens(ours)
    before = logits(ours, ids)
    add_lora_to_model(ours, seed=1, **settings)
    ours.eval()
    fill(ours)
    expected = logits(ours, ids)
    assert (expected - before).abs().max() > 0.1
    save_adapter(ours, tmp_path / "adapter", base_model=str(base))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = PeftModel.from_pretrained(stock(base), tmp_path / "adapter").eval()
    assert not [str(w.message) for w in seen if "key" in str(w.message)]
    assert (logits(theirs, ids) - expected).abs().max() <= 1e-5
    loaded = {name for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(loaded) == 2 * len(adapter_layers(ours)) > 0


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_a_folder_of_peft_loads_here(tiny_llama: Path, tmp_path: Path, init: Any, use_rslora: bool) -> None:
    torch.manual_seed(2)
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": init, "use_rslora": use_rslora}
    check_loads_here(tiny_llama, tmp_path, PeftConfig(target_modules=[*ATTENTION, "down_proj"], **settings))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["model.layers.1.mlp.up_proj", "o_proj"]])
def test_target_modules_of_peft_mean_the_same_here(tiny_llama: Path, tmp_path: Path, targets: Any) -> None:
    torch.manual_seed(3)
    check_loads_here(tiny_llama, tmp_path, PeftConfig(r=2, target_modules=targets))


def test_a_folder_of_peft_loads_here_on_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    check_loads_here(smollm2, tmp_path, PeftConfig(r=4, target_modules=ATTENTION, use_rslora=True))


def check_loads_here(base: Path, folder: Path, settings: PeftConfig) -> None:
    """An adapter made, filled and saved by PEFT gives the same logits in lorakit."""
    settings.task_type = "CAUSAL_LM"
    theirs = get_peft_model(stock(base), settings).eval()
    fill(theirs)
    theirs.save_pretrained(folder)
    ours = stock(base)
    ids = tokens(ours)
    before = logits(ours, ids)
    config = load_adapter(ours, folder)
    assert (config.r, config.lora_alpha) == (settings.r, settings.lora_alpha)
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() <= 1e-5
    assert (logits(ours, ids) - before).abs().max() > 0.02


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_took_something_out_of_the_base_load_here(
    tiny_llama: Path, tmp_path: Path, init: str
) -> None:
    """PEFT takes their start out of the base weight when it loads them; here it is the anchor."""
    torch.manual_seed(5)
    check_loads_here(tiny_llama, tmp_path, PeftConfig(r=2, target_modules=ATTENTION, init_lora_weights=init))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_every_start_is_a_plain_adapter_for_peft(tiny_llama: Path, tmp_path: Path, init: str) -> None:
    ours = add_lora_to_model(stock(tiny_llama), r=2, target_modules=ATTENTION, init_lora_weights=init, seed=1)
    fill(ours)
    save_adapter(ours, tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (written["r"], written["init_lora_weights"]) == (2 if init == "orthogonal" else 4, True)
    theirs = PeftModel.from_pretrained(stock(tiny_llama), tmp_path / "a").eval()
    ids = tokens(ours)
    assert (logits(theirs, ids) - logits(ours, ids)).abs().max() <= 2e-5
    again = stock(tiny_llama)
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again, ids), logits(ours, ids))


def test_a_random_start_that_changed_the_base_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Randomised PiSSA cannot be taken out again: it differs from run to run."""
    settings = PeftConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa_niter_2")
    get_peft_model(stock(tiny_llama), settings).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match="init_lora_weights = 'pissa_niter_2'"):
        load_adapter(stock(tiny_llama), tmp_path)


def test_adapter_config(tiny_llama: Path, tmp_path: Path) -> None:
    ours = stock(tiny_llama)
    attach(ours, LoRAConfig(r=4, lora_alpha=6, lora_dropout=0.25, target_modules=ATTENTION))
    save_adapter(ours, tmp_path / "a", base_model="some/model", revision="abc", notes={"system": "Hi"})
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "lorakit.json",
    }  # fmt: skip
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model",
        "revision": "abc", "inference_mode": True, "r": 4, "lora_alpha": 6, "lora_dropout": 0.25,
        "target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"], "use_rslora": False,
        "init_lora_weights": True, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "use_dora": False,
    }  # fmt: skip
    assert written.keys() <= PeftConfig().to_dict().keys()
    theirs = get_peft_model(stock(tiny_llama), PeftConfig(r=4, target_modules=ATTENTION))
    theirs.save_pretrained(tmp_path / "b")
    shapes = []
    for folder in ("a", "b"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", framework="pt") as file:
            shapes.append({key: file.get_tensor(key).shape for key in file.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 16


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        ("q_proj", ["q_proj"]),
        ("model.layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        (
            "q_proj,model.layers.0.mlp.up_proj",
            [
                "model.layers.0.mlp.up_proj",
                "model.layers.0.self_attn.q_proj",
                "model.layers.1.self_attn.q_proj",
            ],
        ),
        ("all", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_target_names_are_short_where_that_is_exact(
    tiny_llama: Path, tmp_path: Path, targets: str, written: list[str]
) -> None:
    ours = add_lora_to_model(stock(tiny_llama), r=2, target_modules=targets, seed=0)
    fill(ours)
    save_adapter(ours, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == written
    theirs = PeftModel.from_pretrained(stock(tiny_llama), tmp_path / "a").eval()
    ids = tokens(ours)
    assert (logits(theirs, ids) - logits(ours, ids)).abs().max() <= 1e-5
    again = stock(tiny_llama)
    load_adapter(again, tmp_path / "a")
    assert list(adapter_layers(again)) == list(adapter_layers(ours))
    assert torch.equal(logits(again, ids), logits(ours, ids))


# -------------------------------------------------------------------------------------- base and export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_bit_for_bit(base: Path, dtype: torch.dtype) -> None:
    model = stock(base, dtype)
    ids = tokens(model)
    before = logits(model, ids)
    add_lora_to_model(model, r=8, seed=0)
    assert torch.equal(logits(model, ids), before)


def test_merged_folder_is_the_same_model_for_stock_transformers(base: Path, tmp_path: Path) -> None:
    model = add_lora_to_model(stock(base), r=4, seed=1)
    fill(model)
    ids = tokens(model)
    expected = logits(model, ids)
    tokenizer = AutoTokenizer.from_pretrained(base)
    folder = export_merged(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    assert not adapter_layers(model)
    assert (logits(model, ids) - expected).abs().max() <= 1e-4
    merged, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert (logits(merged.eval(), ids) - expected).abs().max() <= 1e-4
    assert (logits(stock(base), ids) - expected).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template


def test_merged_folder_has_the_wanted_dtype(tiny_llama: Path, tmp_path: Path) -> None:
    model = add_lora_to_model(stock(tiny_llama), r=4, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    export_merged(model, tokenizer, tmp_path / "merged", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    with pytest.raises(ConflictError, match="is there already"):
        export_merged(model, tokenizer, tmp_path / "merged", dtype=torch.bfloat16)


def fingerprints(model: nn.Module) -> dict[str, str]:
    """sha256 of every tensor but the adapters', by the base's own names."""
    return {
        name.replace(".base.", "."): hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if ".adapters." not in name
    }


# ----------------------------------------------------------------------------------------------- training


def random_rows(vocabulary: int, *, count: int, longest: int, seed: int) -> list[Row]:
    """Rows of unlike length whose second part is the answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, longest + 1, (), generator=generator))
        prompt = int(torch.randint(1, length - 2, (), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        rows.append(Row(tuple(ids), (-100,) * prompt + tuple(ids[prompt:])))
    return rows


def peft_losses(
    model: nn.Module, batches: list[list[Row]], rate: Callable[[int], float], decay: float
) -> list[float]:
    """The loop that one writes by hand: padded batches, the model's own mean loss, torch's AdamW."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=decay, foreach=False
    )
    losses = []
    for step, rows in enumerate(batches):
        longest = max(len(row.ids) for row in rows)

        def padded(values: tuple[int, ...], fill: int, longest: int = longest) -> list[int]:
            return [*values, *[fill] * (longest - len(values))]

        loss = model(
            input_ids=torch.tensor([padded(row.ids, 0) for row in rows]),
            attention_mask=torch.tensor([padded((1,) * len(row.ids), 0) for row in rows]),
            labels=torch.tensor([padded(row.labels, -100) for row in rows]),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_losses(
    model: Any, tokenizer: Any, batches: list[list[Row]], rate: Callable[[int], float], decay: float
) -> list[float]:
    optimizer = build_optimizer(model, OptimizerSpec("adamw_torch", 1.0, weight_decay=decay))
    strategy = Strategy(model, optimizer, World())
    losses = []
    with batching(model, tokenizer, [row for rows in batches for row in rows]) as collate:
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            half = len(rows) // 2
            micro = [collate(rows[:half]), collate(rows[half:])]  # two packed batches an update
            assert all(batch.packed for batch in micro)
            losses.append(train_step(strategy, micro, 1.0).loss)
    return losses


@pytest.mark.parametrize(
    ("name", "longest", "steps", "peak"), [("tiny_llama", 40, 20, 5e-3), ("smollm2", 10, 6, 1e-3)]
)
def test_training_is_the_same_as_with_peft(
    request: pytest.FixtureRequest, name: str, longest: int, steps: int, peak: float
) -> None:
    folder: Path = request.getfixturevalue(name)
    ours, theirs = stock(folder), stock(folder)
    untouched = fingerprints(ours)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    add_lora_to_model(ours, r=4, lora_alpha=8, target_modules=ATTENTION, seed=1)
    settings = PeftConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    theirs = get_peft_model(theirs, settings)
    for path, layer in adapter_layers(ours).items():
        start = layer.adapter("default").lora_A
        theirs.get_parameter(f"base_model.model.{path}.lora_A.default.weight").data.copy_(start)
    ours.train()
    theirs.train()
    pool = random_rows(ours.config.vocab_size, count=8, longest=longest, seed=3)
    batches = [[pool[(4 * step + i) % 8] for i in range(4)] for step in range(steps)]

    def rate(step: int) -> float:
        return Schedule("cosine", peak, steps, warmup=2).rate(step)

    expected = peft_losses(theirs, batches, rate, decay=0.01)
    found = our_losses(ours, tokenizer, batches, rate, decay=0.01)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(found) == steps
    assert found[-1] < 0.95 * found[0]  # it did train
    assert fingerprints(ours) == untouched
