"""The C++ passes against the formulas in float64, and that nothing needs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.ops import int8, native, products
from lorakit.ops.attention import Scores, packed_attention, packed_attention_reference, rotate
from lorakit.ops.dropout import NOTHING, Mask, draw_mask
from lorakit.ops.gated import Act, gated, gated_reference
from lorakit.ops.linear import _LoRALinear, _Update
from lorakit.ops.loss import PLAIN, Softening, cross_entropy_sum_reference, linear_cross_entropy_sum
from lorakit.ops.norm import rms_norm, rms_norm_reference
from lorakit.ops.projections import Projection, projections
from lorakit.quant.blockwise import FourBit
from lorakit.quant.modules import QuantLinear

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative, of the norm of the difference
DTYPES = list(TOLERANCE)
WIDTHS = [64, 576, 37]  # whole vectors, and a rest


@pytest.fixture(autouse=True, params=["passes", "PyTorch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test with the passes and without."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler here")


def close(
    found: tuple[Tensor, ...], expected: tuple[Tensor, ...], dtype: torch.dtype, factor: float = 1.0
) -> None:
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).norm() <= factor * TOLERANCE[dtype] * exact.norm()


def total(ys: Sequence[Tensor], gs: Sequence[Tensor]) -> Tensor:
    """A number whose derivative by each y is its g."""
    return torch.stack([(y.double() * g.double()).sum() for y, g in zip(ys, gs, strict=True)]).sum()


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().double().requires_grad_(x.requires_grad) for x in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(dtype: torch.dtype, width: int, offset: float) -> None:
    x = torch.randn(7, 5, width, dtype=dtype, requires_grad=True)
    w, g = torch.randn(width, dtype=dtype), torch.randn(7, 5, width, dtype=dtype)
    y = rms_norm(x, w, 1e-5, offset)
    X, W = wide(x, w)
    Y = rms_norm_reference(X, W, 1e-5, offset)
    close((y, *torch.autograd.grad(y, x, g)), (Y, *torch.autograd.grad(Y, X, g.double())), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_gated(dtype: torch.dtype, width: int, act: Act) -> None:
    gate, up = (3 * torch.randn(11, width, dtype=dtype) for _ in range(2))
    gate.requires_grad_(), up.requires_grad_()
    y, g = gated(gate, up, act), torch.randn(11, width, dtype=dtype)
    inputs = wide(gate, up)
    Y = gated_reference(*inputs, act)
    close((y, *torch.autograd.grad(y, (gate, up), g)), (Y, *torch.autograd.grad(Y, inputs, g.double())), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(50, 576, 192, 8), (33, 100, 37, 5), (1, 64, 64, 16), (40, 96, 80, 48)])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_lora_linear(dtype: torch.dtype, shape: tuple[int, int, int, int], p: float) -> None:
    rows, inputs, outputs, rank = shape
    x, W = torch.randn(rows, inputs, dtype=dtype, requires_grad=True), torch.randn(outputs, inputs, dtype=dtype)
    A, B = torch.randn(rank, inputs, requires_grad=True), torch.randn(outputs, rank, requires_grad=True)
    mask = draw_mask(p) if p else NOTHING
    y, g = (
        _LoRALinear.apply(x, W, None, A, B, _Update(0.5, mask, trains=True)),
        torch.randn(rows, outputs, dtype=dtype),
    )
    X, A64, B64, W64 = wide(x, A, B, W)
    Y = X @ W64.T + 0.5 * ((X * mask.factors(rows, inputs)) @ A64.T) @ B64.T
    expected = torch.autograd.grad(Y, (X, A64, B64), g.double())
    close((y, *torch.autograd.grad(y, (x, A, B), g)), (Y, *expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("trains", ["all", "x needs no gradient", "only B"])
def test_projections_of_one_input(dtype: torch.dtype, four_bits: bool, p: float, trains: str) -> None:
    rows, width, sizes = 71, 96, {64: 8, 160: 0, 32: 5, 224: 12}  # outputs and ranks, 0: without an update
    x = torch.randn(rows, width, dtype=dtype, requires_grad=trains != "x needs no gradient")
    layers, dense = [], []
    for outputs, rank in sizes.items():
        W: Tensor | QuantLinear = torch.randn(outputs, width, dtype=dtype)
        if four_bits:
            quantised = QuantLinear(width, outputs, FourBit("nf4", double=True), compute_dtype=dtype)
            quantised.write(W.float())
            W = quantised
        A = torch.randn(rank, width, requires_grad=trains != "only B") if rank else None
        B = torch.randn(outputs, rank, requires_grad=True) if rank else None
        bias = torch.randn(outputs, dtype=dtype) if rank == 5 else None
        layers.append(Projection(W, bias, A, B, 0.5))
        dense.append(W.read() if isinstance(W, QuantLinear) else W)
    torch.manual_seed(0)
    with products.by_units():
        ys = projections(x, layers, p)
        shared = products.fits((x, dense[0]))
    torch.manual_seed(0)
    masks = [draw_mask(p) if p and (layer.rank or shared) else NOTHING for layer in layers]
    gs = [torch.randn_like(y) for y in ys]
    trained = [
        t for t in (x, *(t for each in layers for t in (each.A, each.B) if t is not None)) if t.requires_grad
    ]
    found = torch.autograd.grad(total(ys, gs), trained)
    X, *params = wide(x, *(t for each in layers for t in (each.A, each.B) if t is not None))
    rest, Ys = iter(params), []
    for layer, W, mask in zip(layers, dense, masks[:1] * len(layers) if shared else masks, strict=True):
        Y = X @ W.double().T + (0 if layer.bias is None else layer.bias.double())
        if layer.rank:
            A64, B64 = next(rest), next(rest)
            Y = Y + 0.5 * ((X * mask.factors(rows, width)) @ A64.T) @ B64.T
        Ys.append(Y)
    wanted = [t for t in (X, *params) if t.requires_grad]
    expected = torch.autograd.grad(total(Ys, gs), wanted)
    close((*ys, *found), (*Ys, *expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("turned", "how"),
    [
        (False, Scores(0.3)),
        (True, Scores(0.3)),
        (True, Scores(0.3, window=21)),
        (False, Scores(0.3, window=290, cap=2.0)),
        (True, Scores(0.3, cap=5.0)),
    ],
)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "lengths"),
    [
        (6, 2, 16, (5, 9, 30, 1, 28)),
        (4, 4, 64, (300, 20, 290)),
        (9, 3, 64, (600,)),
        (2, 1, 24, (17, 16)),
        (4, 1, 80, (1, 90)),
    ],
)
def test_packed_attention(
    dtype: torch.dtype, turned: bool, how: Scores, heads: int, groups: int, size: int, lengths: tuple[int, ...]
) -> None:
    total = sum(lengths)
    q, k, v = (
        torch.randn(total, count, size, dtype=dtype).transpose(0, 1).requires_grad_()
        for count in (heads, groups, groups)
    )
    angle = 6 * torch.rand(total, size // 2)
    angles = tuple(torch.cat([f(angle)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    y, g = packed_attention(q, k, v, lengths, how, angles if turned else None), torch.randn(heads, total, size)
    Q, K, V = wide(q, k, v)
    exact = [rotate(x, *(a.double() for a in angles)) if turned else x for x in (Q, K)]
    Y = packed_attention_reference(*exact, V, lengths, how)
    expected = torch.autograd.grad(Y, (Q, K, V), g.double())
    close((y, *torch.autograd.grad(y, (q, k, v), g.to(dtype))), (Y, *expected), dtype, factor=1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (70, 64, 96),
        (33, 576, 192),
        (128, 96, 1056),
        (64, 100, 60),
        (3, 64, 64),
        (33, 2592, 544),
        (70, 96, 2592),
    ],
)
def test_products_with_frozen_weights(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, width, outputs = shape
    more = 32 if width % 32 == 0 else width

    def operands(inner: int, weight: Callable[[int], tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        depths = (inner, more)
        return [(torch.randn(rows, d, dtype=dtype), torch.randn(weight(d), dtype=dtype)) for d in depths]

    forwards, backwards = operands(width, lambda d: (outputs, d)), operands(outputs, lambda d: (d, width))
    with products.by_units():
        y, gx = products.times(*forwards), products.back(*backwards)
    Y = sum(x.double() @ W.double().T for x, W in forwards)
    GX = sum(g.double() @ W.double() for g, W in backwards)
    close((y, gx), (Y, GX), dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(33, 520, 640), (70, 576, 520), (128, 1000, 530), (1, 512, 512)])
def test_integer_products(shape: tuple[int, int, int]) -> None:
    """Against the same roundings by hand, multiplied in float64."""
    rows, width, outputs = shape
    x, g = torch.randn(rows, width, dtype=torch.bfloat16), torch.randn(rows, outputs, dtype=torch.bfloat16)
    x[:, 7] *= 40
    codes, scale = torch.randint(-127, 128, (outputs, width), dtype=torch.int8), 0.001 + torch.rand(outputs)
    W = codes.double() * scale.double()[:, None]
    for found, given, weight, scales in (
        (int8.times(x, codes, scale, int8.Tally()), x, W.T, torch.ones(width)),
        (int8.back(g, codes, scale, int8.Tally()), g, W, scale),
    ):
        assert found is not None
        outliers = int8._largest(given[int8._sample(rows, int8._ROWS)] * scales)
        rounded, step = int8.quantise_rows(given, scales.index_fill(0, outliers, 0.0))
        inner = rounded.double() * step.double() / scales
        inner[:, outliers] = given[:, outliers].double()
        exact = inner @ weight
        assert (found - exact).norm() <= 6e-3 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how", [PLAIN, Softening(cap=3.0), Softening(smoothing=0.1), Softening(z=0.01), Softening(5.0, 0.2, 0.01)]
)
def test_linear_cross_entropy(dtype: torch.dtype, how: Softening) -> None:
    x, W = torch.randn(70, 32, dtype=dtype, requires_grad=True), 0.3 * torch.randn(5003, 32, dtype=dtype)
    labels = torch.randint(5003, (70,))
    loss = linear_cross_entropy_sum(x, W, labels, how)
    with torch.no_grad():
        assert linear_cross_entropy_sum(x, W, labels, how).item() == pytest.approx(loss.item(), rel=1e-3)
    X, W64 = wide(x, W)
    exact = cross_entropy_sum_reference(X @ W64.T, labels, how)
    close((loss, *torch.autograd.grad(0.5 * loss, x)), (exact, *torch.autograd.grad(0.5 * exact, X)), dtype)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    bad = torch.where(torch.arange(64) == 9, torch.nan, x)
    assert rms_norm(bad, torch.ones(64), 1e-5).isnan().all()
    assert gated(bad, x, "silu").isnan().sum() == 3
    W, labels = torch.randn(40, 64), torch.tensor([1, 2, 3])
    assert linear_cross_entropy_sum(bad, W, labels).isnan()


class TestDropout:
    @pytest.mark.parametrize("width", [64, 37])
    def test_the_mask_is_the_definition(self, width: int) -> None:
        mask = Mask(2**63 + 12345, 20000)
        assert torch.equal(mask.applied(torch.ones(9, width)), mask.factors(9, width))

    def test_its_share_and_its_mean(self) -> None:
        """Four standard deviations of a million draws; neighbours do not follow each other."""
        kept = draw_mask(0.1).applied(torch.ones(1000, 1024)) != 0
        assert abs(kept.float().mean() - 0.9) < 4 * 0.3 / 1000
        pairs = (kept[:, 1:] & kept[:, :-1]).float().mean(), (kept[1:] & kept[:-1]).float().mean()
        assert all(abs(each - 0.81) < 2e-3 for each in pairs)
        assert draw_mask(0.1).applied(torch.ones(1000, 1024)).mean().item() == pytest.approx(1.0, abs=2e-3)

    def test_two_keys_are_two_masks_and_a_seed_repeats_them(self) -> None:
        torch.manual_seed(3)
        first, second = draw_mask(0.5), draw_mask(0.5)
        torch.manual_seed(3)
        assert draw_mask(0.5) == first != second
        same = (first.factors(100, 320) == second.factors(100, 320)).float().mean()
        assert abs(same - 0.5) < 0.02


def test_a_missing_or_broken_compiler_is_no_obstacle(tmp_path: Path) -> None:
    """In a process of its own: the library is looked for once."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    code = "import torch\nfrom lorakit.ops import native\nassert native.library() is None"
    for settings in ({"CXX": str(broken)}, {"LORAKIT_NATIVE": "0"}):
        surroundings = {"PYTHONPATH": ":".join(sys.path), "LORAKIT_CACHE": str(tmp_path), "PATH": "/usr/bin"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, check=False, env=surroundings | settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("no such flag" in done.stderr) == ("CXX" in settings)
        assert not list((tmp_path).rglob("*.so"))
