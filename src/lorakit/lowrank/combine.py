"""Weighted combinations of adapters on one layer: mathematics on factors and updates, no model in sight.

    layout: A [r, in], B [out, r], ΔW = s · B A [out, in]

| function      | result                                   | rank       | exact                           |
|---------------|------------------------------------------|------------|---------------------------------|
| `cat`         | Σ wᵢ ΔWᵢ                                 | Σ rᵢ       | yes                             |
| `linear`      | (Σ √cᵢ Bᵢ)(Σ √cᵢ Aᵢ), cᵢ = wᵢ sᵢ         | r          | no: products between adapters   |
| `svd`         | nearest matrix of rank r                 | as asked   | no: the error is returned       |
| `reduce_rank` | the same, of a product B A               | as asked   | no: the error is returned       |
| `ties`        | ΔW without redundant, conflicting values | any: dense | its own definition              |
| `dare`        | ΔW with values dropped at random         | any: dense | in the mean                     |

The dense results become an adapter again through `svd`. Nothing here is differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lorakit.errors import UsageError


@dataclass(frozen=True)
class Factors:
    """One adapter on one layer: A [r, in] and B [out, r], float32 or float64, and the factor s of B A."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def delta(self) -> Tensor:
        """ΔW = s · B A [out, in]."""
        return self.scaling * (self.B @ self.A)


@torch.no_grad()
def cat(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ wᵢ sᵢ Bᵢ Aᵢ exactly, as one adapter of rank Σ rᵢ: A = [w₁s₁A₁; w₂s₂A₂; …], B = [B₁ B₂ …].

    The product of two block matrices is the sum of the products of their blocks. PEFT's ``cat`` puts the
    weights on A as well.
    """
    coefficients = _coefficients(factors, weights)
    A = torch.cat([c * each.A for c, each in zip(coefficients, factors, strict=True)], dim=0)
    return Factors(A, torch.cat([each.B for each in factors], dim=1))


@torch.no_grad()
def linear(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """A = Σ ±√|wᵢsᵢ| Aᵢ and B = Σ √|wᵢsᵢ| Bᵢ, with the sign of wᵢsᵢ on A, as PEFT's ``linear`` does.

    For one adapter this is w ΔW. For several, B A also holds the products Bᵢ Aⱼ of different adapters, which
    mean nothing: a cheap approximation that keeps the rank. `cat` is the exact sum.
    """
    coefficients = _coefficients(factors, weights)
    ranks = [each.A.shape[0] for each in factors]
    message = f"adapters of the ranks {', '.join(map(str, ranks))} cannot be added factor by factor"
    _require(len(set(ranks)) == 1, "linear", message, "combine by cat or svd, or use reduce_rank first")
    roots = [math.sqrt(abs(c)) for c in coefficients]
    terms = list(zip(coefficients, roots, factors, strict=True))
    A = torch.stack([math.copysign(root, c) * each.A for c, root, each in terms]).sum(dim=0)
    return Factors(A, torch.stack([root * each.B for _, root, each in terms]).sum(dim=0))


@torch.no_grad()
def svd(delta: Tensor, r: int) -> tuple[Factors, float]:
    """The matrix of rank r nearest to Δ [out, in], and its relative error ‖Δ − B A‖_F / ‖Δ‖_F.

    Δ = U Σ Vᵀ, B = U_r Σ_r, A = V_rᵀ (Eckart and Young 1936): the error is √(Σ_{i>r} σᵢ² / Σ σᵢ²). Where r is
    more than the smaller side of Δ, the rows of A and columns of B beyond it are zero.
    """
    _check_matrix(delta, "delta")
    valid = isinstance(r, int) and not isinstance(r, bool) and r >= 1
    _require(valid, "r", f"the rank must be a whole number of at least 1, not {r!r}", "choose r = 8")
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    k = min(r, len(S))
    A, B = delta.new_zeros(r, delta.shape[1]), delta.new_zeros(delta.shape[0], r)
    A[:k], B[:, :k] = Vh[:k], U[:, :k] * S[:k]
    norm = _frobenius(delta)
    return Factors(A, B), _frobenius(delta - B @ A) / norm if norm else 0.0


@torch.no_grad()
def reduce_rank(factors: Factors, r: int) -> tuple[Factors, float]:
    """The best rank-r approximation of s · B A and its relative error, without forming [out, in].

    B = Q_b R_b and Aᵀ = Q_a R_a, so s B A = Q_b (s R_b R_aᵀ) Q_aᵀ. The Q have orthonormal columns, which change
    neither singular values nor norms: the `svd` of the small matrix in the middle is the one of the product.
    Computed in float64, returned in the dtype of the factors.
    """
    _check_factors(factors, "factors")
    Q_b, R_b = torch.linalg.qr(factors.B.double())
    Q_a, R_a = torch.linalg.qr(factors.A.double().T)
    core, error = svd(factors.scaling * (R_b @ R_a.T), r)
    dtype = factors.A.dtype
    return Factors((core.A @ Q_a.T).to(dtype), (Q_b @ core.B).to(dtype)), error


@torch.no_grad()
def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """TIES-Merging (arXiv 2306.01708, algorithm 1) of updates ΔWₜ.

    Trim: τₜ is ΔWₜ with all but its ⌊density · n⌋ largest magnitudes (at least one) set to zero.
    Elect: e = sgn(Σₜ τₜ), the sign with the larger total mass, for each element.
    Merge: mean of wₜ τₜ over the adapters whose value has the sign e.

    The paper scales the result by one λ, which is wₜ = λ for all; a weight per adapter acts in the mean alone,
    not in the election, as PEFT's ``ties`` has it. PEFT differs in one thing: where the τₜ cancel exactly it
    elects +, so the positive values are kept; here e = sgn(0) = 0 as in the paper, and the result is 0.
    """
    scale = _scale(deltas, weights, density)
    return _merge_elected(torch.stack([_trim(delta, density) for delta in deltas]), scale)


@torch.no_grad()
def dare(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    generator: Generator,
    *,
    elect_signs: bool = False,
) -> Tensor:
    """DARE (arXiv 2311.03099): Σ wₜ (mₜ ⊙ ΔWₜ) / density with mₜ ~ Bernoulli(density).

    Each value is dropped with probability p = 1 − density and the rest is rescaled by 1 / (1 − p), so that the
    mean over the draws is Σ wₜ ΔWₜ. With ``elect_signs`` the trimmed updates go through the election and the
    mean of `ties` instead of the sum.
    """
    scale = _scale(deltas, weights, density)
    masks = [torch.bernoulli(torch.full_like(delta, density), generator=generator) for delta in deltas]
    dropped = torch.stack([delta * mask / density for delta, mask in zip(deltas, masks, strict=True)])
    return _merge_elected(dropped, scale) if elect_signs else (scale * dropped).sum(dim=0)


def _trim(delta: Tensor, density: float) -> Tensor:
    """``delta`` with all but its largest magnitudes set to zero."""
    largest = delta.abs().flatten().topk(max(1, int(density * delta.numel()))).indices
    trimmed = torch.zeros_like(delta).flatten()
    trimmed[largest] = delta.flatten()[largest]
    return trimmed.view_as(delta)


def _merge_elected(updates: Tensor, scale: Tensor) -> Tensor:
    """The disjoint mean of `ties` over the first axis, from updates that are trimmed already."""
    agrees = updates.sign() == updates.sum(dim=0).sign()
    return (scale * updates * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _frobenius(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))  # float32 squares under- and overflow


def _coefficients(factors: Sequence[Factors], weights: Sequence[float]) -> list[float]:
    """wᵢ sᵢ, after checking that the adapters sit on the same layer."""
    _check_weights(len(factors), weights)
    for i, each in enumerate(factors):
        _check_factors(each, f"factors[{i}]")
    _check_same("layer [out, in]", [[each.B.shape[0], each.A.shape[1]] for each in factors])
    _check_same("dtype", [each.A.dtype for each in factors])
    return [weight * each.scaling for weight, each in zip(weights, factors, strict=True)]


def _scale(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """The weights, shaped to multiply the stacked updates, after checking everything."""
    _check_weights(len(deltas), weights)
    for i, delta in enumerate(deltas):
        _check_tensor(delta, f"deltas[{i}]")
    _check_same("shape", [list(delta.shape) for delta in deltas])
    _check_same("dtype", [delta.dtype for delta in deltas])
    message = f"the share of values to keep must be above 0 and at most 1, not {density}"
    _require(0 < density <= 1, "density", message, "0.2 keeps every fifth value")
    return deltas[0].new_tensor(list(weights)).view(-1, *[1] * deltas[0].dim())


def _check_weights(count: int, weights: Sequence[float]) -> None:
    _require(count > 0, "adapters", "there is nothing to combine", "name one adapter or more")
    message = f"{count} adapters but {len(weights)} weights"
    _require(len(weights) == count, "weights", message, "give one weight per adapter")
    for i, weight in enumerate(weights):
        _require(math.isfinite(weight), f"weights[{i}]", f"the weight is {weight}", "give a finite number")


def _check_factors(factors: Factors, place: str) -> None:
    A, B, scaling = factors.A, factors.B, factors.scaling
    _check_matrix(A, f"{place}.A")
    _check_matrix(B, f"{place}.B")
    message = f"A {list(A.shape)} {A.dtype} and B {list(B.shape)} {B.dtype} do not belong together"
    fit = A.shape[0] == B.shape[1] and A.dtype == B.dtype
    _require(fit, place, message, "A is [r, in] and B is [out, r], of one dtype")
    _require(math.isfinite(scaling), f"{place}.scaling", f"the scaling is {scaling}", "give a finite number")


def _check_matrix(tensor: Tensor, place: str) -> None:
    _check_tensor(tensor, place)
    message = f"the shape is {list(tensor.shape)}, not that of a matrix"
    _require(tensor.dim() == 2, place, message, "flatten what lies behind the first axis")


def _check_tensor(tensor: Tensor, place: str) -> None:
    float_ = tensor.dtype in (torch.float32, torch.float64)
    _require(float_, place, f"the dtype is {tensor.dtype}", "convert it to float32 or float64")
    finite = bool(torch.isfinite(tensor).all())
    _require(finite, place, "it holds NaN or infinity", "leave this adapter out or train it again")


def _check_same(what: str, values: Sequence[object]) -> None:
    for i, value in enumerate(values):
        message = f"{what} {value} differs from {values[0]} of the first adapter"
        remedy = "combine adapters of the same layer, in one dtype"
        _require(value == values[0], f"adapters[{i}]", message, remedy)


def _require(condition: bool, place: str, message: str, remedy: str) -> None:
    if not condition:
        raise UsageError(message, place=place, remedy=remedy)
