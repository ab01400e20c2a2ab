"""Each optimizer against formulas of its own, written here; groups, names and refusals."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor, nn

from lorakit import add_lora_to_model, train
from lorakit.adapters.attach import adapter_layers
from lorakit.config.schema import TrainConfig
from lorakit.errors import UsageError
from lorakit.optim.build import build_optimizer, groups, set_rate
from lorakit.optim.settings import parse
from lorakit.optim.spec import ALIASES, OPTIMIZERS, OptimizerSpec

UPDATES = 20
RATE, DECAY, BETAS, EPSILON = 3e-3, 0.1, (0.8, 0.95), 1e-6

Step = Callable[[Tensor, Tensor, dict[str, Any], int], None]  # moves p along g; remembers in the dict


class Weights(nn.Module):
    """A matrix of 5,040 numbers (8-bit moments, the last block a short one), a vector, a kernel."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(63, 80, dtype=dtype))
        self.vector = nn.Parameter(torch.randn(80, dtype=dtype))
        self.kernel = nn.Parameter(torch.randn(3, 4, 2, 2, dtype=dtype))
        self.frozen = nn.Parameter(torch.randn(5, dtype=dtype), requires_grad=False)


def gradients(model: nn.Module) -> None:
    """Fresh ones."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)


def spec(name: str, **args: Any) -> OptimizerSpec:
    return OptimizerSpec(name, RATE, BETAS, EPSILON, DECAY, args=args)


def adamw(p: Tensor, g: Tensor, memory: dict[str, Any], t: int) -> None:
    """Algorithm 2 of arXiv 1711.05101."""
    m = memory["m"] = BETAS[0] * memory.get("m", 0) + (1 - BETAS[0]) * g
    v = memory["v"] = BETAS[1] * memory.get("v", 0) + (1 - BETAS[1]) * g * g
    m_hat, v_hat = m / (1 - BETAS[0] ** t), v / (1 - BETAS[1] ** t)
    p -= RATE * DECAY * p + RATE * m_hat / (v_hat.sqrt() + EPSILON)


def sgd(p: Tensor, g: Tensor, memory: dict[str, Any], t: int) -> None:
    g = g + DECAY * p
    b = memory["b"] = g if t == 1 else 0.9 * memory["b"] + g
    p -= RATE * (g + 0.9 * b)  # nesterov


def adafactor(p: Tensor, g: Tensor, memory: dict[str, Any], t: int) -> None:
    """Algorithms 4 and 5 of arXiv 1804.04235 at a rate that is given: ε₁ = 1e-30, d = 1, β₂ = 1 − t^−0.8."""
    beta, square = 1 - t**-0.8, g * g + 1e-30
    if p.ndim == 1:
        v = memory["v"] = beta * memory.get("v", 0) + (1 - beta) * square
    else:
        r = memory["r"] = beta * memory.get("r", 0) + (1 - beta) * square.mean(-1, keepdim=True)
        c = memory["c"] = beta * memory.get("c", 0) + (1 - beta) * square.mean(-2, keepdim=True)
        v = r * c / r.mean(-2, keepdim=True)
    u = g / v.sqrt()
    u = u / max(1.0, float(u.pow(2).mean().sqrt()))
    p -= RATE * DECAY * p + RATE * u


def codebook(signed: bool) -> Tensor:
    """The dynamic tree of arXiv 2110.02861: powers of ten from -6 to 0, with linear fractions between."""
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i if signed else 2 ** (i + 1)
        width = 0.9 / count
        middles = [10 ** (i - 6) * (0.1 + width * (j + 0.5)) for j in range(count)]
        values += middles + [-m for m in middles if signed]
    return torch.tensor(sorted(values))


def rounded(x: Tensor, signed: bool) -> Tensor:
    """Through 8 bits and back, in blocks of 256 with a scale each."""
    book, out = codebook(signed), torch.empty_like(x).view(-1)
    for start in range(0, x.numel(), 256):
        block = x.view(-1)[start : start + 256]
        scale = block.abs().max()
        out[start : start + 256] = scale * book[(block[:, None] / scale - book).abs().argmin(1)]
    return out.view_as(x)


def adamw_8bit(p: Tensor, g: Tensor, memory: dict[str, Any], t: int) -> None:
    adamw(p, g, memory, t)
    if p.numel() >= 4096:
        memory |= {"m": rounded(memory["m"], True), "v": rounded(memory["v"], False)}


CASES: dict[str, tuple[Step, dict[str, Any]]] = {
    "adamw_torch": (adamw, {}),
    "sgd": (sgd, {"momentum": 0.9, "nesterov": True}),
    "adafactor": (adafactor, {}),
    "paged_adamw_32bit": (adamw, {}),
    "adamw_8bit": (adamw_8bit, {}),
    "paged_adamw_8bit": (adamw_8bit, {}),
}


def distance(name: str, dtype: torch.dtype, step: Step | None = None) -> dict[str, tuple[float, float]]:
    """Largest and median difference of each tensor after the updates, in updates of one learning rate."""
    formula, args = CASES[name]
    step = step or formula
    model = Weights(dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    wanted = {n: p.clone() for n, p in start.items()}
    memory: dict[str, dict[str, Any]] = {n: {} for n in wanted}
    optimizer = build_optimizer(model, spec(name, **args))
    for t in range(1, UPDATES + 1):
        gradients(model)
        for n, p in model.named_parameters():
            if p.grad is not None:
                step(wanted[n], p.grad.to(dtype), memory[n], t)
        optimizer.step()
    assert torch.equal(model.frozen, start["frozen"])
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if p.requires_grad)
    off = {n: (p.detach() - wanted[n]).abs() / RATE for n, p in model.named_parameters()}
    return {n: (float(d.max()), float(d.median())) for n, d in off.items()}


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "adafactor"])
def test_the_updates_are_those_of_the_formula(name: str) -> None:
    """In float64, to rounding."""
    assert max(most for most, _ in distance(name, torch.float64).values()) < 1e-9


def test_32_bit_moments_of_bitsandbytes_are_exact() -> None:
    assert max(most for most, _ in distance("paged_adamw_32bit", torch.float32).values()) < 5e-3


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_moments_follow_the_paper(name: str) -> None:
    """A value in the middle between two codes may fall either way: a few numbers of the matrix differ."""
    found = distance(name, torch.float32)
    assert found["vector"][0] < 5e-3 and found["kernel"][0] < 5e-3  # small tensors keep 32 bits
    assert found["matrix"][1] < 2e-3
    assert distance(name, torch.float32, step=adamw)["matrix"][1] > 2e-2  # so it is not plain AdamW


@pytest.mark.parametrize("signed", [True, False])
def test_the_codes_are_those_of_bitsandbytes(signed: bool) -> None:
    book = bitsandbytes.functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(codebook(signed), book, rtol=1e-6, atol=0)
    x = torch.rand(63, 80) ** 4 * (torch.randn(63, 80).sign() if signed else 1)
    back = bitsandbytes.functional.dequantize_blockwise(
        *bitsandbytes.functional.quantize_blockwise(x, book, blocksize=256)
    )
    torch.testing.assert_close((back - x).abs(), (rounded(x, signed) - x).abs(), rtol=0, atol=2e-4)


def test_every_optimizer_is_compared() -> None:
    assert CASES.keys() == OPTIMIZERS.keys() and set(ALIASES.values()) <= OPTIMIZERS.keys()
    assert set(get_args(TrainConfig.model_fields["optim"].annotation)) <= OPTIMIZERS.keys() | ALIASES.keys()


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_other_names(alias: str, name: str) -> None:
    assert spec(alias) == spec(name)


def test_paging_is_left_out_on_a_cpu_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lorakit"):
        build_optimizer(Weights(), spec("paged_adamw_8bit"))
        build_optimizer(Weights(), spec("adamw_8bit"))
    assert [r.getMessage() for r in caplog.records] == [
        "optim paged_adamw_8bit: there is nothing to page on a CPU, its state stays in memory"
    ]


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        UsageError, match=r"adamw_8bit needs bitsandbytes(.|\n)*pip install 'bitsandbytes>=0\.50'"
    ):
        build_optimizer(Weights(), spec("adamw_8bit"))


def test_a_missing_bitsandbytes_is_found_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = {"model_name_or_path": str(tmp_path), "dataset": "no.jsonl", "output_dir": "run"}
    with pytest.raises(UsageError, match="adamw_8bit needs bitsandbytes"):
        train(settings | {"optim": "adamw_bnb_8bit"})


def test_an_old_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "__version__", "0.49.2")
    with pytest.raises(UsageError, match=r"needs a newer bitsandbytes than 0\.49\.2"):
        build_optimizer(Weights(), spec("adamw_8bit"))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("adam", {}, "optim: there is no adam\nthere are adamw_torch, adamw_8bit"),
        ("adamw_torch", {"momentum": 0.9}, "optim_args: adamw_torch has no setting momentum\nit has none"),
        ("sgd", {"moment": 0.9}, "sgd has no setting moment\nit has momentum, dampening, nesterov"),
        ("sgd", {"momentum": 1}, "momentum must be a number from 0, below 1, not 1"),
        ("sgd", {"momentum": 0.9, "nesterov": 1}, "nesterov must be true or false, not 1"),
        ("sgd", {"nesterov": True}, "nesterov needs a momentum above 0, and no dampening"),
        ("sgd", {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov needs"),
    ],
)
def test_what_cannot_be_used_is_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        spec(name, **args)


def test_optim_args_as_text() -> None:
    assert parse("momentum=0.9, nesterov=True,n=3") == {"momentum": 0.9, "nesterov": True, "n": 3}
    for text in ("momentum", "=1", "momentum=", "a=1,,b=2", "a=1,a=2", ""):
        with pytest.raises(UsageError, match="optim_args: cannot read"):
            parse(text)
    with pytest.raises(UsageError, match="momentum must be a number"):
        spec("sgd", **parse("momentum=much"))
    assert not math.isfinite(parse("momentum=nan")["momentum"])
    with pytest.raises(UsageError, match="not nan"):
        spec("sgd", **parse("momentum=nan"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_b_learns_faster_with_a_ratio(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    add_lora_to_model(model, r=2, modules_to_save="1", target_modules="0")
    slow, fast = groups(model, 16.0)
    layer = adapter_layers(model)["0"].adapter("default")
    assert [id(p) for p in fast["params"]] == [id(layer.lora_B)]
    assert id(layer.lora_A) in {id(p) for p in slow["params"]} and len(slow["params"]) == 3
    optimizer = build_optimizer(model, OptimizerSpec(name, 0.5, ratio=16.0))
    assert [(g["factor"], g["lr"]) for g in optimizer.param_groups] == [(1.0, 0.5), (16.0, 8.0)]
    set_rate(optimizer, 0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 4.0]


def test_all_that_trains_is_in_one_group_without_a_ratio() -> None:
    model = Weights()
    (group,) = groups(model)
    assert [id(p) for p in group["params"]] == [id(p) for p in (model.matrix, model.vector, model.kernel)]
    assert group["factor"] == 1.0
