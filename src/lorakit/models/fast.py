"""lorakit's operations inside a transformers model, instance by instance and with an undo.

Norms, gated MLPs and the attention of known families compute by ops/, which give the same function in fewer
passes over memory; the output head gives the loss instead of logits. What is not known stays as it is: every
model trains, with or without.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.models.decoder import decoder_layer, parts, scores
from lorakit.models.projected import together
from lorakit.ops import native
from lorakit.ops.attention import packed_attention
from lorakit.ops.gated import Act, gated
from lorakit.ops.loss import Softening, linear_cross_entropy_sum
from lorakit.ops.norm import rms_norm
from lorakit.ops.products import by_units

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Classes of transformers whose forward is the formula of ops/; tests/conformance/test_fast.py compares each.
NORMS = {  # and the offset of the weight
    **dict.fromkeys(("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"), 0.0),
    **dict.fromkeys(("Phi3RMSNorm", "SmolLM3RMSNorm"), 0.0),
    **dict.fromkeys(("Gemma2RMSNorm", "Gemma3RMSNorm"), 1.0),
}
MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "Gemma2MLP", "Gemma3MLP"}
LAYERS = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"})
ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
_ACTS: dict[str, Act] = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}

_targets: ContextVar[Tensor | None] = ContextVar("targets", default=None)


@contextlib.contextmanager
def fast(model: PreTrainedModel, *, attention: bool) -> Iterator[None]:
    """Within the block, known parts compute by ops/, ``attention`` too where batches are packed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(by_units())
        # Compiled code would be made anew for each layout. This imports the compiler: not before it is asked.
        attend = torch.compiler.disable(packed_attention) if attention else None
        for module in model.modules():
            forward = _forward(module, attend)
            if forward is not None:
                stack.enter_context(_replaced(module, forward))
        yield


@contextlib.contextmanager
def loss_head(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the frozen output head gives the summed loss where `targets` are known."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None and not head._forward_hooks:
        with (
            _uncapped(model) as cap,
            _replaced(head, functools.partial(_loss_or_logits, head, head.forward, cap)),
        ):
            yield
    else:
        yield


@contextlib.contextmanager
def _uncapped(model: PreTrainedModel) -> Iterator[float]:
    """The model's cap of its logits, which it leaves to the block: it would cap the loss."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        model.config.final_logit_softcapping = None
    try:
        yield cap or 0.0
    finally:
        if cap:
            model.config.final_logit_softcapping = cap


@contextlib.contextmanager
def targets(targets_N: Tensor) -> Iterator[None]:
    """The label of each position that the head is given, for a model in `loss_head`."""
    token = _targets.set(targets_N)
    try:
        yield
    finally:
        _targets.reset(token)


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Blocks may nest: what was there before comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward  # the class's own again
        else:
            module.forward = before


def _forward(module: nn.Module, attend: Callable[..., Tensor] | None) -> Callable[..., Any] | None:
    """What the module is to compute by, if it is known."""
    kind = type(module).__name__
    if not type(module).__module__.startswith("transformers.models.") or "forward" in vars(module):
        return None
    if kind in NORMS:
        return functools.partial(_norm, module, NORMS[kind])
    if kind in MLPS and (act := _act(module)):
        return functools.partial(_mlp, module, act)
    if kind in ATTENTIONS and attend and native.library() is not None:
        return functools.partial(_attention, module, attend)
    if kind in LAYERS and (act := _act(module.mlp)) and all(_forward(part, attend) for part in parts(module)):
        return functools.partial(decoder_layer, module, act)
    return None


def _act(mlp: Any) -> Act | None:
    return _ACTS.get(type(mlp.act_fn).__name__)


def _norm(module: Any, offset: float, hidden_states: Tensor) -> Tensor:
    if not native.fits(hidden_states, module.weight):  # transformers' own; it rounds float64 to float32
        plain: Tensor = type(module).forward(module, hidden_states)
        return plain
    eps = module.eps if offset else module.variance_epsilon
    return rms_norm(hidden_states, module.weight, eps, offset)


def _mlp(module: Any, act: Act, x: Tensor) -> Tensor:
    gate, up = together(x, module.gate_proj, module.up_proj)
    return together(gated(gate, up, act), module.down_proj)[0]


def _attention(
    module: Any,
    attend: Callable[..., Tensor],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Projections and attention of one flat batch [1, T, C], which turns q and k as it gathers them."""
    if given.get("segment_lengths") is None:  # an evaluation that does not pack
        return type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **given
        )
    lengths = given["segment_lengths"].lengths
    total = hidden_states.shape[1]
    projected = together(hidden_states, module.q_proj, module.k_proj, module.v_proj)
    q_THD, k_TGD, v_TGD = (y.view(total, -1, module.head_dim) for y in projected)
    if "Qwen3" in type(module).__name__:
        q_THD, k_TGD = module.q_norm(q_THD), module.k_norm(k_TGD)
    angles = (position_embeddings[0][0], position_embeddings[1][0])
    turned = (x.transpose(0, 1) for x in (q_THD, k_TGD, v_TGD))
    out_HTD = attend(*turned, lengths, scores(module), angles)
    return together(out_HTD.transpose(0, 1).reshape(1, total, -1), module.o_proj)[0], None


def _loss_or_logits(head: nn.Linear, logits: Callable[[Tensor], Tensor], cap: float, x_BND: Tensor) -> Tensor:
    labels_N = _targets.get()
    if labels_N is None or head.weight.requires_grad or x_BND.dtype != head.weight.dtype:
        found = logits(x_BND)
        return cap * torch.tanh(found / cap) if cap else found
    return linear_cross_entropy_sum(x_BND[0], head.weight, labels_N, Softening(cap))
