"""Combining adapters: each formula against its definition, and against PEFT where it has the function."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import Generator, Tensor, nn

from lorakit.errors import UsageError
from lorakit.lowrank.combine import Factors, cat, dare, linear, reduce_rank, svd, ties

OUT, IN = 7, 11
WEIGHTS = [0.7, -1.3, 0.4]
SEEDS = range(4)


def draw(seed: int, r: int, scaling: float = 1.0, dtype: torch.dtype = torch.float64) -> Factors:
    generator = Generator().manual_seed(seed)
    A = torch.randn(r, IN, dtype=dtype, generator=generator)
    return Factors(A, torch.randn(OUT, r, dtype=dtype, generator=generator), scaling)


def draw_deltas(seed: int, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = Generator().manual_seed(seed)
    return [torch.randn(OUT, IN, dtype=dtype, generator=generator) for _ in range(count)]


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def peft_combination(
    kind: str, factors: list[Factors], weights: list[float], **options: int
) -> tuple[Factors, Tensor]:
    """What PEFT's add_weighted_adapter makes of the same tensors."""
    names = [f"a{i}" for i in range(len(factors))]
    configs = [
        LoraConfig(r=len(each.A), lora_alpha=each.scaling * len(each.A), target_modules=["0"])
        for each in factors
    ]
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT, bias=False)), configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    for name, each in zip(names, factors, strict=True):
        layer.lora_A[name].weight.data = each.A.clone()
        layer.lora_B[name].weight.data = each.B.clone()
    model.base_model.add_weighted_adapter(names, weights, "sum", combination_type=kind, **options)
    found = Factors(
        layer.lora_A["sum"].weight.detach(), layer.lora_B["sum"].weight.detach(), layer.scaling["sum"]
    )
    return found, layer.get_delta_weight("sum").detach()


@pytest.mark.parametrize("seed", SEEDS)
def test_cat_is_the_exact_weighted_sum(seed: int) -> None:
    factors = [draw(seed, 2, 2.0), draw(seed + 10, 5, 0.25), draw(seed + 20, 3, 1.5)]
    result = cat(factors, WEIGHTS)
    assert (result.A.shape, result.B.shape, result.scaling) == ((10, IN), (OUT, 10), 1.0)
    expected = sum(w * f.scaling * f.B @ f.A for w, f in zip(WEIGHTS, factors, strict=True))
    same(result.delta, expected)


def test_cat_matches_peft() -> None:
    factors = [draw(1, 2, 2.0, torch.float32), draw(2, 4, 0.5, torch.float32)]
    theirs, delta = peft_combination("cat", factors, [0.3, -0.8])
    ours = cat(factors, [0.3, -0.8])
    assert theirs.scaling == ours.scaling
    same(ours.A, theirs.A, 1e-6)
    same(ours.B, theirs.B, 1e-6)
    same(ours.delta, delta, 1e-5)


@pytest.mark.parametrize("weights", [[0.3, 0.8, 1.0], WEIGHTS, [-1.0, -2.0, 0.0]])
def test_linear_matches_peft(weights: list[float]) -> None:
    factors = [draw(seed, 4, scaling, torch.float32) for seed, scaling in ((1, 2.0), (2, 0.5), (3, 1.0))]
    theirs, _ = peft_combination("linear", factors, weights)
    ours = linear(factors, weights)
    assert theirs.scaling == ours.scaling
    same(ours.A, theirs.A, 1e-6)
    same(ours.B, theirs.B, 1e-6)


@pytest.mark.parametrize("weight", [2.5, -0.6, 0.0])
def test_linear_of_one_adapter_scales_it(weight: float) -> None:
    only = draw(3, 4, 1.5)
    same(linear([only], [weight]).delta, weight * only.delta)


def test_linear_needs_one_rank() -> None:
    with pytest.raises(UsageError, match="ranks 2, 3 cannot be added factor by factor") as caught:
        linear([draw(0, 2), draw(1, 3)], [1.0, 1.0])
    assert caught.value.place == "linear"
    assert caught.value.remedy is not None
    assert "reduce_rank" in caught.value.remedy


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("r", [1, 4, 7])
def test_svd_error_is_the_tail_of_the_singular_values(seed: int, r: int) -> None:
    delta = draw_deltas(seed, 1)[0]
    result, error = svd(delta, r)
    assert (result.A.shape, result.B.shape, result.scaling) == ((r, IN), (OUT, r), 1.0)
    squares = torch.linalg.svdvals(delta) ** 2
    assert error == pytest.approx(math.sqrt(squares[r:].sum() / squares.sum()), abs=1e-12)
    measured = torch.linalg.norm(delta - result.delta) / torch.linalg.norm(delta)
    assert error == pytest.approx(measured.item(), abs=1e-12)
    # Nothing else of rank r comes nearer: here, other subspaces of the same size.
    Q = torch.linalg.qr(torch.randn(OUT, r, dtype=torch.float64, generator=Generator().manual_seed(seed)))[0]
    assert torch.linalg.norm(delta - Q @ Q.T @ delta) >= torch.linalg.norm(delta - result.delta) - 1e-12


def test_svd_beyond_the_rank_of_the_matrix_is_exact_and_padded_with_zeros() -> None:
    delta = draw(0, 2).delta
    result, error = svd(delta, OUT + 2)
    assert (result.A.shape, result.B.shape) == ((OUT + 2, IN), (OUT, OUT + 2))
    assert error < 1e-14
    assert not result.A[OUT:].any()
    assert not result.B[:, OUT:].any()
    same(result.delta, delta)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_svd_error_of_any_magnitude(size: float) -> None:
    plain = draw_deltas(0, 1, torch.float32)[0]
    expected = svd(plain, 3)[1] if size else 0.0
    assert svd(size * plain, 3)[1] == pytest.approx(expected, abs=1e-5)


def test_svd_matches_peft() -> None:
    factors = [draw(1, 2, 2.0, torch.float32), draw(2, 4, 0.5, torch.float32)]
    _, delta = peft_combination("svd", factors, [0.3, 0.8], svd_rank=3)
    same(svd(cat(factors, [0.3, 0.8]).delta, 3)[0].delta, delta, 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("r", [1, 3, 5, 9])
@pytest.mark.parametrize("start", [5, 20])  # 20 is more than either side of the layer
def test_reduced_rank_is_the_svd_of_the_product(seed: int, r: int, start: int) -> None:
    factors = draw(seed, start, -0.75)
    result, error = reduce_rank(factors, r)
    best, best_error = svd(factors.delta, r)
    assert (result.A.shape, result.B.shape, result.scaling) == ((r, IN), (OUT, r), 1.0)
    same(result.delta, best.delta)
    assert error == pytest.approx(best_error, abs=1e-12)
    measured = torch.linalg.norm(factors.delta - result.delta) / torch.linalg.norm(factors.delta)
    assert error == pytest.approx(measured.item(), abs=1e-12)


def test_reduced_rank_keeps_the_dtype_and_forms_no_matrix_of_the_layer() -> None:
    generator = Generator().manual_seed(0)
    out, in_, r = 100_000, 200_000, 4  # a dense product would take 80 GB
    factors = Factors(torch.randn(r, in_, generator=generator), torch.randn(out, r, generator=generator))
    result, error = reduce_rank(factors, r)
    assert result.A.dtype == result.B.dtype == torch.float32
    assert error < 1e-14
    rows = slice(0, 50)
    torch.testing.assert_close(result.B[rows] @ result.A, factors.B[rows] @ factors.A, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [1, 3])
def test_an_adapter_without_ranks_reduces_to_zero(r: int) -> None:
    result, error = reduce_rank(Factors(torch.zeros(0, IN), torch.zeros(OUT, 0)), r)
    assert (result.A.shape, result.B.shape, error) == ((r, IN), (OUT, r), 0.0)
    assert not result.delta.any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS])
def test_ties_matches_peft(seed: int, density: float, weights: list[float]) -> None:
    deltas = draw_deltas(seed)
    expected = merge_utils.ties(deltas, torch.tensor(weights, dtype=torch.float64), density, "total")
    same(ties(deltas, weights, density), expected)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_ties_by_its_definition(density: float) -> None:
    deltas = draw_deltas(5, 4)
    keep = int(density * OUT * IN)
    trimmed = []
    for delta in deltas:
        least = sorted(delta.abs().flatten().tolist(), reverse=True)[keep - 1]
        trimmed.append(torch.where(delta.abs() >= least, delta, torch.zeros_like(delta)))
    result = ties(deltas, [1.0] * 4, density)
    for i in range(OUT):
        for j in range(IN):
            values = [delta[i, j].item() for delta in trimmed]
            elected = math.copysign(1, sum(values))
            agreeing = [value for value in values if value * elected > 0]
            mean = sum(agreeing) / len(agreeing) if agreeing else 0.0
            assert result[i, j].item() == pytest.approx(mean, abs=1e-12)


def test_ties_of_one_adapter_at_full_density_is_the_identity() -> None:
    delta = draw_deltas(1, 1)[0]
    assert torch.equal(ties([delta], [1.0], 1.0), delta)
    same(ties([delta], [-0.5], 1.0), -0.5 * delta)


def test_ties_leaves_out_what_cancels_exactly_where_peft_keeps_the_positive() -> None:
    deltas = [torch.tensor([[2.0, 3.0]]), torch.tensor([[-2.0, 1.0]])]
    assert ties(deltas, [1.0, 1.0], 1.0).tolist() == [[0.0, 2.0]]
    with pytest.warns(UserWarning, match="no pruning"):
        assert merge_utils.ties(deltas, torch.ones(2), 1.0).tolist() == [[2.0, 2.0]]


def test_ties_keeps_at_least_one_value() -> None:
    delta = torch.tensor([[0.5, -4.0, 1.0]])
    assert ties([delta], [1.0], 1e-6).tolist() == [[0.0, -4.0, 0.0]]


@pytest.mark.parametrize("elect_signs", [False, True])
def test_dare_matches_peft(elect_signs: bool) -> None:
    deltas = draw_deltas(2)
    theirs = merge_utils.dare_ties if elect_signs else merge_utils.dare_linear
    with torch.random.fork_rng():
        torch.manual_seed(42)
        expected = theirs(deltas, torch.tensor(WEIGHTS, dtype=torch.float64), 0.6)
    same(dare(deltas, WEIGHTS, 0.6, Generator().manual_seed(42), elect_signs=elect_signs), expected)


def test_dare_is_unbiased() -> None:
    deltas, density, draws = draw_deltas(3, 2), 0.25, 4000
    generator = Generator().manual_seed(0)
    mean = sum(dare(deltas, [1.0, -0.5], density, generator) for _ in range(draws)) / draws
    expected = deltas[0] - 0.5 * deltas[1]
    # Each draw has the variance (1 − d) / d · Σ (wΔ)²; five standard errors for 77 values.
    deviation = ((1 - density) / density * (deltas[0] ** 2 + (0.5 * deltas[1]) ** 2) / draws).sqrt()
    assert ((mean - expected).abs() < 5 * deviation).all()


def test_dare_drops_by_density_and_rescales_the_rest() -> None:
    delta = torch.ones(200, 200)
    result = dare([delta], [1.0], 0.2, Generator().manual_seed(1))
    assert result.unique().tolist() == [0.0, 5.0]
    assert (result > 0).double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(dare([delta], [1.0], 1.0, Generator()), delta)


GOOD = draw(0, 2)
DELTA = GOOD.delta
REFUSED: dict[str, tuple[Callable[[], object], str, str]] = {
    "no adapters": (lambda: cat([], []), "adapters", "nothing to combine"),
    "no deltas": (lambda: ties([], [], 0.5), "adapters", "nothing to combine"),
    "weights of another length": (lambda: cat([GOOD, GOOD], [1.0]), "weights", "2 adapters but 1 weights"),
    "weights of ties": (lambda: ties([DELTA], [1.0, 2.0], 0.5), "weights", "1 adapters but 2 weights"),
    "weight is NaN": (lambda: linear([GOOD], [math.nan]), "weights[0]", "the weight is nan"),
    "density 0": (lambda: ties([DELTA], [1.0], 0.0), "density", "at most 1, not 0.0"),
    "density above 1": (lambda: dare([DELTA], [1.0], 1.5, Generator()), "density", "not 1.5"),
    "density NaN": (lambda: ties([DELTA], [1.0], math.nan), "density", "not nan"),
    "rank 0": (lambda: svd(DELTA, 0), "r", "at least 1, not 0"),
    "rank of half": (lambda: reduce_rank(GOOD, 0.5), "r", "not 0.5"),  # type: ignore[arg-type]
    "rank true": (lambda: svd(DELTA, True), "r", "not True"),
    "another layer": (
        lambda: cat([GOOD, Factors(torch.ones(2, 3), torch.ones(OUT, 2))], [1.0, 1.0]),
        "adapters[1]",
        "[7, 3] differs from [7, 11]",
    ),
    "another dtype": (
        lambda: cat([GOOD, draw(0, 2, dtype=torch.float32)], [1.0, 1.0]),
        "adapters[1]",
        "float32",
    ),
    "other shapes": (lambda: ties([DELTA, DELTA.T], [1.0, 1.0], 0.5), "adapters[1]", "[11, 7] differs"),
    "A and B apart": (
        lambda: reduce_rank(Factors(torch.ones(2, 3), torch.ones(5, 4)), 1),
        "factors",
        "A [2, 3] torch.float32 and B [5, 4] torch.float32",
    ),
    "infinite A": (
        lambda: cat([GOOD, Factors(torch.full((2, IN), math.inf), torch.ones(OUT, 2))], [1.0, 1.0]),
        "factors[1].A",
        "NaN or infinity",
    ),
    "NaN delta": (lambda: svd(torch.full((2, 2), math.nan), 1), "delta", "NaN or infinity"),
    "NaN of ties": (lambda: ties([DELTA, DELTA * math.nan], [1.0, 1.0], 0.5), "deltas[1]", "NaN or infinity"),
    "infinite scaling": (
        lambda: cat([Factors(GOOD.A, GOOD.B, math.inf)], [1.0]),
        "factors[0].scaling",
        "the scaling is inf",
    ),
    "half precision": (lambda: svd(DELTA.bfloat16(), 1), "delta", "the dtype is torch.bfloat16"),
    "not a matrix": (lambda: svd(torch.ones(2, 3, 4), 1), "delta", "[2, 3, 4], not that of a matrix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    action, place, message = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        action()
    assert caught.value.place == place
    assert message in caught.value.message
    assert caught.value.remedy


def test_results_carry_no_gradient_and_inputs_stay_as_they_were() -> None:
    A, B = nn.Parameter(torch.randn(2, IN)), nn.Parameter(torch.randn(OUT, 2))
    before = A.detach().clone(), B.detach().clone()
    factors = Factors(A, B)
    for result in (cat([factors], [2.0]), linear([factors], [2.0]), reduce_rank(factors, 1)[0]):
        assert not result.A.requires_grad
        assert not result.B.requires_grad
    assert not ties([factors.delta], [1.0], 0.5).requires_grad
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])
