"""Causal attention over packed segments: rows laid end to end, none of which sees another.

A flat batch of T tokens holds S segments of lengths L_1 … L_S. `packed_attention_reference` is the
definition: ordinary causal attention, one segment after the other. `packed_attention` gathers segments of
similar length into dense batches and runs a few large matrix products instead of many small ones; on CPUs
its backward pass is also faster than that of PyTorch's fused attention.

Shapes: q [H, T, D], k and v [G, T, D] with G key/value heads (H = G · groups), result [H, T, D].
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.ops import native

_MAX_PADDING = 1.3  # a bucket's longest segment over its shortest
_TILE = 256  # query rows of one product
_MAX_SCORES = 64 * 1024 * 1024  # score elements of one bucket: H · S · L², 128 MB in bf16


def packed_attention_reference(
    q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: Sequence[int], scaling: float
) -> Tensor:
    """softmax(q kᵀ · scaling + causal mask) v within each segment."""
    results = []
    sizes = list(lengths)
    for q, k, v in zip(q_HTD.split(sizes, 1), k_GTD.split(sizes, 1), v_GTD.split(sizes, 1), strict=True):
        results.append(
            F.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scaling, enable_gqa=True
            )[0]
        )
    return torch.cat(results, dim=1)


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
    scaling: float,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`packed_attention_reference`, computed in buckets of segments of similar length.

    ``angles`` are the cosines and sines [T, D] by which q and k are turned first (`rotate`).
    """
    heads, total, _ = q_HTD.shape
    if sum(lengths) != total:
        raise ValueError(f"segment lengths add up to {sum(lengths)}, but there are {total} tokens")
    if native.fits(*(x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD)), *(angles or ())):
        cos, sin = angles or (None, None)
        out_HTD: Tensor = _PackedAttention.apply(q_HTD, k_GTD, v_GTD, cos, sin, tuple(lengths), scaling)
        return out_HTD
    if angles is not None:
        q_HTD, k_GTD = rotate(q_HTD, *angles), rotate(k_GTD, *angles)
    found, place_T = _layout(tuple(lengths), heads, q_HTD.device)
    parts = [_dense_causal(q_HTD, k_GTD, v_GTD, each.index_SL, scaling).flatten(1, 2) for each in found]
    return torch.cat(parts, dim=1).index_select(1, place_T)


def rotate(x_HTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), halves: (a, b) → (a cos − b sin, b cos + a sin)."""
    a, b = x_HTD.chunk(2, -1)
    return x_HTD * cos_TD + torch.cat([-b, a], -1) * sin_TD


class _PackedAttention(torch.autograd.Function):
    """The same with C++ passes between the matrix products.

    Only q, k, v and one number a row of scores are kept: the backward pass makes the scores again, so that
    memory grows with the tokens and not with their square.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: Tensor,
        k_GTD: Tensor,
        v_GTD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        lengths: tuple[int, ...],
        scaling: float,
    ) -> Tensor:
        heads, total, size = q_HTD.shape
        out_THD = q_HTD.new_empty(total, heads, size)
        found, _ = _layout(lengths, heads, q_HTD.device)
        sums = []
        for bucket in found:
            q, k, v = _gathered(bucket, q_HTD, k_GTD, v_GTD, cos, sin)
            out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
            for rows, keys, start in _tiles(q, k):
                weights = torch.bmm(q[:, rows], k[:, :keys].transpose(1, 2))
                part = lse.new_empty(weights.shape[:2])
                _scores("softmax_forward", (weights, part), q, k, start, scaling)
                lse[:, rows] = part
                out[:, rows] = torch.bmm(weights, v[:, :keys])
            _scatter(bucket, out, out_THD, len(k_GTD))
            sums.append(lse)
        ctx.save_for_backward(q_HTD, k_GTD, v_GTD, cos, sin, *sums)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out_THD.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_GTD, v_GTD, cos, sin, *sums = ctx.saved_tensors
        g_HTD = grads[0].transpose(0, 1).contiguous().transpose(0, 1)
        results = [torch.empty_like(x.transpose(0, 1)) for x in (q_HTD, k_GTD, v_GTD)]
        found, _ = _layout(ctx.lengths, len(q_HTD), q_HTD.device)
        for bucket, lse in zip(found, sums, strict=True):
            q, k, v = _gathered(bucket, q_HTD, k_GTD, v_GTD, cos, sin)
            g = _gather(bucket, g_HTD, len(k_GTD))
            tiles = list(_tiles(q, k))
            wide = q.dtype if len(tiles) == 1 else torch.float32  # sums of many parts
            gq, gk, gv = torch.empty_like(q), k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
            for rows, keys, start in tiles:
                weights = torch.bmm(q[:, rows], k[:, :keys].transpose(1, 2))
                slopes = torch.bmm(g[:, rows], v[:, :keys].transpose(1, 2))
                _scores(
                    "softmax_backward", (weights, slopes, lse[:, rows].contiguous()), q, k, start, ctx.scaling
                )
                gv[:, :keys] += torch.bmm(weights.transpose(1, 2), g[:, rows])
                gk[:, :keys] += torch.bmm(slopes.transpose(1, 2), q[:, rows])
                gq[:, rows] = torch.bmm(slopes, k[:, :keys])
            for padded, result, turned in zip((gq, gk, gv), results, (True, True, False), strict=True):
                angles = (cos, sin) if turned else (None, None)
                _scatter(bucket, padded.to(q.dtype), result, len(k_GTD), *angles)
        return *(result.transpose(0, 1) for result in results), None, None, None, None


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Rows of q, the number of keys that they see, and their first query, tile by tile."""
    longest, each = k.shape[1], q.shape[1] // k.shape[1]
    for start in range(0, longest, _TILE):
        stop = min(start + _TILE, longest)
        yield slice(start * each, stop * each), stop, start


def _scores(name: str, operands: tuple[Tensor, ...], q: Tensor, k: Tensor, start: int, scaling: float) -> None:
    """A pass over the scores of one tile."""
    batch, rows, keys = operands[0].shape
    each = q.shape[1] // k.shape[1]
    native.run(name, q.dtype, *operands, batch * rows, keys, rows, each, start, 0, float(scaling))


def _gathered(
    bucket: _Bucket, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a bucket, padded, the first two turned."""
    groups = len(k_GTD)
    return (
        _gather(bucket, q_HTD, groups, cos, sin),
        _gather(bucket, k_GTD, groups, cos, sin),
        _gather(bucket, v_GTD, groups),
    )


def _gather(
    bucket: _Bucket, x_HTD: Tensor, groups: int, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """[G · S, L · H/G, D]: the heads that share a key head are rows of one matrix."""
    heads, _, size = x_HTD.shape
    segments, longest = bucket.index_SL.shape
    to = x_HTD.new_empty(groups * segments, longest * heads // groups, size)
    strides = (x_HTD.stride(1), x_HTD.stride(0))
    shape = (segments, longest, heads, groups, size)
    native.run("gather", x_HTD.dtype, x_HTD, *strides, to, bucket.index_SL, bucket.lengths_S, *shape, cos, sin)
    return to


def _scatter(
    bucket: _Bucket,
    x: Tensor,
    to_THD: Tensor,
    groups: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """The other way, angles taken back."""
    _, heads, size = to_THD.shape
    shape = (*bucket.index_SL.shape, heads, groups, size)
    strides = (to_THD.stride(0), to_THD.stride(1))
    native.run("scatter", x.dtype, x, to_THD, *strides, bucket.index_SL, bucket.lengths_S, *shape, cos, sin)


def _dense_causal(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, index_SL: Tensor, scaling: float) -> Tensor:
    """Causal attention of one bucket: [H, S, L, D]. Key heads are shared by views, never copied.

    Query heads that share a key head become more query rows of that head: one product for all of them. Long
    segments go in tiles of queries, which need no keys beyond their own end.
    """
    heads, groups = q_HTD.shape[0], k_GTD.shape[0]
    segments, longest = index_SL.shape
    flat = index_SL.reshape(-1)
    q = q_HTD.index_select(1, flat).view(groups, heads // groups, segments, longest, -1).transpose(1, 2)
    k, v = (x.index_select(1, flat).view(groups * segments, longest, -1) for x in (k_GTD, v_GTD))
    tiles = []
    for start in range(0, longest, _TILE):
        stop = min(start + _TILE, longest)
        rows = q[:, :, :, start:stop].reshape(groups * segments, (heads // groups) * (stop - start), -1)
        # −∞ for the keys after a query, the same for each head; added by the product itself.
        future = torch.full((stop - start, stop), float("-inf"), dtype=q.dtype, device=q.device).triu(start + 1)
        future = future.repeat(heads // groups, 1).expand(groups * segments, -1, -1)
        weights = torch.baddbmm(future, rows, k[:, :stop].transpose(1, 2), alpha=scaling).softmax(-1)
        tiles.append((weights @ v[:, :stop]).view(groups, segments, heads // groups, stop - start, -1))
    out = tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=3)
    return out.transpose(1, 2).reshape(heads, segments, longest, -1)
