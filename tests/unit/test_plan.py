"""Plans: numbers of the source guides (by their ID in the checklist), and lorakit's own models as oracle."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
from lorakit.adapters.attach import attach, count_parameters
from lorakit.adapters.spec import LoRAConfig
from lorakit.cli.main import main
from lorakit.errors import ModelError, TargetError, UsageError
from lorakit.files import write_json
from lorakit.modelinfo.architectures import facts_of
from lorakit.modelinfo.facts import ModelFacts
from lorakit.modelinfo.find import find_facts
from lorakit.ops import native
from lorakit.planning.adapters import adapted as adapted_modules
from lorakit.planning.adapters import file_bytes, lora_parameters, numbers, trainable
from lorakit.planning.deploy import deployments
from lorakit.planning.fit import fit, parse_size
from lorakit.planning.memory import memory, optimizer_bytes, quantised_bytes
from lorakit.planning.plan import Plan
from lorakit.planning.setup import PACKABLE, Setup
from lorakit.planning.time import Rates, find_rates, pass_flops
from lorakit.planning.time import time as time_of

QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = ("all",)
SEVEN = (*QKVO, "gate_proj", "up_proj", "down_proj")
MIB, GB = 2**20, 10**9


# ------------------------------------------------------------------------------- numbers of the guides


def test_m04_to_m07_one_matrix() -> None:
    m05 = lorakit.plan(model="4096x4096", rank=8)
    assert (m05.facts.parameters, m05.trainable) == (16_777_216, 65_536)
    assert (round(100 - 100 / m05.reduction, 2), m05.reduction) == (99.61, 256)
    assert lora_parameters(4096, 4096, 8) == 8 * (4096 + 4096)  # M04
    m06 = lorakit.plan(model="1000x1000", rank=4)
    assert (m06.trainable, round(100 - 100 / m06.reduction, 1)) == (8_000, 99.2)
    m07 = lorakit.plan(model="100x100", rank=4)
    assert (m07.facts.parameters, m07.trainable, m07.facts.parameters + m07.trainable) == (10_000, 800, 10_800)
    assert round(100 - m07.percent, 2) == 92.59


@pytest.mark.parametrize(
    ("model", "targets", "expected"),
    [
        ("llama-7b", QV, 4_194_304), ("llama-7b", QKVO, 8_388_608), ("llama-7b", ALL, 19_988_480),
        ("llama-2-7b", SEVEN, 19_988_480), ("llama-3-8b", QV, 3_407_872), ("llama-3-8b", QKVO, 6_815_744),
        ("llama-3-8b", ALL, 20_971_520),
    ],
)  # fmt: skip
def test_p14_m21_trainable_by_target(model: str, targets: tuple[str, ...], expected: int) -> None:
    found = lorakit.plan(model=model, targets=targets, rank=8)
    assert found.trainable == expected
    assert sum(found.by_target.values()) == expected


def test_m20_m21_structure_corrected() -> None:
    """The guide gives the feed-forward part two matrices, and the adapters 4 to 8 M."""
    facts = find_facts("llama-7b")
    attention = [m for m in facts.modules if ".self_attn." in m.path]
    feed_forward = [m for m in facts.modules if ".mlp." in m.path]
    assert [m.shape for m in attention] == [(4096, 4096)] * 4
    assert [m.matrix for m in feed_forward] == [(11008, 4096), (11008, 4096), (4096, 11008)]
    found = lorakit.plan(model="llama-7b", rank=8, targets=SEVEN)
    assert round(found.reduction) == 337


def test_p01_rank_table_is_that_of_query_and_value() -> None:
    ranks = (4, 8, 16, 32, 64, 128)
    found = [lorakit.plan(model="llama-7b", targets=QV, rank=rank).trainable / 1e6 for rank in ranks]
    assert [round(n, 2) for n in found] == [2.10, 4.19, 8.39, 16.78, 33.55, 67.11]


def test_q05_double_quantisation_saves_0_373_bits() -> None:
    facts = find_facts("llama-2-7b")
    weights = [m for m in facts.modules if m.kind == "linear" and m.path != facts.head]
    codes = 8 * sum(m.count * quantised_bytes(m, Setup(bits=4))[0] for m in weights)
    plain, double = (
        8 * sum(m.count * quantised_bytes(m, Setup(bits=4, double=on))[1] for m in weights)
        for on in (False, True)
    )
    n = sum(m.count * m.size for m in weights)
    assert codes == 4 * n
    assert plain / n == 0.5
    assert (plain - double) / n == pytest.approx(0.373, abs=1e-4)


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        ("llama-2-7b", (13.477, 7.006, 3.866)), ("llama-2-13b", (26.032, 13.352, 7.201)),
        ("llama-2-70b", (137.953, 69.529, 36.363)),
    ],
)  # fmt: skip
def test_q06_q07_weights(model: str, gigabytes: tuple[float, ...]) -> None:
    """The guide's 14/8/4-5, 26/14/8-10 and 140/70/35-40 GB, exactly; embeddings and head keep 16 bits."""
    found = []
    for bits in (16, 8, 4):
        taken = memory(find_facts(model), Setup(bits=bits))
        found.append((taken.weights + taken.constants) / GB)
    assert found == pytest.approx(gigabytes, abs=1e-3)


def test_q08_g06_what_qlora_of_7b_really_takes() -> None:
    """The guide's 4 GB are the weights alone; with activations it is more, and grows with length."""
    found = [
        lorakit.plan(model="llama-2-7b", bits=4, targets=QKVO, checkpointing=True, length=length, device="cuda")
        for length in (512, 2048)
    ]
    assert (found[0].memory.weights + found[0].memory.constants) / GB == pytest.approx(3.87, abs=0.01)
    assert 4.5 < found[0].memory.total / GB < 5 < 5.5 < found[1].memory.total / GB < 7


def test_q10_q11_weights_shrink_by_three_quarters() -> None:
    facts = find_facts("llama-2-7b")
    dense, coded = (memory(facts, Setup(bits=bits)) for bits in (16, 4))
    saved = 1 - (coded.weights + coded.constants) / dense.weights
    assert 0.65 < saved < 0.80
    assert 3.4 < dense.weights / (coded.weights + coded.constants) < 4.0


def test_g09_t20_full_training_in_float32() -> None:
    found = lorakit.plan(model="llama-2-7b", method="full", bits=32, batch=1, length=16)
    n = 6_738_415_616
    taken = found.memory
    assert (taken.weights, taken.gradients, taken.optimizer) == (4 * n, 4 * n, 8 * n)
    assert taken.optimizer == 2 * taken.weights  # T20
    assert taken.state == 16 * n  # the guide's "about 112 GB", of 7.0 B numbers
    assert taken.total > 100 * GB  # G11


def test_g10_lora_on_a_float32_base() -> None:
    taken = memory(find_facts("llama-7b"), Setup(bits=32, targets=QKVO, rank=8))
    assert (taken.adapters, taken.gradients, taken.optimizer) == (32 * MIB, 32 * MIB, 64 * MIB)
    full = memory(find_facts("llama-7b"), Setup(bits=32, method="full"))
    assert full.state / taken.state == pytest.approx(4, abs=0.03)


def test_t09_t10_effective_batch() -> None:
    for batch, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1)):
        assert Setup(batch=batch, accumulation=accumulation).effective_batch == 8
    assert Setup(batch=2, accumulation=4, ranks=3, strategy="ddp").effective_batch == 24


def test_t14_activations_grow_with_length() -> None:
    """In proportion where attention makes its weights anew; packed without C++ passes keeps them."""
    facts = find_facts("llama-2-7b")
    for attention, passes, most in (("sdpa", True, 1.0), ("packed", True, 1.0), ("packed", False, 2.0)):
        kept = [
            memory(facts, Setup(length=n, attention=attention, passes=passes)).activations  # type: ignore[arg-type]
            for n in (512, 1024, 2048, 4096, 8192)
        ]
        growth = [later / before / 2 for before, later in itertools.pairwise(kept)]
        assert all(0.99 < step < most + 0.02 for step in growth)


def test_g01_checkpointing_g15_rank_g05_waterfall() -> None:
    found = lorakit.plan(model="llama-2-7b", rank=8, length=2048, limit="24GB", units=False)
    assert found.with_checkpointing < 0.7 * found.without_checkpointing  # G01: 30-50 % and more
    assert found.fit is not None
    saved = {lever.line: lever.saved / found.memory.total for lever in found.fit.levers}
    assert saved["lora_rank: 4"] < 0.01 < 0.2 < saved["quantization_bit: 4"]  # G15: rank is a weak lever
    totals = [step.memory.total for step in found.waterfall]
    assert len(totals) == 6
    assert totals == sorted(totals, reverse=True)
    assert found.waterfall[0].setup.effective_batch <= found.waterfall[-1].setup.effective_batch == 8


def test_g05_measures_do_not_add_up_in_percent() -> None:
    """The guide takes 60, 15, 10 and 5 % of the start, whatever the model: the shares depend on the length."""
    shares = []
    for length in (256, 4096):
        steps = lorakit.plan(model="llama-2-7b", targets=QKVO, length=length, device="cuda").waterfall
        totals = [step.memory.total for step in steps]
        shares.append([(before - after) / totals[0] for before, after in itertools.pairwise(totals)])
    coded, recomputed = 0, 1
    assert shares[0][coded] > 4 * shares[1][coded]
    assert shares[1][recomputed] > 2 * shares[0][recomputed]


def test_g12_q13_vision() -> None:
    """The guide's LoRA takes 30 to 50 % of full training, QLoRA 15 to 25 % in half the time.

    Activations are most of it, and bits leave them as they are; checkpointing does not. Codes cost time.
    """
    common: dict[str, Any] = {"model": "dinov2-large", "batch": 64, "device": "cuda", "gflops": 1000.0}
    full = lorakit.plan(method="full", bits=32, **common)
    lora, qlora = lorakit.plan(**common), lorakit.plan(bits=4, **common)
    sparing = lorakit.plan(bits=4, checkpointing=True, **common)
    taken = [each.memory.total / full.memory.total for each in (lora, qlora, sparing)]
    assert 0.30 < taken[0] < 0.50
    assert 0.95 * taken[0] < taken[1] < taken[0]
    assert taken[2] < 0.15
    assert lora.time.seconds is not None and qlora.time.seconds is not None
    assert lora.time.seconds < qlora.time.seconds


def test_g03_zero_shards_what_it_says() -> None:
    facts, one = find_facts("llama-2-7b"), Setup(method="full", bits=16, length=64)
    alone = memory(facts, one)
    for strategy, sharded in (
        ("ddp", ()), ("zero1", ("optimizer",)), ("zero2", ("optimizer", "gradients")),
        ("zero3", ("optimizer", "gradients", "weights")), ("fsdp", ("optimizer", "gradients", "weights")),
    ):  # fmt: skip
        many = memory(facts, replace(one, strategy=strategy, ranks=8))  # type: ignore[arg-type]
        for name, size in alone.categories().items():
            if name != "workspace":
                expected = -(-size // 8) if name in sharded else size
                assert many.categories()[name] == expected, (strategy, name)
        assert many.workspace > alone.workspace
    lora = memory(facts, Setup(strategy="fsdp", ranks=4, rank=64))
    assert lora.optimizer == memory(facts, Setup(rank=64)).optimizer  # adapters are whole on every rank


# ------------------------------------------------------------------------------- adapters, against lorakit


def tiny(kind: str, layers: int = 3) -> tuple[ModelFacts, nn.Module]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "intermediate_size": 48, "vocab_size": 64, "tie_word_embeddings": False,
        "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gpt2":
        config = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    if kind == "resnet":
        config = {"hidden_sizes": [8, 16], "depths": [1, 2], "embedding_size": 8, "layer_type": "basic"}
    if kind in ("bert", "vit"):
        config = {key: value for key, value in config.items() if not key.startswith(("num_key", "head", "tie"))}
    auto = AutoModel if kind in ("bert", "vit", "resnet") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.for_model(kind, **config))
    return facts_of({"model_type": kind, **config}, kind, "here"), model.to_empty(device="cpu")


def cases() -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(7)
    found: list[tuple[str, dict[str, Any]]] = [
        (kind, {"target_modules": "all", "r": rng.randint(1, 8)})
        for kind in ("llama", "gpt2", "bert", "vit", "phi3")
    ]
    found += [
        ("qwen2", {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "method": "adalora"}),
        ("llama", {"target_modules": ["v_proj"], "r": 5, "lora_fa": True}),
        ("qwen3", {"target_modules": r".*\.[02]\..*(q|k)_proj", "r": 2}),
        ("gemma2", {"target_modules": "all", "exclude_modules": "mlp.down_proj,o_proj", "r": 2}),
        ("llama", {"target_modules": "all", "rank_pattern": {"q_proj": 7, r"layers\.1\..*up_proj": 1}, "r": 2}),
        ("mistral", {"target_modules": "all", "layers_to_transform": [0, 2], "r": 3}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "r": 3}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"], "r": 3}),
        ("resnet", {"target_modules": ["convolution"], "r": 2}),
        ("gpt2", {"target_modules": ["c_attn"], "r": 6}),
    ]
    return found


@pytest.mark.parametrize(("kind", "wanted"), cases())
def test_adapters_are_those_that_lorakit_attaches(kind: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    from lorakit.checkpoint.peft_format import save_adapter

    facts, model = tiny(kind)
    attach(model, LoRAConfig(**wanted))
    names = {
        "r": "rank", "target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers",
        "modules_to_save": "whole", "lora_fa": "frozen_a",
    }  # fmt: skip
    values = {names.get(key, key): value for key, value in wanted.items() if key != "use_dora"}
    values |= {"method": "dora"} if wanted.get("use_dora") else {}
    found = lorakit.plan(
        {"model_name_or_path": "gpt2", "dataset": "x", "output_dir": "y"}, model="gpt2", rank=1
    )
    setup = replace(found.setup, **_as_setup(values))
    assert trainable(facts, setup) == count_parameters(model)["trainable"]
    for parameter in model.parameters():
        nn.init.uniform_(parameter)
    save_adapter(model, tmp_path / "adapter")
    real = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    tensors = 3 * sum(each.count for each in adapted_modules(facts, setup)) + 2 * len(setup.whole)
    assert abs(file_bytes(facts, setup) - real) < 60 * tensors + 200


def _as_setup(values: dict[str, Any]) -> dict[str, Any]:
    """The fields as `plan` reads them."""
    return {
        field: getattr(lorakit.plan(model="smollm2-135m", **{field: value}, **_any(field)).setup, field)
        if field in ("rank_pattern", "layers")
        else _plain(value)
        for field, value in values.items()
    }


def _any(field: str) -> dict[str, Any]:
    return {"targets": "all"} if field in ("rank_pattern", "layers") else {}


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value in ("adalora", "dora"):
        return value
    if isinstance(value, str):
        return (value,) if "\\" in value else tuple(value.split(","))
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "q_prj"}, "did you mean q_proj"), ({"targets": "input_layernorm"}, "cannot carry"),
        ({"exclude": "nothing"}, "exclude_modules 'nothing' matches no module"),
        ({"targets": "q_proj", "exclude": "q_proj"}, "no module is left"),
        ({"layers": "99"}, "no module is left"), ({"whole": "head"}, "modules_to_save 'head'"),
        ({"targets": "("}, "not a regular expression"),
    ],
)  # fmt: skip
def test_targets_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TargetError, UsageError), match=message):
        lorakit.plan(model="smollm2-135m", **settings)


def test_experts_carry_no_adapter() -> None:
    found = lorakit.plan(model="mixtral-8x7b", targets="all")
    assert set(found.by_target) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(TargetError, match="cannot carry"):
        lorakit.plan(model="mixtral-8x7b", targets="gate_up_proj")


# ----------------------------------------------------------------------------------------- bytes and time


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor"])
def test_optimizer_bytes(name: str) -> None:
    shapes = [(4, 100), (300, 4), (50,), (80, 90)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    made: torch.optim.Optimizer
    if name == "adafactor":
        from transformers.optimization import Adafactor

        made = Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    else:
        made = torch.optim.AdamW(parameters) if name == "adamw_torch" else torch.optim.SGD(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    made.step()
    kept = [
        value for slots in made.state.values() for value in slots.values() if isinstance(value, torch.Tensor)
    ]
    expected = sum(value.nbytes for value in kept if value.dim() > 0)
    assert optimizer_bytes(Setup(optimizer=name), shapes, 4) == expected


def test_eight_bit_moments() -> None:
    # two bytes a number and two float32 for each 256; below 4096 numbers as wide as ever (bitsandbytes)
    assert (
        optimizer_bytes(Setup(optimizer="adamw_8bit"), [(8, 1024), (16,)], 4) == 2 * 8192 + 2 * 32 * 4 + 2 * 64
    )


def test_packable_families_are_those_of_the_engine() -> None:
    from lorakit.models import patch

    assert patch.PACKABLE == PACKABLE


def counted_flops(model: nn.Module, ids: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_operations_against_those_that_torch_counts(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)  # torch counts its own products alone
    facts, model = tiny("llama", layers=16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    model.requires_grad_(method == "full")
    if method == "lora":
        # with dropout the products are plain ones: torch does not count those that add in place
        attach(model, LoRAConfig(r=4, target_modules="all", lora_dropout=0.1))
    real = counted_flops(model.train(), torch.randint(64, (2, 24)))
    setup = Setup(method=method, rank=4, batch=2, length=24, attention="eager")  # type: ignore[arg-type]
    # the first block's projections hand nothing back: 1 of 16 here, 1 of 32 in a real model
    assert pass_flops(facts, setup) == pytest.approx(real, rel=0.03)


def test_time_is_operations_over_rate() -> None:
    facts, setup = find_facts("llama-2-7b"), Setup(targets=QV)
    taken = time_of(facts, setup, find_rates(setup, 1000.0))
    assert taken.seconds == pytest.approx(taken.flops / 1e12 / 0.5)
    assert taken.tokens_per_second == pytest.approx(8 * 2048 / taken.seconds)
    # 4 operations a number and token: forward, and the gradient of the input
    assert 1 < taken.flops / (4 * 6_607_000_000 * 8 * 2048) < 1.2
    slower = time_of(facts, replace(setup, checkpointing=True), taken.rates)
    assert slower.flops / taken.flops == pytest.approx(1.5, abs=0.05)


def test_rates_are_measured_given_or_a_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    assert "guess" in find_rates(Setup()).origin
    assert find_rates(Setup(device="cuda")).gflops is None
    write_json(tmp_path / "rates.json", {"gflops": {"bf16": 120.0}, "threads": 2})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert find_rates(Setup()) == Rates(120.0, "measured on this machine with 2 threads", 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert find_rates(Setup()).gflops == 60.0
    assert "for 1 in proportion" in find_rates(Setup()).origin
    for nonsense in ({"gflops": {"bf16": 120.0}}, {"gflops": {"bf16": -1}, "threads": 2}, []):
        write_json(tmp_path / "rates.json", nonsense)
        with pytest.raises(UsageError, match="make no sense"):
            find_rates(Setup())
    (tmp_path / "rates.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        find_rates(Setup())
    with pytest.raises(UsageError, match="GFLOP/s is none"):
        find_rates(Setup(), float("nan"))


# ------------------------------------------------------------------------------------------ fit and deploy


@pytest.mark.parametrize("limit", ["6GB", "10GB", "24GB", "80GiB"])
def test_what_fits_fits_and_one_more_does_not(limit: str) -> None:
    facts = find_facts("llama-3.2-1b")
    setup = Setup(length=1024, batch=4, checkpointing=True)
    found = fit(facts, setup, parse_size(limit))
    for name, size in found.largest.items():
        if size:
            assert memory(facts, replace(setup, **{name: size})).total <= found.limit
        most = {"batch": 4096, "length": facts.context, "rank": 512}[name]
        if size != most:
            assert memory(facts, replace(setup, **{name: size + 1})).total > found.limit
    assert (found.total <= found.limit) == found.fits == (not found.ladder)
    assert found.setup is not None
    assert memory(facts, found.setup).total <= found.limit


def test_nothing_fits_into_too_little() -> None:
    found = lorakit.plan(model="llama-3.1-405b", limit="16GB").fit
    assert found is not None
    assert found.setup is None
    assert set(found.largest.values()) == {0}


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * GB), ("16 GiB", 16 * 2**30), ("1.5g", 15 * 10**8), ("700MB", 7 * 10**8)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0GB", "many", "16 gigs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="no size of memory"):
        parse_size(text)


@pytest.mark.parametrize(
    ("settings", "loads"),
    [
        ({}, (True, True, True)), ({"method": "dora"}, (True, False, False)),
        ({"rank": 512}, (True, True, True)),
        ({"rank": 513}, (True, False, True)), ({"whole": ("lm_head",)}, (True, False, False)),
        ({"rslora": True}, (True, True, False)), ({"method": "adalora"}, (True, False, False)),
    ],
)  # fmt: skip
def test_who_loads_the_adapter(settings: dict[str, Any], loads: tuple[bool, ...]) -> None:
    found = deployments(Setup(**settings))
    assert tuple(each.loads for each in found) == loads
    assert all(bool(each.remedy) != each.loads for each in found)


def test_vllm_is_told_the_rank() -> None:
    assert deployments(Setup(rank=48))[1].note == "start it with --max-lora-rank 64"


# ------------------------------------------------------------------------------------ command, configuration

CONFIG = """\
model_name_or_path: meta-llama/Llama-2-7b-hf
dataset: rows.jsonl
output_dir: run
lora_rank: 16
lora_target: q_proj,v_proj
use_dora: true
cutoff_len: 1024
per_device_train_batch_size: 2
gradient_checkpointing: true
max_steps: 100
"""


def test_configuration_and_what_wins_over_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    found = lorakit.plan(path, ["lora_rank=32"], batch=4)
    setup = found.setup
    assert (setup.method, setup.rank, setup.targets, setup.batch) == ("dora", 32, QV, 4)
    assert (setup.length, setup.checkpointing, setup.accumulation, found.updates) == (1024, True, 8, 100)
    assert found.facts.parameters == 6_738_415_616
    assert lorakit.plan(path, model="gpt2", targets="all").facts.family == "gpt2"


OWN = {"model_name_or_path": "llama-3.2-1b", "dataset": "rows.jsonl", "output_dir": "run", "cutoff_len": 512}


def planned(**values: Any) -> Plan:
    return lorakit.plan({**OWN, **values}, device="cuda")


def test_quantisation_keys_are_read() -> None:
    plain = planned(quantization_bit=4)
    assert (plain.setup.bits, plain.setup.double, plain.setup.dense) == (4, True, ())
    assert planned(load_in_8bit=True).setup.bits == 8
    wide = planned(use_qlora=True, bnb_4bit_use_double_quant=False, llm_int8_skip_modules="down_proj,q_proj")
    assert (wide.setup.double, wide.setup.dense) == (False, ("down_proj", "q_proj"))
    kept = sum(m.count * m.size for m in wide.facts.modules if m.path.endswith(("down_proj", "q_proj")))
    single = planned(quantization_bit=4, double_quantization=False)
    codes, constants = kept // 2, 4 * kept // 64
    assert wide.memory.weights - single.memory.weights == wide.setup.width * kept - codes
    assert single.memory.constants - wide.memory.constants == constants


def test_checkpointing_keys_are_read() -> None:
    every = [planned(gradient_checkpointing=True, gradient_checkpointing_every=n) for n in (1, 2, 4)]
    totals = [each.memory.total for each in every]
    assert totals == sorted(totals)
    assert totals[-1] < planned().memory.total
    assert planned(disable_gradient_checkpointing=False).memory.total == totals[0]
    away = planned(gradient_checkpointing=True, offload_activations=True)
    inputs = 16 * 512 * 2048 * every[0].setup.width
    assert every[0].memory.activations - away.memory.activations == inputs


def test_optimizer_keys_are_read() -> None:
    plain = planned(lora_rank=64)
    assert planned(lora_rank=64, optim="paged_adamw_8bit").memory.optimizer < 0.3 * plain.memory.optimizer
    assert planned(lora_rank=64, optim="adamw_bnb_8bit").setup.optimizer == "adamw_bnb_8bit"
    assert planned(lora_rank=64, optim="sgd").memory.optimizer == 0
    assert plain.memory.optimizer > 0 == planned(lora_rank=64, offload_optimizer=True).memory.optimizer


def test_a_second_stage_trains_the_base() -> None:
    found = planned(unfreeze_after=0.5, additional_target="lm_head")
    n, r = found.facts.parameters, planned().trainable
    assert found.setup.bits == 32
    assert found.memory.gradients == 4 * (n + r)
    assert found.memory.optimizer == 8 * (n + r)
    assert any("second stage" in note for note in found.notes)


def test_strategies_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    for values, strategy in (
        ({}, "ddp"), ({"fsdp": "full_shard auto_wrap"}, "fsdp"), ({"deepspeed": str(file)}, "zero2"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "zero3"),
    ):  # fmt: skip
        alone = lorakit.plan({**OWN, **values})
        assert (alone.setup.strategy, alone.setup.ranks) == ("one", 1)
        assert any(strategy in note for note in alone.notes) == bool(values)
        assert lorakit.plan({**OWN, **values}, ranks=4).setup.strategy == strategy
    assert lorakit.plan({**OWN, "deepspeed": str(file)}).setup.offload_optimizer
    assert lorakit.plan(model="gpt2", ranks=2).setup.strategy == "ddp"
    file.write_text('{"zero_optimization": {"stage": 5}}')
    with pytest.raises(UsageError, match="deepspeed: cannot read"):
        lorakit.plan({**OWN, "deepspeed": str(file)})


def test_batches_by_tokens_and_rows_joined() -> None:
    by_tokens = planned(max_tokens_per_batch=2048)
    assert (by_tokens.setup.batch, by_tokens.setup.length) == (4, 512)
    assert (
        planned(packing=True).memory == planned().memory
    )  # of rows as long as the sequence: the most it takes
    assert planned(lora_target="attention").by_target.keys() == set(QKVO)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "nothing to plan"), (["plan", "--model", "llama-2-8b"], "did you mean"),
        (["plan", "--model", "gpt2", "--rank", "0"], "rank must be"),
        (["plan", "--model", "gpt2", "--bits", "5"], "bits cannot be 5"),
        (["plan", "--model", "gpt2", "--fit", "lots"], "no size of memory"),
        (["plan", "--model", "gpt2", "--strategy", "ddp"], "shares work among devices"),
        (["plan", "--model", "gpt2", "--method", "full", "--bits", "4"], "cannot be trained whole"),
        (["plan", "--model", "gpt2", "--plot", "x.doc"], "a picture cannot be"),
        (["plan", "--model", "gpt2", "--labelled", "2"], "labelled must be between"),
        (["plan", "--model", "gpt2", "--length", "10", "--row", "20"], "row must be"),
    ],
)  # fmt: skip
def test_command_line_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) in (2, 4)
    assert message in capsys.readouterr().err


def test_unknown_setting() -> None:
    with pytest.raises(UsageError, match="did you mean length"):
        lorakit.plan(model="gpt2", lenght=5)


def test_json_text_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", "llama-2-7b", "--targets", "q_proj,v_proj", "--fit", "16GB"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trainable"], told["model"]["parameters"]) == (4_194_304, 6_738_415_616)
    assert told["memory"]["total"] == sum(size for name, size in told["memory"].items() if name != "total")
    assert {lever["line"] for lever in told["fit"]["levers"]} >= {"quantization_bit: 4"}
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for part in ("4,194,304", "13.48 GB", "+ 4-bit base (QLoRA)", "do not fit into 16.00 GB", "vLLM"):
        assert part in text
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"plan{suffix}"
        assert main([*arguments, "--plot", str(path)]) == 0
        assert path.read_bytes().startswith(start)
    capsys.readouterr()


def test_the_documented_example_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    shown = re.findall(r"```console\n\$ lorakit (.*?)\n(.*?)```", text, re.DOTALL)
    assert shown
    for command, expected in shown:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == expected


def test_the_documented_tables_are_the_results() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "planning.md").read_text(encoding="utf-8")
    for name in ("calibration", "published"):
        assert (root / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8").strip() in page
    measured = json.loads((root / "benchmarks" / "results" / "calibration.json").read_bytes())
    assert measured["runs"] >= 24
    assert measured["training"]["p90"] <= 0.10


def test_no_torch_and_no_waiting() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); from lorakit.cli.main import main\n"
        "status = main(['plan', '--model', 'meta-llama/Llama-3.1-8B', '--fit', '16GB', '--bits', '4'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'huggingface_hub', 'pydantic'}\n"
        "loaded = heavy & sys.modules.keys()\n"
        "print(status, loaded, time.process_time(), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        status, loaded, used = done.stderr.splitlines()[-1].split(" ")
        assert (status, loaded) == ("0", "set()"), done.stderr
        seconds.append(float(used))
    assert min(seconds) < 0.5  # processor time: this machine may be busy


def test_a_configuration_is_planned_without_torch_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    code = (
        "import sys, time; from lorakit.cli.main import main\n"
        "status = main(['plan', sys.argv[1], '--fit', '16GB'])\n"
        "loaded = {'torch', 'transformers', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "print(status, loaded, time.process_time(), file=sys.stderr)"
    )
    # As installed: with compiled files, which the first of the runs writes.
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(5):
        command = [sys.executable, "-c", code, str(tmp_path / "c.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        status, loaded, used = done.stderr.splitlines()[-1].split(" ")
        assert (status, loaded) == ("0", "set()"), done.stderr
        seconds.append(float(used))
    assert min(seconds) < 0.5


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="there is no model"):
        lorakit.plan(model="./nowhere")


def test_a_search_takes_no_time() -> None:
    start = time.process_time()
    lorakit.plan(model="llama-3.1-405b", targets=QKVO, limit="24GB")
    assert time.process_time() - start < 0.3


def test_numbers_of_a_method() -> None:
    facts = find_facts("100x60")
    for method, total in (("lora", 4 * 160), ("dora", 4 * 160 + 100), ("adalora", 4 * 160 + 4)):
        setup = Setup(method=method, rank=4)  # type: ignore[arg-type]
        assert numbers(adapted_modules(facts, setup), setup) == (total, total)
