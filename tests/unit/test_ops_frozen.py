"""Weights that are read block by block, integer products and the chunked loss: against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorakit import hardware
from lorakit.ops import frozen, int8
from lorakit.ops.linear import frozen_linear, lora_linear, lora_linear_reference
from lorakit.ops.loss import IGNORE, cross_entropy_sum, cross_entropy_sum_reference


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Blocks:
    """A frozen weight whose blocks of rows exist only while they are used."""

    def __init__(self, W: Tensor, rows: int) -> None:
        self._W, self._rows = W, rows
        self.reads = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._W.dtype

    def _blocks(self) -> Iterator[Tensor]:
        self.reads += 1
        for block in self._W.split(self._rows):
            alive = block.clone()
            yield alive
            alive.fill_(math.nan)  # whoever still looks at it gets caught

    def times(self, x_NI: Tensor) -> Tensor:
        return frozen.times(self._blocks(), x_NI, len(self._W))

    def back(self, g_NO: Tensor) -> Tensor:
        return frozen.back(self._blocks(), g_NO)


def operands(leading: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """12 features in, 20 out, rank 3; x, A and B want gradients."""
    return {
        "x": normal(*leading, 12, seed=1, dtype=dtype).requires_grad_(),
        "W": normal(20, 12, seed=2, dtype=dtype),
        "bias": normal(20, seed=3, dtype=dtype),
        "A": normal(3, 12, seed=4, dtype=dtype).requires_grad_(),
        "B": normal(20, 3, seed=5, dtype=dtype).requires_grad_(),
    }


def gradients(y: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, wanted, normal(*y.shape, seed=6).to(y.dtype))


@pytest.mark.parametrize("rows", [1, 7, 20, 64])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_linear_on_blocks_is_its_reference(rows: int, leading: tuple[int, ...], bias: bool) -> None:
    given = operands(leading)
    given["bias"] = given["bias"] if bias else None
    x, A, B = given["x"], given["A"], given["B"]
    weight = Blocks(given["W"], rows)
    y = lora_linear(x, weight, given["bias"], A, B, 0.7)
    expected = lora_linear_reference(**given, scaling=0.7)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for found, right in zip(gradients(y, x, A, B), gradients(expected, x, A, B), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    assert weight.reads == 2  # once forwards, once backwards


@pytest.mark.parametrize("rows", [3, 20])
def test_frozen_linear_is_a_linear_layer(rows: int) -> None:
    given = operands((2, 4))
    x, W, bias = given["x"], given["W"], given["bias"].requires_grad_()
    y = frozen_linear(x, Blocks(W, rows), bias)
    expected = torch.nn.functional.linear(x, W, bias)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for found, right in zip(gradients(y, x, bias), gradients(expected, x, bias), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_a_trained_bias_under_an_adapter_gets_its_gradient() -> None:
    given = operands((4,))
    bias = given["bias"].requires_grad_()
    y = lora_linear(given["x"], Blocks(given["W"], 7), bias, given["A"], given["B"], 1.0)
    (found,) = gradients(y, bias)
    torch.testing.assert_close(found, normal(4, 20, seed=6).sum(0))


@pytest.mark.parametrize("product", ["frozen", "lora"])
def test_nothing_dense_is_kept_for_the_backward_pass(product: str) -> None:
    """Every tensor that autograd holds is smaller than W, and without a gradient for x W is read once."""
    given = operands((1,))
    weight, x = Blocks(given["W"], 20), given["x"].detach()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        if product == "frozen":
            y = frozen_linear(x.requires_grad_(), weight, None)
        else:
            y = lora_linear(x, weight, None, given["A"], given["B"], 1.0)
    assert all(count < given["W"].numel() for count in kept), kept
    y.sum().backward()
    assert weight.reads == (2 if product == "frozen" else 1)


def test_products_run_in_the_weights_dtype_and_come_back_in_the_inputs() -> None:
    given = operands((6,), torch.float32)
    weight = Blocks(given["W"].bfloat16(), 7)
    y = lora_linear(given["x"], weight, given["bias"], given["A"], given["B"], 1.0)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.bfloat16().float())
    assert {g.dtype for g in gradients(y, given["x"], given["A"], given["B"])} == {torch.float32}


def test_autocast_chooses_the_dtype() -> None:
    given = operands((6,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(given["x"], Blocks(given["W"], 7), given["bias"], given["A"], given["B"], 1.0)
        plain = frozen_linear(given["x"], Blocks(given["W"], 7), given["bias"])
    assert (y.dtype, plain.dtype) == (torch.bfloat16, torch.bfloat16)
    exact = lora_linear_reference(**given, scaling=1.0)
    assert ((y - exact).norm() / exact.norm()).item() < 0.01
    assert gradients(y, given["x"])[0].dtype == torch.float32


def test_checkpointing_gives_the_same_gradients() -> None:
    given = operands((5,))

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, Blocks(given["W"], 7), given["bias"], given["A"], given["B"], 0.5).tanh()

    wanted = (given["x"], given["A"], given["B"])
    plain = gradients(layer(given["x"]), *wanted)
    again = gradients(checkpoint(layer, given["x"], use_reentrant=False), *wanted)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_second_derivatives_are_refused() -> None:
    given = operands((5,))
    y = frozen_linear(given["x"], Blocks(given["W"], 7), None).square().sum()
    (slope,) = torch.autograd.grad(y, given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


# ------------------------------------------------------------------------------------------- integer products

integers = pytest.mark.skipif(not hardware.integer_products(), reason="no integer products here")


@pytest.fixture
def narrow_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are too narrow to pay for many rows are multiplied on integers all the same."""
    monkeypatch.setattr(int8, "_NARROW", 0)


def eight_bit(out: int, features: int, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the dense weight that they stand for."""
    W = normal(out, features, seed=seed, dtype=torch.float32)
    scale = W.abs().amax(1) / 127
    codes = (W / scale[:, None]).round().to(torch.int8)
    return codes, scale, codes * scale[:, None]


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.usefixtures("narrow_too")
@integers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "out", "features"), [(40, 96, 64), (1, 33, 130), (300, 64, 512)])
def test_integer_products_are_close(n: int, out: int, features: int, dtype: torch.dtype) -> None:
    codes, scale, W = eight_bit(out, features)
    x, g = normal(n, features, seed=8, dtype=dtype), normal(n, out, seed=9, dtype=dtype)
    tally = int8.Tally()
    y, gx = int8.times(x, codes, scale, tally), int8.back(g, codes, scale, tally)
    assert y is not None
    assert gx is not None
    assert (y.dtype, gx.dtype) == (dtype, dtype)
    assert off(y, x.float() @ W.T) < 0.015  # rows reach 3.3: steps of 0.026 are off by 0.0075
    assert off(gx, g.float() @ W) < 0.015
    assert (tally.calls, tally.dense) == (2, 0)
    assert 0.0 < tally.worst < 0.015


@integers
def test_codes_and_steps_restore_a_row() -> None:
    x = normal(9, 50, seed=10, dtype=torch.float32)
    x[4] = 0.0
    weigh = torch.rand(50, generator=torch.Generator().manual_seed(0))
    codes, step = int8.quantise_rows(x, weigh)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(1).tolist() == [127] * 4 + [0] + [127] * 4
    assert ((codes * step - x * weigh).abs() <= 0.5001 * step).all()


@pytest.mark.usefixtures("narrow_too")
@integers
def test_outlier_columns_do_not_cost_precision() -> None:
    """Columns a hundred times as large as the rest, in which LLMs keep a few features of every token."""
    codes, scale, W = eight_bit(96, 512)
    x = normal(64, 512, seed=11, dtype=torch.float32)
    x[:, [3, 100, 411]] *= 100
    codes[:, [3, 100, 411]] //= 100  # such columns have small weights: the others still count
    W = codes * scale[:, None]
    y = int8.times(x, codes, scale, int8.Tally())
    assert y is not None
    assert off(y, x @ W.T) < 0.015
    step = x.abs().amax(1, keepdim=True) / 127
    assert off(((x / step).round() * step) @ W.T, x @ W.T) > 0.1  # what rounding all columns would cost


@integers
def test_a_threshold_takes_the_columns_that_reach_it() -> None:
    codes, scale, W = eight_bit(32, 256)
    x = normal(16, 256, seed=12, dtype=torch.float32).clamp(-3, 3)
    x[5, 77] = 6.0
    all_dense = int8.times(x, codes, scale, int8.Tally(), threshold=1e-9)
    assert all_dense is not None
    torch.testing.assert_close(all_dense, x @ W.T, rtol=1e-4, atol=1e-4)
    only_one, rest = int8.times(x, codes, scale, int8.Tally(), threshold=6.0), x.clone()
    rest[:, 77] = 0.0
    by_hand, step = int8.quantise_rows(rest, torch.ones(256))
    assert only_one is not None
    expected = (by_hand * step) @ W.T + x[:, 77:78] @ W[:, 77:78].T
    torch.testing.assert_close(only_one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("narrow_too")
@integers
def test_a_product_that_is_too_far_off_is_left_to_the_dense_weight() -> None:
    """One huge entry in another column of each row: no few columns to take out."""
    codes, scale, _ = eight_bit(64, 512)
    x = normal(256, 512, seed=13, dtype=torch.float32)
    x[torch.arange(256), torch.arange(256) * 2] = 1e4
    codes[:, ::2] = 0  # the product comes from the small entries
    tally = int8.Tally()
    assert int8.times(x, codes, scale, tally) is None
    assert (tally.calls, tally.dense) == (1, 1)
    assert tally.worst > int8.BOUND
    x[0, 1] = math.nan
    assert int8.times(x, codes, scale, tally) is None
    assert tally.dense == 2


def test_float64_and_machines_without_integer_products_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, _ = eight_bit(16, 32)
    assert int8.times(normal(4, 32, seed=1), codes, scale, int8.Tally()) is None
    monkeypatch.setattr(hardware, "integer_products", lambda: False)
    x = normal(4, 32, seed=1, dtype=torch.float32)
    assert int8.times(x, codes, scale, int8.Tally()) is None
    assert int8.back(normal(4, 16, seed=1, dtype=torch.float32), codes, scale, int8.Tally()) is None


@integers
def test_narrow_weights_are_left_to_bf16_but_for_a_few_rows() -> None:
    codes, scale, _ = eight_bit(256, 1024)
    x = normal(64, 1024, seed=18, dtype=torch.bfloat16)
    assert int8.times(x, codes, scale, int8.Tally()) is None
    assert int8.times(x[:4], codes, scale, int8.Tally()) is not None


@pytest.mark.skipif(hardware.compiler() is None, reason="no C++ compiler here")
def test_the_compiled_pass_is_its_function() -> None:
    x, weigh = normal(520, 512, seed=19, dtype=torch.bfloat16), torch.linspace(0.0, 1.0, 512)
    compiled = int8._pass(int8.quantise_rows, x)
    assert compiled is not int8.quantise_rows
    (codes, step), (right, right_step) = compiled(x, weigh), int8.quantise_rows(x, weigh)
    torch.testing.assert_close(step, right_step)
    apart = (codes.int() - right.int()).abs()  # a quotient half way between two steps may go either way
    assert apart.max() <= 1
    assert apart.double().mean() < 1e-3


@integers
def test_the_same_input_gives_the_same_product() -> None:
    codes, scale, _ = eight_bit(64, 256)
    x = normal(32, 256, seed=14, dtype=torch.bfloat16)
    first, second = (int8.times(x, codes, scale, int8.Tally()) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


# --------------------------------------------------------------------------------------------- chunked loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 150, 10**6])
def test_the_chunked_loss_is_its_reference(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr("lorakit.ops.loss._CHUNK", chunk)
    logits = (4 * normal(23, 50, seed=15)).to(dtype).requires_grad_()
    labels = torch.randint(50, (23,), generator=torch.Generator().manual_seed(1))
    labels[::4] = IGNORE
    loss, expected = cross_entropy_sum(logits, labels), cross_entropy_sum_reference(logits, labels)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    (found,), (right,) = (torch.autograd.grad(value * 0.37, logits) for value in (loss, expected))
    assert found.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(found, right, rtol=rounding, atol=tolerance)


def test_rows_without_a_label_may_hold_anything() -> None:
    logits = normal(3, 5, seed=16).requires_grad_()
    with torch.no_grad():
        logits[1] = math.nan
    loss = cross_entropy_sum(logits, torch.tensor([2, IGNORE, 4]))
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(logits.grad[1], torch.zeros(5, dtype=torch.float64))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("label", [50, -1])
def test_a_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        cross_entropy_sum(normal(2, 50, seed=17), torch.tensor([3, label]))
