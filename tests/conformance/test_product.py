"""Method × host × initialiser × dtype: every cell computes its formula, merges, and survives its files.

The formulas are written out once more here, in float64 and without the library's own mathematics. Cells that
cannot be are refused by a rule of `REFUSED`; what stock PEFT computes otherwise is listed in `NOT_IN_PEFT`.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.attach import adapter_layers, add_lora_to_model, detach, merge, unmerge
from lorakit.adapters.layer import AdapterLayer
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.errors import AdapterMismatchError, LorakitError, TargetError, UsageError

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_fa": {"lora_fa": True},
    "dora": {"method": "dora"},
    "adalora": {"method": "adalora"},
}
FLOATS, IDS = (2, 3, 6), None
HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "linear": (lambda: nn.Linear(6, 10), FLOATS),
    "linear-without-bias": (lambda: nn.Linear(6, 10, bias=False), FLOATS),
    "transposed": (lambda: Conv1D(10, 6), FLOATS),
    "embedding": (lambda: nn.Embedding(12, 10), IDS),
    "embedding-padding": (lambda: nn.Embedding(12, 10, padding_idx=3), IDS),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d-circular": (lambda: nn.Conv1d(4, 8, 3, padding=2, dilation=2, padding_mode="circular"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=1, bias=False), (2, 4, 6, 5)),
    "conv2d-same": (lambda: nn.Conv2d(4, 8, 3, padding="same", padding_mode="replicate"), (2, 4, 5, 5)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 5, 5)),
    "conv2d-depthwise": (
        lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2, groups=4, padding_mode="reflect"),
        (2, 4, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2, stride=2), (2, 4, 4, 4, 4)),
    "conv3d-groups": (lambda: nn.Conv3d(4, 8, 2, groups=2), (2, 4, 3, 3, 3)),
}  # fmt: skip
INITS = ("kaiming", "gaussian", "normal", "scaled_normal", "orthogonal", "pissa", "pissa_niter_3", "olora")
PLAIN = INITS[:4]  # these fill A alone
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TRANSPOSED = {"transposed", "embedding", "embedding-padding"}  # stored as [in, out]
GROUPED = {"conv2d-groups", "conv2d-depthwise", "conv3d-groups"}

# Which cells cannot be, by rule: error, what it says, method and initialiser and host that it is about.
REFUSED: tuple[tuple[type[LorakitError], str, Callable[[str, str, str], bool]], ...] = (
    (UsageError, "AdaLoRA has its own init_lora_weights", lambda m, h, i: m == "adalora" and i != "kaiming"),
    (TargetError, "AdaLoRA needs a whole matrix", lambda m, h, i: m == "adalora" and h in GROUPED),
    (TargetError, "needs a whole matrix", lambda m, h, i: i not in PLAIN and h in GROUPED),
)
# What stock PEFT does not compute, or computes otherwise, with the reason; both directions.
NOT_IN_PEFT: dict[str, Callable[[str, str], bool]] = {
    "PEFT gives lora_A neither dilation nor padding_mode": lambda m, h: h in {
        "conv1d-circular", "conv2d-same", "conv2d-depthwise"
    },
    "PEFT's AdaLoRA knows linear layers alone": lambda m, h: m == "adalora" and h.startswith(("emb", "conv")),
    "PEFT's DoRA norm of a grouped convolution fails": lambda m, h: m == "dora" and h in GROUPED,
}  # fmt: skip
NUMBERS = [(m, h) for m in METHODS for h in HOSTS]
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """One host under the name ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Cell:
    """One entry of the product."""

    method: str
    host: str
    init: str
    dtype: torch.dtype

    @property
    def refused(self) -> tuple[type[LorakitError], str] | None:
        return next((row[:2] for row in REFUSED if row[2](self.method, self.host, self.init)), None)

    def base(self) -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Net(HOSTS[self.host][0]()).to(self.dtype)

    def inputs(self) -> Tensor:
        generator, shape = torch.Generator().manual_seed(1), HOSTS[self.host][1]
        if shape is None:
            return torch.tensor([[3, 1, 1], [0, 11, 5]])
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def adapt(self, model: nn.Module) -> AdapterLayer:
        add_lora_to_model(
            model, r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=self.init, seed=2,
            **METHODS[self.method],
        )  # fmt: skip
        return adapter_layers(model)["layer"]

    def trained(self) -> tuple[Net, AdapterLayer]:
        """A model whose adapter training has moved: every tensor of it, and visibly so."""
        model = self.base()
        layer = self.adapt(model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in layer.adapter("default").named_parameters():
                step = 0.2 * torch.randn(parameter.shape, generator=generator)
                if name == "lora_A" and "padding" in self.host:
                    step[:, 3] = 0.0  # no gradient reaches the padding token's column
                parameter += step if name != "lora_A" or self.method != "lora_fa" else 0.0
        return model, layer

    def close(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Within some roundings of the dtype, measured against the largest number."""
        roundings = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[self.dtype]
        error = (found.double() - expected.double()).abs().max().item()
        assert error <= roundings * max(1.0, expected.abs().max().item()), (
            f"{self}: {what} is off by {error:.1e}"
        )


def cells(method: str, host: str, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[Cell]:
    """The cells of a method on a host that are not refused."""
    every = (Cell(method, host, init, dtype) for init in INITS for dtype in dtypes)
    return (cell for cell in every if cell.refused is None)


def product(A: Tensor, B: Tensor, W: Tensor, host: str) -> Tensor:
    """B A in the layout of W, one group after the other."""
    if host in TRANSPOSED:
        return (B @ A).T
    if host.startswith("linear"):
        return B @ A
    groups = A.shape[0] // B.shape[1]
    parts = zip(A.chunk(groups), B.chunk(groups), strict=True)
    return torch.cat([torch.einsum("or,r...->o...", b.flatten(1), a) for a, b in parts]).reshape(W.shape)


def formula(layer: AdapterLayer, host: str, norm: Tensor | None = None) -> Tensor:
    """The weight that the papers give for this adapter, in float64; DoRA with a held norm if one is given."""
    own = {name: p.double() for name, p in layer.adapter("default").named_parameters()}
    own |= {name: b.double() for name, b in layer.adapter("default").named_buffers()}
    W, A, B = layer.base.weight.detach().double(), own["lora_A"], own["lora_B"]
    s = 6 / math.sqrt(4) if layer.adapter("default").config.use_rslora else 6 / 4
    if "lora_E" in own:
        A = A * own["lora_E"].view(-1, *[1] * (A.dim() - 1))
    V = W + s * product(A, B, W, host)
    if "anchor_A" in own:
        V = V - s * product(own["anchor_A"], own["anchor_B"], W, host)
    if "lora_magnitude_vector" not in own:
        return V
    axes = (0,) if host in TRANSPOSED else tuple(range(1, V.dim()))
    if norm is None:
        norm = V.detach().pow(2).sum(axes, keepdim=True).sqrt()
    m = own["lora_magnitude_vector"]
    return V * (m if axes == (0,) else m.view(-1, *[1] * len(axes))) / norm


def with_weight(layer: AdapterLayer, weight: Tensor, x: Tensor) -> Tensor:
    """The plain module with another weight, in float64."""
    plain = copy.deepcopy(layer.base).double()
    return torch.func.functional_call(plain, {"weight": weight}, x.double() if x.is_floating_point() else x)


# ---------------------------------------------------------------------------------------------- the product


def test_the_product_is_as_large_as_it_should_be() -> None:
    found = [cell for method, host in NUMBERS for cell in cells(method, host)]
    assert len(found) == 3 * (10 * (4 * 8 + 1) + 3 * 4 * 4) == 1134
    assert {(c.method, c.host) for c in found} >= {
        (m, h) for m, h in NUMBERS if m != "adalora" or h not in GROUPED
    }
    assert {(c.init, c.dtype) for c in found} == {(init, dtype) for init in INITS for dtype in DTYPES}


@pytest.mark.parametrize(("method", "host"), NUMBERS)
def test_what_cannot_be_is_refused_and_leaves_the_model_alone(method: str, host: str) -> None:
    for init in INITS:
        cell = Cell(method, host, init, torch.float32)
        if cell.refused is not None:
            model = cell.base()
            with pytest.raises(cell.refused[0], match=cell.refused[1]):
                cell.adapt(model)
            assert not adapter_layers(model)
            assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("method", "host"), NUMBERS)
def test_at_step_zero_it_is_the_base(method: str, host: str) -> None:
    for cell in cells(method, host):
        model, x = cell.base(), cell.inputs()
        before = model(x)
        layer = cell.adapt(model)
        after = model(x)
        assert after.dtype == before.dtype
        cell.close(after, before, "step 0")
        if cell.init in PLAIN:
            assert torch.equal(after, before), f"{cell}: bits"
        cell.close(layer.merged_weight(), layer.base.weight, "the merged weight at step 0")


@pytest.mark.parametrize(("method", "host"), NUMBERS)
def test_forward_is_the_formula_and_so_is_the_merged_weight(method: str, host: str) -> None:
    for cell in cells(method, host):
        model, layer = cell.trained()
        x = cell.inputs()
        base = with_weight(layer, layer.base.weight.double(), x)
        weight = formula(layer, host).detach()
        expected = with_weight(layer, weight, x)
        assert (expected - base).abs().max() > 0.02, f"{cell}: the adapter does nothing"
        cell.close(model(x), expected, "forward")
        cell.close(layer.merged_weight(), weight, "the merged weight")
        merge(model)
        cell.close(model(x), expected, "the merged forward")
        assert model(x).dtype == layer.base.weight.dtype == cell.dtype


@pytest.mark.parametrize(("method", "host"), NUMBERS)
def test_merge_can_be_undone_to_the_bit_and_to_the_object(method: str, host: str) -> None:
    for cell in cells(method, host):
        model, layer = cell.trained()
        x, module, weight = cell.inputs(), layer.base, layer.base.weight
        bits, before, bare = weight.clone(), model(x), cell.base().state_dict()
        for _ in range(2):
            merge(model)
            assert model.state_dict().keys() == bare.keys(), f"{cell}: a merged model is plain"
            plain = cell.base()
            plain.load_state_dict(model.state_dict())
            assert torch.equal(plain(x), model(x)), f"{cell}: it loads without lorakit"
            unmerge(model)
            assert layer.base.weight is weight, f"{cell}: the parameter object"
            assert torch.equal(weight, bits), f"{cell}: bits"
            assert torch.equal(model(x), before), f"{cell}: output"
        detach(model)
        assert model.layer is module


@pytest.mark.parametrize(("method", "host"), NUMBERS)
def test_copies_compute_the_same(method: str, host: str) -> None:
    for cell in cells(method, host, (torch.float32,)):
        model, _ = cell.trained()
        x = cell.inputs()
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(x), model(x)), f"{cell}"


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("method", "host"), NUMBERS)
def test_gradients_are_finite_differences_and_flow_where_declared(method: str, host: str) -> None:
    """Along random directions in float64; DoRA's norm is a constant by its paper (§4.3), so it is held."""
    for cell in cells(method, host, (torch.float64,)):
        model, layer = cell.trained()
        model.double()  # the adapter's tensors are float32 by design, too coarse for differences
        generator = torch.Generator().manual_seed(4)
        x = cell.inputs()
        x = x.requires_grad_() if x.is_floating_point() else x
        y = model(x)
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        (y * weights).sum().backward()
        own = dict(layer.adapter("default").named_parameters())
        if method == "lora_fa":
            assert own.pop("lora_A").grad is None
        held = None
        if method == "dora":
            held = norm_of(layer, host)

        def loss(cell: Cell = cell, layer: AdapterLayer = layer, held: Any = held, x: Tensor = x) -> float:
            return (with_weight(layer, formula(layer, cell.host, held), x) * weights).sum().item()  # noqa: B023

        with torch.no_grad():
            for name, tensor in own.items() | ({("x", x)} if x.is_floating_point() else set()):
                direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                if name == "lora_A" and "padding" in host:
                    assert not tensor.grad[:, 3].any(), f"{cell}: the padding token's column"
                    direction[:, 3] = 0.0
                sides = []
                for step in (1e-5, -1e-5):
                    tensor += step * direction
                    sides.append(loss())
                    tensor -= step * direction
                expected = (sides[0] - sides[1]) / 2e-5
                found = (tensor.grad * direction).sum().item()
                assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), f"{cell}: gradient of {name}"
                assert abs(expected) > 1e-3, f"{cell}: {name} has no effect"
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters()), f"{cell}"
        assert layer.base.weight.grad is None


def norm_of(layer: AdapterLayer, host: str) -> Tensor:
    """‖W + s B A‖ as `formula` divides by it: from the formula with magnitude one."""
    m = layer.adapter("default").lora_magnitude_vector.detach().double()
    axes = (0,) if host in TRANSPOSED else tuple(range(1, layer.base.weight.dim()))
    shaped = m if axes == (0,) else m.view(-1, *[1] * len(axes))
    unit = formula(layer, host, torch.ones(())).detach() / shaped
    return unit.pow(2).sum(axes, keepdim=True).sqrt()


# ----------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("name", "dtypes"), [("adapter", DTYPES[:1]), ("adapter.pth", DTYPES[1:])])
@pytest.mark.parametrize(("method", "host"), NUMBERS)
def test_files_keep_every_bit(
    method: str, host: str, name: str, dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    for number, cell in enumerate(cells(method, host, dtypes)):
        model, layer = cell.trained()
        path = save_adapter(model, tmp_path / str(number) / name)
        again = cell.base()
        load_adapter(again, path)
        own, other = (m.layer.adapter("default").state_dict() for m in (model, again))
        assert own.keys() == other.keys(), f"{cell}"
        assert all(torch.equal(own[key], other[key]) for key in own), f"{cell}"
        assert torch.equal(again(cell.inputs()), model(cell.inputs())), f"{cell}"
        assert adapter_layers(again)["layer"].adapter("default").scaling == layer.adapter("default").scaling


def in_peft(method: str, host: str) -> bool:
    return not any(rule(method, host) for rule in NOT_IN_PEFT.values())


def test_enough_of_the_product_is_compared_with_peft() -> None:
    both = [(method, host) for method, host in NUMBERS if in_peft(method, host)]
    assert len(both) >= 36
    assert {method for method, _ in both} == set(METHODS)
    for reason, rule in NOT_IN_PEFT.items():
        assert any(rule(method, host) for method, host in NUMBERS), reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "host"), [pair for pair in NUMBERS if in_peft(*pair)])
def test_peft_reads_our_folder(method: str, host: str, tmp_path: Path) -> None:
    for cell in cells(method, host, (torch.float32,)):
        model, _ = cell.trained()
        folder = save_adapter(model, tmp_path / cell.init)
        theirs = PeftModel.from_pretrained(cell.base(), folder).eval()
        cell.close(theirs(cell.inputs()), model(cell.inputs()), "PEFT's output")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "host"), [pair for pair in NUMBERS if in_peft(*pair)])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_we_read_a_folder_of_peft(method: str, host: str, init: Any, tmp_path: Path) -> None:
    cell = Cell(method, host, "kaiming" if init is True else init, torch.float32)
    if (
        cell.refused
        or method == "lora_fa"
        or (init in ("pissa", "olora", "orthogonal") and not peft_starts(host))
    ):
        return
    shared = {"target_modules": ["layer"], "lora_alpha": 6, "fan_in_fan_out": host == "transposed"}
    settings = (
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, **shared)
        if method == "adalora"
        else PeftConfig(
            r=4, init_lora_weights=init, use_dora=method == "dora", use_rslora=method == "rslora", **shared
        )
    )
    theirs = get_peft_model(cell.base(), settings).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path)
    ours = cell.base()
    if host in GROUPED:  # PEFT's A lets a group see the inputs of the others
        with pytest.raises(AdapterMismatchError, match=r"connects the \d groups of its convolution"):
            load_adapter(ours, tmp_path)
        assert not adapter_layers(ours)
        return
    load_adapter(ours, tmp_path)
    cell.close(ours(cell.inputs()), theirs(cell.inputs()), "our output")


def peft_starts(host: str) -> bool:
    """PEFT has these starts for linear layers alone; elsewhere it takes its default or fails."""
    return host.startswith("linear")
