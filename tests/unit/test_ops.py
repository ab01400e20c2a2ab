"""Every fast operation against the plain one that defines it: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorakit.ops import attention
from lorakit.ops.attention import Scores, buckets, packed_attention, packed_attention_reference
from lorakit.ops.linear import lora_linear, lora_linear_reference
from lorakit.ops.loss import IGNORE, cross_entropy_sum

# dtype -> largest difference that two orders of summation may make on values of size 1
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}
# shape of x without its last axis
LEADING = [(7,), (2, 5), (1, 3, 4), (), (0,)]


def linear_inputs(
    leading: tuple[int, ...], *, seed: int, dtype: torch.dtype = torch.float64, bias: bool = True
) -> dict[str, Tensor | None]:
    """Random operands: 12 features in, 9 out, rank 3; x, A and B want gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(*leading, 12).requires_grad_(),
        "W": normal(9, 12),
        "bias": normal(9) if bias else None,
        "A": normal(3, 12).requires_grad_(),
        "B": normal(9, 3).requires_grad_(),
    }


def outputs_and_gradients(
    function: Callable[..., Tensor], operands: dict[str, Tensor | None], **more: object
) -> dict[str, Tensor]:
    """The result and the gradient of every operand that wants one, under a fixed random upstream gradient."""
    y = function(**operands, **more)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    wanted = {name: t for name, t in operands.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(y, list(wanted.values()), upstream.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert value.shape == expected[name].shape, name
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_lora_linear_is_its_reference(dtype: torch.dtype, leading: tuple[int, ...], bias: bool) -> None:
    operands = linear_inputs(leading, seed=1, dtype=dtype, bias=bias)
    found = outputs_and_gradients(lora_linear, operands, scaling=1.7)
    expected = outputs_and_gradients(lora_linear_reference, operands, scaling=1.7)
    assert set(found) == {"y", "x", "A", "B"}
    assert_same(found, expected, ROUNDING[dtype])


def test_lora_linear_by_hand() -> None:
    """One formula written out without any function of the package."""
    operands = linear_inputs((4,), seed=2)
    x, W, bias, A, B = operands.values()
    update = B @ A
    expected = x @ (W + 0.25 * update).T + bias
    torch.testing.assert_close(lora_linear(**operands, scaling=0.25), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_lora_linear_in_bf16_is_as_good_as_its_reference(seed: int) -> None:
    """The error against float64 on the same numbers is at most twice the reference's (or one rounding)."""
    generator = torch.Generator().manual_seed(seed)
    exact: dict[str, Tensor | None] = {
        "x": torch.randn(64, 96, generator=generator),
        "W": torch.randn(48, 96, generator=generator) / 10,
        "bias": torch.randn(48, generator=generator),
        "A": torch.randn(8, 96, generator=generator) / 10,
        "B": torch.randn(48, 8, generator=generator) / 10,
    }
    low = {name: t.bfloat16() for name, t in exact.items() if t is not None}
    exact = {name: t.double() for name, t in low.items()}
    adapters_float32 = {"A": low["A"].float(), "B": low["B"].float()}
    low |= adapters_float32
    for operands in (low, exact):
        for name in ("x", "A", "B"):
            operands[name].requires_grad_()
    truth = outputs_and_gradients(lora_linear_reference, exact, scaling=2.0)
    fast = outputs_and_gradients(lora_linear, low, scaling=2.0)
    plain = outputs_and_gradients(lora_linear_reference, low, scaling=2.0)
    assert {name: t.dtype for name, t in fast.items()} == {
        "y": torch.bfloat16, "x": torch.bfloat16, "A": torch.float32, "B": torch.float32,
    }  # fmt: skip
    for name, value in truth.items():
        error = (fast[name].double() - value).norm() / value.norm()
        error_of_reference = (plain[name].double() - value).norm() / value.norm()
        assert error <= 2 * error_of_reference, name
        assert error < 0.01, name


def test_lora_linear_gradcheck() -> None:
    operands = linear_inputs((2, 3), seed=3)
    wanted = (operands["x"], operands["A"], operands["B"])
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_linear(x, operands["W"], operands["bias"], A, B, 0.7), wanted
    )


@pytest.mark.parametrize("still", ["x", "A", "B"])
def test_lora_linear_computes_only_wanted_gradients(still: str) -> None:
    operands = linear_inputs((5,), seed=4)
    operands[still].requires_grad_(False)
    found = outputs_and_gradients(lora_linear, operands, scaling=1.0)
    expected = outputs_and_gradients(lora_linear_reference, operands, scaling=1.0)
    assert still not in found
    assert_same(found, expected, 1e-12)


def test_lora_linear_refuses_second_derivatives() -> None:
    operands = linear_inputs((5,), seed=5)
    y = lora_linear(**operands, scaling=1.0).square().sum()
    (slope,) = torch.autograd.grad(y, operands["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def is_fused(y: Tensor) -> bool:
    return "LoRALinear" in y.grad_fn.name()


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
def test_lora_linear_is_one_node_where_it_can_be(leading: tuple[int, ...]) -> None:
    assert is_fused(lora_linear(**linear_inputs(leading, seed=6), scaling=1.0))
    assert not is_fused(lora_linear_reference(**linear_inputs(leading, seed=6), scaling=1.0))


@pytest.mark.parametrize("trained", ["W", "bias"])
def test_lora_linear_with_a_trained_base_has_all_gradients(trained: str) -> None:
    operands = linear_inputs((5,), seed=7)
    operands[trained].requires_grad_()
    found = outputs_and_gradients(lora_linear, operands, scaling=0.5)
    expected = outputs_and_gradients(lora_linear_reference, operands, scaling=0.5)
    assert trained in found
    assert_same(found, expected, 0.0)


def test_lora_linear_follows_autocast() -> None:
    operands = linear_inputs((5,), seed=8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**operands, scaling=0.5)
        expected = lora_linear_reference(**operands, scaling=0.5)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_lora_linear_leaves_mixed_dtypes_to_torch() -> None:
    operands = linear_inputs((5,), seed=9, dtype=torch.float32)
    operands["x"] = operands["x"].detach().double()
    with pytest.raises(RuntimeError, match="same dtype"):
        lora_linear(**operands, scaling=0.5)


# ---------------------------------------------------------------------------------------------- attention


def attention_inputs(
    lengths: Sequence[int], *, heads: int, groups: int, size: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(number, sum(lengths), size, generator=generator, dtype=torch.float64).requires_grad_()
        for name, number in {"q_HTD": heads, "k_GTD": groups, "v_GTD": groups}.items()
    }


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    groups=st.sampled_from([1, 2, 3]),
    shared=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_packed_attention_is_its_reference(lengths: list[int], groups: int, shared: int, seed: int) -> None:
    operands = attention_inputs(lengths, heads=groups * shared, groups=groups, seed=seed)
    found = outputs_and_gradients(packed_attention, operands, lengths=lengths, how=Scores(0.37))
    expected = outputs_and_gradients(packed_attention_reference, operands, lengths=lengths, how=Scores(0.37))
    assert set(found) == {"y", "q_HTD", "k_GTD", "v_GTD"}
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("tile", [1, 5, 16])
@pytest.mark.parametrize(
    "how", [Scores(0.4), Scores(0.4, window=6), Scores(0.4, cap=1.5), Scores(0.4, 11, 2.0)]
)
def test_tiles_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, tile: int, how: Scores) -> None:
    monkeypatch.setattr(attention, "_TILE", tile)
    lengths = [16, 17, 3, 16, 40]
    operands = attention_inputs(lengths, heads=6, groups=2, seed=21)
    found = outputs_and_gradients(packed_attention, operands, lengths=lengths, how=how)
    expected = outputs_and_gradients(packed_attention_reference, operands, lengths=lengths, how=how)
    assert_same(found, expected, 1e-12)


def test_packed_attention_by_hand() -> None:
    """Softmax over the tokens so far, token by token."""
    lengths = (3, 1, 5)
    operands = attention_inputs(lengths, heads=4, groups=2, seed=3)
    q, k, v = (t.detach() for t in operands.values())
    expected = torch.empty_like(q)
    start = 0
    for length in lengths:
        for head in range(4):
            for t in range(start, start + length):
                keys, values = k[head // 2, start : t + 1], v[head // 2, start : t + 1]
                weights = torch.exp(0.5 * keys @ q[head, t])
                expected[head, t] = weights @ values / weights.sum()
        start += length
    found = packed_attention(q, k, v, lengths, Scores(0.5))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changed", range(5))
def test_segments_do_not_see_each_other(changed: int) -> None:
    """Other tokens in one segment leave the output of all others equal bit for bit."""
    lengths = [6, 9, 1, 30, 8]
    q, k, v = (t.detach() for t in attention_inputs(lengths, heads=4, groups=2, seed=11).values())
    before = packed_attention(q, k, v, lengths, Scores(0.5)).split(lengths, 1)
    start = sum(lengths[:changed])
    for tensor in (q, k, v):
        tensor[:, start : start + lengths[changed]] += 100
    after = packed_attention(q, k, v, lengths, Scores(0.5)).split(lengths, 1)
    for segment, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new) == (segment != changed), segment


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    q, k, v = (t.detach() for t in attention_inputs([12], heads=2, groups=2, seed=12).values())
    before = packed_attention(q, k, v, [12], Scores(0.5))
    for tensor in (q, k, v):
        tensor[:, 7] += 100
    after = packed_attention(q, k, v, [12], Scores(0.5))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("lengths", [[3, 4], [5, 5, 5], []])
def test_lengths_must_add_up(lengths: list[int]) -> None:
    q, k, v = attention_inputs([11], heads=2, groups=1).values()
    with pytest.raises(ValueError, match=f"add up to {sum(lengths)}, but there are 11 tokens"):
        packed_attention(q, k, v, lengths, Scores(1.0))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=40), heads=st.integers(1, 32))
def test_buckets_waste_little_and_bound_memory(lengths: list[int], heads: int) -> None:
    groups = buckets(lengths, heads)
    assert sorted(segment for group in groups for segment in group) == list(range(len(lengths)))
    for group in groups:
        longest, shortest = lengths[group[0]], min(lengths[s] for s in group)
        assert longest == max(lengths[s] for s in group)
        assert longest <= max(1.3 * shortest, 16)
        assert len(group) == 1 or heads * longest**2 * len(group) <= attention._MAX_SCORES


def test_equal_lengths_share_one_bucket_up_to_the_bound() -> None:
    assert buckets([7] * 10, heads=4) == [list(range(10))]
    assert [len(group) for group in buckets([1024] * 10, heads=16)] == [4, 4, 2]


# --------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy_sum(dtype: torch.dtype) -> None:
    """A sum over labelled tokens, in float32 at least, equal to logsumexp minus the label's logit."""
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(20, 50, generator=generator)).to(dtype)
    labels = torch.randint(0, 50, (20,), generator=generator)
    labels[[0, 5, 19]] = IGNORE
    labelled = [n for n in range(20) if n not in {0, 5, 19}]
    exact = logits.double()
    expected = sum((exact[n].exp().sum().log() - exact[n, labels[n]]).item() for n in labelled)
    loss = cross_entropy_sum(logits, labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_cross_entropy_of_nothing_is_zero() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((3,), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
