"""The one place that changes a loaded model's behaviour, instance by instance and with an undo.

Packed batches need attention that stays inside its segment. transformers has a public registry for attention
functions; `packed` switches one model to lorakit's entry and back. `lean_head` serves generation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.errors import ModelError
from lorakit.ops.attention import Scores, packed_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "lorakit_packed"
# Families whose only mixing of tokens is causal attention through the registry, with rotary positions from
# position_ids. Each is tested: packed and padded give the same loss.
PACKABLE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "gpt_neox"}
)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether rows may be laid end to end for this model."""
    config = model.config.to_dict()
    return (
        config["model_type"] in PACKABLE
        and not config.get("use_bidirectional_attention")
        and not config.get("attention_dropout")  # `packed_attention` has no dropout
    )


@contextlib.contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model takes ``segment_lengths`` and attends inside segments only.

    Compiled code leaves this attention out, which would be compiled anew for each layout.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, torch.compiler.disable(_attention))
    hook = model.register_forward_pre_hook(_hide_lengths, with_kwargs=True)
    try:
        with attention(model, _NAME):
            yield
    finally:
        hook.remove()


@contextlib.contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the block the model attends by this entry of the registry (its own one, to leave `packed`)."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
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


class _Segments:
    """The lengths of a batch's segments, as compiled code may pass them on: it is bound to values of tuples."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths


def _hide_lengths(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if isinstance(lengths := named.get("segment_lengths"), tuple):
        named = named | {"segment_lengths": _Segments(lengths)}
    return inputs, named


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    segment_lengths: _Segments | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, D] → [1, T, H, D], as every entry of the registry."""
    if segment_lengths is None:
        raise ModelError("a packed model was called without segment_lengths")
    how = Scores(scaling, given.get("sliding_window") or 0, given.get("softcap") or 0.0)
    out_HTD = packed_attention(query[0], key[0], value[0], segment_lengths.lengths, how)
    return out_HTD.transpose(0, 1)[None], None
