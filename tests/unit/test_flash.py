"""The way of packed attention on a GPU, as far as a CPU can tell: what the kernel is called with, and when."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
from torch import Tensor

from lorakit.ops import flash
from lorakit.ops.attention import Scores, packed_attention, packed_attention_reference


def documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What PyTorch says that `varlen_attn` computes: (left, right) are keys around a query, -1 is all."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa == (query.shape[1] != key.shape[1])
    results = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        assert stop - start <= max_q == max_k
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        left, right = (stop if side < 0 else side for side in window_size)
        hidden = (distance > left) | (distance < -right)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("window", [0, 1, 7])
def test_it_is_called_for_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, window: int
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    monkeypatch.setattr(flash, "fits", lambda q_THD, cap: not cap)
    lengths, how = (5, 1, 23, 12), Scores(0.3, window)
    q, k, v = (
        torch.randn(n, sum(lengths), 16, dtype=torch.float64, requires_grad=True)
        for n in (heads, groups, groups)
    )
    found, expected = packed_attention(q, k, v, lengths, how), packed_attention_reference(q, k, v, lengths, how)
    g = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g)
    )


def test_pytorch_has_the_function_that_is_called() -> None:
    q, k = (torch.empty(41, n, 64, dtype=torch.bfloat16, device="meta") for n in (6, 2))
    out = flash.attend(q, k, k, torch.tensor([0, 5, 41]), 36, 0.125, 7)
    assert out.shape == q.shape and out.device.type == "meta"


class Somewhere:
    """A tensor on a GPU, as far as `flash.fits` looks."""

    is_cuda, device, dtype = True, "cuda:0", torch.bfloat16

    def __init__(self, *shape: int, **different: Any) -> None:
        self.shape = shape
        vars(self).update(different)


@pytest.mark.parametrize(
    ("tensor", "cap", "capability", "expected"),
    [
        (Somewhere(9, 4, 64), 0.0, (8, 0), True),
        (Somewhere(9, 4, 64, dtype=torch.float16), 0.0, (9, 0), True),
        (Somewhere(9, 4, 64), 0.0, (7, 5), False),
        (Somewhere(9, 4, 64), 50.0, (8, 0), False),
        (Somewhere(9, 4, 64, dtype=torch.float32), 0.0, (8, 0), False),
        (Somewhere(9, 4, 512), 0.0, (8, 0), False),
        (Somewhere(9, 4, 20), 0.0, (8, 0), False),
        (torch.empty(9, 4, 64, dtype=torch.bfloat16), 0.0, (8, 0), False),
    ],
)
def test_where_it_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tensor: Any, cap: float, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert flash.fits(tensor, cap) is expected
