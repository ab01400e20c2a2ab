"""Method × store × initialiser: an adapter on a quantised weight computes as on the dense weight that it reads.

Formulas are written out in float64 on ``store.read()``; `tests/unit/test_quant.py` says how good a store is.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.attach import (
    activate,
    adapter_layers,
    add_lora_to_model,
    count_parameters,
    detach,
    freeze_backbone_params,
    merge,
    route,
    unmerge,
)
from lorakit.adapters.layer import AdapterLayer
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.errors import ConflictError, TargetError, UsageError
from lorakit.lowrank.loftq import alternate, leading_factors
from lorakit.quant.blockwise import FourBit
from lorakit.quant.formats import Format
from lorakit.quant.int8 import Int8
from lorakit.quant.interop import bitsandbytes_linear
from lorakit.quant.modules import QuantLinear, quantized

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_fa": {"lora_fa": True},
    "dora": {"method": "dora"},
    "adalora": {"method": "adalora"},
}
FORMS: dict[str, Format] = {
    "nf4": FourBit(),
    "nf4-single": FourBit(double=False),
    "fp4": FourBit("fp4"),
    "int8": Int8(integer=False),
}
BITSANDBYTES = {"bnb-nf4": FourBit(), "bnb-fp4": FourBit("fp4", double=False), "bnb-int8": Int8()}
STORES = {**FORMS, **BITSANDBYTES}
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora", "loftq")
IN, OUT = 64, 10
CELLS = [(method, store) for method in METHODS for store in STORES]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Shapes this small take longer to share out than to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """One layer under the name ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def dense(make: Callable[[], nn.Module] = lambda: nn.Linear(IN, OUT)) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def base(store: str, layer: nn.Module | None = None) -> Net:
    ours = quantized(layer or dense(), STORES[store])
    return Net(bitsandbytes_linear(ours) if store in BITSANDBYTES else ours)


def inputs() -> Tensor:
    return torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1))


def inits(method: str) -> tuple[str, ...]:
    return INITS if method != "adalora" else ("kaiming",)


def adapt(model: nn.Module, method: str, init: str = "kaiming") -> AdapterLayer:
    add_lora_to_model(
        model, r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=init, seed=2,
        dense_weight=lambda path: dense().get_parameter("weight"), **METHODS[method],
    )  # fmt: skip
    return adapter_layers(model)["layer"]


def trained(method: str, store: str, init: str = "kaiming") -> tuple[Net, AdapterLayer]:
    """A model whose adapter training has moved: every tensor of it, and visibly so."""
    model = base(store)
    layer = adapt(model, method, init)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.trainable():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model, layer


def formula(layer: AdapterLayer, norm: Tensor | None = None) -> Tensor:
    """The weight [out, in] that the papers give, in float64; DoRA with a held norm if one is given."""
    own = {name: p.double() for name, p in layer.adapter("default").named_parameters()}
    own |= {name: b.double() for name, b in layer.adapter("default").named_buffers()}
    s = 6 / math.sqrt(4) if layer.adapter("default").config.use_rslora else 6 / 4
    A = own["lora_A"] * own["lora_E"] if "lora_E" in own else own["lora_A"]
    V = layer.store.read().double() + s * (own["lora_B"] @ A)
    if "anchor_A" in own:
        V = V - s * (own["anchor_B"] @ own["anchor_A"])
    if "lora_magnitude_vector" not in own:
        return V
    norm = V.detach().norm(dim=1, keepdim=True) if norm is None else norm
    return own["lora_magnitude_vector"][:, None] * V / norm


def expected(layer: AdapterLayer, x: Tensor, norm: Tensor | None = None) -> Tensor:
    bias = layer.base.bias
    return F.linear(x.double(), formula(layer, norm), None if bias is None else bias.double())


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    error = (found.double() - wanted).abs().max().item()
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), error


# ---------------------------------------------------------------------------------------------- the product


def test_the_product_is_as_large_as_it_should_be() -> None:
    assert sum(len(inits(method)) for method, _ in CELLS) == 7 * (4 * 7 + 1)
    assert {type(base(store).layer) for store in STORES} == {QuantLinear, Linear4bit, Linear8bitLt}


@pytest.mark.parametrize(("method", "store"), CELLS)
def test_at_step_zero_it_is_the_base(method: str, store: str) -> None:
    for init in inits(method):
        model = base(store)
        before = model(inputs())
        layer = adapt(model, method, init)
        after = model(inputs())
        if init == "loftq":
            reference = F.linear(inputs(), dense().weight, dense().bias)
            assert (after - reference).norm() < (before - reference).norm(), (
                "it starts nearer to the dense layer"
            )
        else:
            close(after, before.double())
        close(after, expected(layer, inputs()))


@pytest.mark.parametrize(("method", "store"), CELLS)
def test_forward_is_the_formula_on_the_weight_that_the_store_reads(method: str, store: str) -> None:
    for init in inits(method):
        model, layer = trained(method, store, init)
        x = inputs()
        wanted = expected(layer, x)
        assert (wanted - F.linear(x, layer.store.read(), layer.base.bias)).abs().max() > 0.02
        close(model(x), wanted)
        close(layer.merged_weight(), formula(layer))
        with route(model, ["default", None]):
            y = model(x)
        close(y[:1], wanted[:1])
        close(y[1:], F.linear(x[1:].double(), layer.store.read().double(), layer.base.bias.double()))


@pytest.mark.parametrize(("method", "store"), CELLS)
def test_gradients_are_finite_differences(method: str, store: str) -> None:
    """Along random directions of the formula in float64; DoRA's norm is a constant by its paper (§4.3)."""
    for init in inits(method):
        model, layer = trained(method, store, init)
        generator = torch.Generator().manual_seed(4)
        x = inputs().requires_grad_()
        y = model(x)
        weights = torch.randn(y.shape, generator=generator)
        (y * weights).sum().backward()
        own = {name: p for name, p in layer.adapter("default").named_parameters() if p.requires_grad}
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        with torch.no_grad():
            held = None
            if method == "dora":
                m = layer.adapter("default").get_parameter("lora_magnitude_vector").double()
                held = formula(layer, torch.ones(())).norm(dim=1, keepdim=True) / m[:, None]
            for name, tensor in {**own, "x": x}.items():
                direction = torch.randn(tensor.shape, generator=generator)
                sides = []
                for step in (0.5, -0.5):  # the formula is linear in each of them: any step is exact
                    tensor += step * direction
                    sides.append((expected(layer, x, held) * weights).sum().item())
                    tensor -= step * direction
                found = (tensor.grad.double() * direction).sum().item()
                wanted = sides[0] - sides[1]
                assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), f"{init}: {name}"
                assert abs(wanted) > 1e-3, f"{init}: {name} has no effect"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("store", FORMS)
def test_in_float64_it_is_exact(method: str, store: str) -> None:
    """Casting a model casts its products, too: the same weight, read in float64."""
    model, layer = trained(method, store)
    model.double()
    close(model(inputs().double()), expected(layer, inputs()), 1e-13)


@pytest.mark.parametrize(("method", "store"), CELLS)
def test_dropout_acts_on_the_update_alone(method: str, store: str) -> None:
    model = base(store)
    add_lora_to_model(model, r=4, target_modules=["layer"], lora_dropout=0.5, seed=2, **METHODS[method])
    x = inputs()
    close(model(x), F.linear(x, adapter_layers(model)["layer"].store.read(), model.layer.bias).double())
    model.eval()
    layer = adapter_layers(model)["layer"]
    with torch.no_grad():
        for parameter in layer.trainable():
            parameter += 0.2
    if store != "bnb-int8":  # in evaluation its own product rounds the input, too
        close(model(x), F.linear(x.double(), layer.merged_weight().double(), layer.base.bias.double()))
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("store", FORMS)
def test_checkpointing_gives_the_same_gradients(method: str, store: str) -> None:
    grads = []
    for recompute in (False, True):
        model, layer = trained(method, store)
        x = inputs().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.trainable())])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("store", FORMS)
def test_the_backward_pass_keeps_no_dense_weight(store: str) -> None:
    model = base(store, nn.Linear(256, 256))
    add_lora_to_model(model, r=4, target_modules=["layer"])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(torch.randn(3, 256, requires_grad=True)).sum().backward()
    assert sum(t.numel() for t in kept) < 256 * 256 / 8


# ------------------------------------------------------------------------------------------- life of a model


@pytest.mark.parametrize("store", STORES)
def test_merging_is_refused_and_changes_nothing(store: str) -> None:
    model, layer = trained("lora", store)
    other = nn.ModuleDict({"net": model, "head": nn.Linear(OUT, 3)})
    add_lora_to_model(other, r=2, target_modules=["head"], adapter_name="head")
    activate(other, "default", "head")
    before = {key: t.clone() for key, t in other.state_dict().items()}
    with pytest.raises(
        ConflictError, match=r"module net.layer: the base is quantised \((nf4|fp4|int8)\)"
    ) as info:
        merge(other)
    assert "--dequantize" in str(info.value)
    with pytest.raises(ConflictError, match="would lose the adapter's update"):
        layer.merge()
    assert not any(c.merged for c in adapter_layers(other).values())
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())
    merge(other, ["head"])  # the quantised layer has no such adapter
    assert adapter_layers(other)["head"].merged
    unmerge(other)
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())


@pytest.mark.parametrize("store", STORES)
def test_detaching_gives_back_the_object_and_its_bits(store: str) -> None:
    model = base(store)
    module, weight, bits = model.layer, model.layer.weight, model.layer.weight.clone()
    before = model(inputs())
    adapt(model, "dora", "pissa")
    detach(model)
    assert model.layer is module
    assert model.layer.weight is weight
    assert torch.equal(weight, bits)
    assert torch.equal(model(inputs()), before)


@pytest.mark.parametrize("store", STORES)
def test_parameters_are_counted_as_if_dense(store: str) -> None:
    plain, model = Net(dense()), base(store)
    assert count_parameters(model)["total"] == count_parameters(plain)["total"] == IN * OUT + OUT
    for net in (plain, model):
        add_lora_to_model(net, r=4, target_modules="all")
    assert count_parameters(model) == count_parameters(plain)
    freeze_backbone_params(model, freeze=False)
    assert not adapter_layers(model)["layer"].base.weight.requires_grad
    assert adapter_layers(model)["layer"].base.bias.requires_grad


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("method", METHODS)
def test_copies_compute_the_same(store: str, method: str) -> None:
    model, _ = trained(method, store)
    copies = [copy.deepcopy(model)]
    if store in FORMS:  # a layer of bitsandbytes refers to itself from its weight
        copies.append(pickle.loads(pickle.dumps(model)))
    for again in copies:
        assert torch.equal(again(inputs()), model(inputs()))


def test_a_quantised_module_cannot_be_trained_whole() -> None:
    for store in STORES:
        with pytest.raises(TargetError, match="a quantised module cannot be trained whole"):
            add_lora_to_model(
                nn.ModuleDict({"a": base(store), "b": nn.Linear(2, 2)}),
                target_modules=["b"],
                modules_to_save=["a"],
            )


def test_a_transposed_layer_is_adapted_as_its_matrix() -> None:
    plain = Net(dense(lambda: Conv1D(OUT, IN)))
    model = base("nf4", dense(lambda: Conv1D(OUT, IN)))
    for net in (plain, model):
        add_lora_to_model(net, r=4, target_modules="all", seed=5)
        with torch.no_grad():
            adapter_layers(net)["layer"].adapter("default").lora_B.fill_(0.1)
    change = [net(inputs()) - adapter_layers(net)["layer"].base(inputs()) for net in (plain, model)]
    assert torch.allclose(*change, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("method", "store"), CELLS)
def test_files_keep_every_bit(method: str, store: str, tmp_path: Path) -> None:
    for init in inits(method):
        model, _ = trained(method, store, init)
        again = base(store)
        load_adapter(again, save_adapter(model, tmp_path / init))
        assert torch.equal(again(inputs()), model(inputs())), init


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("store", BITSANDBYTES)
def test_peft_reads_our_folder_over_the_same_base(method: str, store: str, tmp_path: Path) -> None:
    for init in inits(method):
        model, _ = trained(method, store, init)
        theirs = PeftModel.from_pretrained(base(store), save_adapter(model, tmp_path / init)).train()
        close(theirs(inputs()), model(inputs()).double(), 1e-5)


# PEFT's DoRA and AdaLoRA fail on a Linear8bitLt on a CPU in their second pass and on three axes.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "store"),
    [
        (method, store)
        for method in ("lora", "rslora", "dora", "adalora")
        for store in BITSANDBYTES
        if store != "bnb-int8" or method in ("lora", "rslora")
    ],
)
def test_we_read_a_folder_of_peft_trained_on_their_base(method: str, store: str, tmp_path: Path) -> None:
    shared = {"target_modules": ["layer"], "lora_alpha": 6}
    settings = (
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, **shared)
        if method == "adalora"
        else PeftConfig(r=4, use_dora=method == "dora", use_rslora=method == "rslora", **shared)
    )
    theirs = get_peft_model(base(store), settings).train()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path)
    for ours in (base(store), Net(quantized(dense(), STORES[store])) if store != "bnb-int8" else base(store)):
        load_adapter(ours, tmp_path)
        close(ours.train()(inputs()), theirs(inputs()).double(), 1e-5)


# ----------------------------------------------------------------------------------------------------- LoftQ


@pytest.mark.parametrize("store", STORES)
def test_loftq_starts_at_the_best_of_its_rank(store: str) -> None:
    """No other B A of rank r leaves less of W − Q than the r leading singular triplets do."""
    model = base(store)
    layer = adapt(model, "lora", "loftq")
    lost = (dense().weight - layer.store.read()).double()
    left = (dense().weight - layer.merged_weight()).norm().item()
    assert left == pytest.approx(torch.linalg.svdvals(lost)[4:].norm().item(), rel=0.02)
    assert left < 0.9 * lost.norm()


def test_turns_of_loftq_bring_the_sum_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.02
    form, s = FourBit(double=False), 1.5

    def rounded(M: Tensor) -> Tensor:
        return form.dequantize(form.quantize(M), (96, 128), torch.float32)

    left = []
    for turns in (1, 2, 5):
        target, A, B = alternate(W, rounded, 8, s, turns, generator)
        left.append((W - rounded(target) - s * (B @ A)).norm().item())
        assert torch.equal(target, W) == (turns == 1)
    assert (W - rounded(W)).norm() > left[0] > left[1] > left[2]


def test_leading_factors_are_nearly_the_best() -> None:
    for shape, r in (((96, 128), 8), ((40, 12), 12), ((5, 300), 3)):
        M = torch.randn(shape)
        A, B = leading_factors(M, r, 0.5, None)
        assert (A.shape, B.shape) == ((r, shape[1]), (shape[0], r))
        best = torch.linalg.svdvals(M)[r:].norm()
        assert (M - 0.5 * (B @ A)).norm() <= 1.01 * best + 1e-4


def test_loftq_without_what_it_needs_is_refused() -> None:
    model = base("nf4")
    settings: dict[str, Any] = {"target_modules": ["layer"], "r": 4, "init_lora_weights": "loftq"}
    with pytest.raises(UsageError, match="give dense_weight="):
        add_lora_to_model(model, **settings)
    with pytest.raises(UsageError, match=r"the dense weight is \(64, 10\), the layer's \(10, 64\)"):
        add_lora_to_model(model, dense_weight=lambda path: torch.zeros(IN, OUT), **settings)
    with pytest.raises(UsageError, match="loftq has nothing to take back"):
        add_lora_to_model(Net(dense()), dense_weight=lambda path: dense().weight, **settings)
    with pytest.raises(TargetError, match="rank 11 is more than a matrix"):
        add_lora_to_model(model, dense_weight=lambda path: dense().weight, **{**settings, "r": 11})
    assert not adapter_layers(model)
    with pytest.raises(UsageError, match="unknown initialiser 'loftq_niter_5'"):
        add_lora_to_model(model, **{**settings, "init_lora_weights": "loftq_niter_5"})


def test_starts_with_a_seed_do_not_touch_the_global_random_state() -> None:
    for init in ("loftq", "pissa_niter_3"):
        states = [torch.random.get_rng_state()]
        factors = []
        for _ in range(2):
            model = base("nf4")
            factors.append(adapt(model, "lora", init).adapter("default").lora_A)
            torch.rand(1)
            states.append(torch.random.get_rng_state())
        assert torch.equal(*factors)
        torch.random.set_rng_state(states[0])
        adapt(base("nf4"), "lora", init)
        assert torch.equal(torch.random.get_rng_state(), states[0])
