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
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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


@functools.lru_cache(maxsize=16)
def _layout(lengths: tuple[int, ...], heads: int, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
    """Where the tokens of each bucket are, and where each token's result stands after all buckets.

    One layout serves every layer of a model, so it is kept. ``index_SL`` of a bucket points at each segment's
    tokens; past a segment's end at its last one, which no real query sees because the mask is causal, and whose
    result is not read.
    """
    starts = [0, *itertools.accumulate(lengths)]
    indices: list[Tensor] = []
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
        indices.append(index_SL.to(device))
    return tuple(indices), place_T.to(device)


def packed_attention(
    q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, lengths: Sequence[int], scaling: float
) -> Tensor:
    """`packed_attention_reference`, computed in buckets of segments of similar length."""
    heads, total, _ = q_HTD.shape
    if sum(lengths) != total:
        raise ValueError(f"segment lengths add up to {sum(lengths)}, but there are {total} tokens")
    indices, place_T = _layout(tuple(lengths), heads, q_HTD.device)
    parts = [_dense_causal(q_HTD, k_GTD, v_GTD, index_SL, scaling).flatten(1, 2) for index_SL in indices]
    return torch.cat(parts, dim=1).index_select(1, place_T)


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
