"""Causal attention over packed segments: rows laid end to end, none of which sees another.

A flat batch of T tokens holds S segments of lengths L_1 … L_S. `packed_attention_reference` is the
definition: ordinary causal attention, one segment after the other. On CPUs with AVX-512 `packed_attention` is
one C++ pass over the flat batch (attention.cpp); its scores never leave the cache. On GPUs that have it,
FlashAttention does the same (`lorakit.ops.flash`). Elsewhere it gathers segments of similar length into dense
batches and runs a few large matrix products instead of many small ones.

A window w lets a query see itself and the w - 1 keys before it; a cap c makes each score c · tanh(score / c)
(arXiv 2408.00118, §2). 0 is none of either.

Shapes: q [H, T, D], k and v [G, T, D] with G key/value heads (H = G · groups), result [H, T, D].
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import buffers, flash, native

_MAX_PADDING = 1.3  # a bucket's longest segment over its shortest
_TILE = 256  # query rows of one product
_MAX_SCORES = 64 * 1024 * 1024  # score elements of one bucket: H · S · L², 128 MB in bf16


class Scores(NamedTuple):
    """How a score comes from q and k."""

    scaling: float
    window: int = 0
    cap: float = 0.0


def packed_attention_reference(
    q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: Sequence[int], how: Scores
) -> Tensor:
    """softmax(scores of q and k + causal mask) v within each segment."""
    results = []
    sizes = list(lengths)
    shared = len(q_HTD) // len(k_GTD)
    for q, k, v in zip(q_HTD.split(sizes, 1), k_GTD.split(sizes, 1), v_GTD.split(sizes, 1), strict=True):
        k, v = (x.repeat_interleave(shared, 0) for x in (k, v))
        scores = _capped(q @ k.transpose(1, 2) * how.scaling, how.cap)
        results.append((scores + _mask(0, q.shape[1], how.window, q)).softmax(-1) @ v)
    return torch.cat(results, dim=1)


def _capped(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap) if cap else scores


def _mask(start: int, stop: int, window: int, like: Tensor) -> Tensor:
    """[stop - start, stop]: −∞ for the keys that the queries from ``start`` on do not see, else 0."""
    unseen = torch.ones(stop - start, stop, dtype=torch.bool, device=like.device).triu(start + 1)
    if window:
        unseen |= ~torch.ones_like(unseen).triu(start + 1 - window)
    return like.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))


def buckets(lengths: Sequence[int], heads: int) -> list[list[int]]:
    """Group segment numbers so that padding to the longest of a group wastes little and memory is bounded."""
    groups: list[list[int]] = []
    for segment in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
        if groups:
            longest = lengths[groups[-1][0]]
            scores = heads * longest * longest * (len(groups[-1]) + 1)
            if longest <= max(_MAX_PADDING * lengths[segment], 16) and scores <= _MAX_SCORES:
                groups[-1].append(segment)
                continue
        groups.append([segment])
    return groups


class _Bucket(NamedTuple):
    """Segments of similar length: the place of each token in the flat batch, and how many are real."""

    index_SL: Tensor
    lengths_S: Tensor


@functools.lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...], heads: int, device: torch.device) -> tuple[tuple[_Bucket, ...], Tensor]:
    """Where the tokens of each bucket are, and where each token's result stands after all buckets.

    One layout serves every layer of a model, so it is kept. ``index_SL`` of a bucket points at each segment's
    tokens; past a segment's end at its last one, which no real query sees because the mask is causal, and whose
    result is not read.
    """
    starts = [0, *itertools.accumulate(lengths)]
    found: list[_Bucket] = []
    place_T = torch.empty(starts[-1], dtype=torch.long)
    done = 0
    for group in buckets(lengths, heads):
        step_L = torch.arange(lengths[group[0]])
        first_S = torch.tensor([starts[s] for s in group])
        size_S = torch.tensor([lengths[s] for s in group])
        index_SL = first_S[:, None] + torch.minimum(step_L[None], size_S[:, None] - 1)
        real_SL = step_L[None] < size_S[:, None]
        place_T[index_SL[real_SL]] = done + real_SL.flatten().nonzero().flatten()
        done += index_SL.numel()
        found.append(_Bucket(index_SL.to(device), size_S))
    return tuple(found), place_T.to(device)


def packed_attention(
    q_HTD: Tensor,
    k_GTD: Tensor,
    v_GTD: Tensor,
    lengths: Sequence[int],
    how: Scores,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`packed_attention_reference`, faster.

    ``angles`` are the cosines and sines [T, D] by which q and k are turned first (`rotate`).
    """
    heads, total, _ = q_HTD.shape
    if sum(lengths) != total:
        raise ValueError(f"segment lengths add up to {sum(lengths)}, but there are {total} tokens")
    operands = [x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD)]
    if native.fits(*operands, *(angles or ())) and native.multiplies(q_HTD.dtype):
        out_THD: Tensor = _PackedAttention.apply(*operands, *(angles or (None, None)), tuple(lengths), how)
        return out_THD.transpose(0, 1)
    if angles is not None:
        q_HTD, k_GTD = rotate(q_HTD, *angles), rotate(k_GTD, *angles)
    if flash.fits(operands[0], how.cap):
        q_THD, k_TGD, v_TGD = (x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD))
        begin, longest = starts(tuple(lengths)), max(lengths)
        out_THD = flash.attend(q_THD, k_TGD, v_TGD, begin, longest, how.scaling, how.window)
        return out_THD.transpose(0, 1)
    found, place_T = _layout(tuple(lengths), heads, q_HTD.device)
    parts = [_dense_causal(q_HTD, k_GTD, v_GTD, each.index_SL, how).flatten(1, 2) for each in found]
    return torch.cat(parts, dim=1).index_select(1, place_T)


def rotate(x_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves: (a, b) → (a cos − b sin, b cos + a sin)."""
    a, b = x_HTD.chunk(2, -1)
    return x_HTD * cos_TD + torch.cat([-b, a], -1) * sin_TD


class _PackedAttention(torch.autograd.Function):
    """The C++ pass. Beside its operands it keeps the result and one number a row of scores.

    The result is kept anyhow by the projection that reads it: memory grows with the tokens, not their square.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        lengths: tuple[int, ...],
        how: Scores,
    ) -> Tensor:
        out_THD = buffers.empty_like(q_THD)
        lse_TH = buffers.empty(tuple(q_THD.shape[:2]), torch.float32)
        operands, described = (q_THD, k_TGD, v_TGD, cos, sin), _described(q_THD, k_TGD, lengths, how)
        native.run("attention_forward", q_THD.dtype, *operands, out_THD, lse_TH, *described)
        ctx.save_for_backward(*operands, out_THD, lse_TH)
        ctx.lengths, ctx.how = lengths, how
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *operands, out_THD, lse_TH = ctx.saved_tensors
        q_THD, k_TGD, v_TGD = operands[:3]
        results = [buffers.empty_like(x) for x in (q_THD, k_TGD, v_TGD)]
        given = (grads[0].contiguous(), out_THD, lse_TH, *operands, *results)
        described = _described(q_THD, k_TGD, ctx.lengths, ctx.how)
        native.run("attention_backward", q_THD.dtype, *given, *described)
        return *results, None, None, None, None


def _described(q_THD: Tensor, k_TGD: Tensor, lengths: tuple[int, ...], how: Scores) -> tuple[Any, ...]:
    """The segments and sizes, as the C++ passes take them."""
    _, heads, size = q_THD.shape
    causal = 1
    sizes = (len(lengths), heads, k_TGD.shape[1], size, causal, how.window)
    return starts(lengths), *sizes, float(how.scaling), float(how.cap)


@functools.lru_cache(maxsize=16)
def starts(lengths: tuple[int, ...]) -> Tensor:
    """Where the segments start, and the end of the last."""
    return torch.tensor([0, *itertools.accumulate(lengths)])


def _dense_causal(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, index_SL: Tensor, how: Scores) -> Tensor:
    """Causal attention of one bucket: [H, S, L, D]. Key heads are shared by views, never copied.

    Query heads that share a key head become more query rows of that head: one product for all of them. Long
    segments go in tiles of queries, which need no keys beyond their own end.
    """
    heads, groups = q_HTD.shape[0], k_GTD.shape[0]
    shared = heads // groups
    segments, longest = index_SL.shape
    flat = index_SL.reshape(-1)
    q = q_HTD.index_select(1, flat).view(groups, shared, segments, longest, -1).transpose(1, 2)
    k, v = (x.index_select(1, flat).view(groups * segments, longest, -1) for x in (k_GTD, v_GTD))
    tiles = []
    for start in range(0, longest, _TILE):
        stop = min(start + _TILE, longest)
        rows = q[:, :, :, start:stop].reshape(groups * segments, shared * (stop - start), -1)
        unseen = _mask(start, stop, how.window, q).repeat(shared, 1).expand(groups * segments, -1, -1)
        keys = k[:, :stop].transpose(1, 2)
        if how.cap:
            scores = _capped(torch.bmm(rows, keys) * how.scaling, how.cap) + unseen
        else:  # the product itself adds the mask
            scores = torch.baddbmm(unseen, rows, keys, alpha=how.scaling)
        out = scores.softmax(-1) @ v[:, :stop]
        tiles.append(out.view(groups, segments, shared, stop - start, -1))
    result = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=3)
    return result.transpose(1, 2).reshape(heads, segments, longest, -1)
