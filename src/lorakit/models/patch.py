"""The one place that changes a loaded model's behaviour, instance by instance and with an undo.

Packed batches need attention that stays inside its segment. transformers has a public registry for attention
functions; `packed` switches one model to lorakit's entry and back. `lean_head` serves generation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.ops.attention import packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "lorakit_packed"
# Families whose only mixing of tokens is causal attention through the registry, with rotary positions from
# position_ids. Each is tested: packed and padded give the same loss.
PACKABLE = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def can_pack(model: PreTrainedModel, longest: int) -> bool:
    """Whether rows up to ``longest`` tokens may be laid end to end for this model."""
    config = model.config.to_dict()
    window = config.get("sliding_window")
    return (
        config["model_type"] in PACKABLE
        and (window is None or window >= longest)
        and not config.get("attention_dropout")  # `packed_attention` has no dropout
    )


@contextlib.contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model takes ``segment_lengths`` and attends inside segments only."""
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def lean_head(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the output head sees contiguous input.

    Before the first generated token, transformers hands it the last position of every row: a strided view, for
    which PyTorch's linear copies the whole weight once a row (100 rows of SmolLM2: 5.7 GB and 8 s).
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    segment_lengths: tuple[int, ...] | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, D] → [1, T, H, D], as every entry of the registry."""
    if segment_lengths is None:
        raise ModelError("a packed model was called without segment_lengths")
    out_HTD = packed_attention(query[0], key[0], value[0], segment_lengths, scaling)
    return out_HTD.transpose(0, 1)[None], None
