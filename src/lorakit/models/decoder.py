"""A decoder layer of Llama's kind as one operation, while all of its parts are known to be plain ones."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from lorakit.models.projected import group
from lorakit.ops import block
from lorakit.ops.attention import Scores
from lorakit.ops.gated import Act

_at_once_wanted: ContextVar[bool] = ContextVar("at_once", default=True)


def parts(layer: Any) -> tuple[nn.Module, ...]:
    """What a decoder layer calls; these call its linear layers."""
    return layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp


def scores(attention: Any) -> Scores:
    """How the module gets scores from q and k."""
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return Scores(attention.scaling, window or 0)


@contextlib.contextmanager
def by_parts() -> Iterator[None]:
    """Within the block decoder layers call their parts, as a profile wants to see them."""
    token = _at_once_wanted.set(False)
    try:
        yield
    finally:
        _at_once_wanted.reset(token)


def decoder_layer(
    layer: Any,
    act: Act,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **given: Any,
) -> Tensor:
    """One flat batch [1, T, C] by `decoder_block`; where anything is special the parts compute it."""
    segments = given.get("segment_lengths")
    recomputed = layer.gradient_checkpointing and layer.training
    if segments is not None and position_embeddings is not None and not recomputed:
        angles = position_embeddings[0][0], position_embeddings[1][0]
        y = _at_once(layer, act, hidden_states, segments.lengths, angles)
        if y is not None:
            return y
    plain: Tensor = type(layer).forward(
        layer, hidden_states, attention_mask=attention_mask, position_ids=position_ids,
        past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings, **given,
    )  # fmt: skip
    return plain


def _at_once(
    layer: Any, act: Act, x: Tensor, lengths: tuple[int, ...], angles: tuple[Tensor, Tensor]
) -> Tensor | None:
    attention, mlp = layer.self_attn, layer.mlp
    if not _at_once_wanted.get() or any(map(_hooked, (*parts(layer), mlp.act_fn))):
        return None
    groups = [
        group(attention.q_proj, attention.k_proj, attention.v_proj), group(attention.o_proj),
        group(mlp.gate_proj, mlp.up_proj), group(mlp.down_proj),
    ]  # fmt: skip
    found = [each for each in groups if each is not None]
    if len(found) < len(groups):
        return None
    norms = layer.input_layernorm, layer.post_attention_layernorm
    first, second = (block.Norm(norm.weight, norm.variance_epsilon) for norm in norms)
    qkv, o, gates, down = (block.Group(each.projections, each.p) for each in found)
    whole = block.Block(first, qkv, o, second, gates, down, act, attention.head_dim, scores(attention))
    y = block.decoder_block(x, whole, lengths, angles)
    if y is not None and y.requires_grad:
        for come_back in itertools.chain(*(each.come_back for each in found)):
            if come_back is not None:
                y.register_hook(come_back)  # the backward pass of y is that of all adapters
    return y


def _hooked(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)
