"""The merge certificate: how far a merged model answers from base and adapter, on given inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = (
    "Write one sentence about the sea.",
    "What is 17 times 3?",
    '{"name": "Ada", "city": "London"} Which city?',
    "Translate to French: good morning",
    "def add(a, b):",
)


@dataclass(frozen=True)
class Certificate:
    """Logits of the merged model against those of base and adapter, over all positions of the inputs.

    Attributes:
        inputs: texts compared.
        tokens: positions compared.
        max_logit_difference: largest absolute difference of a logit.
        mean_logit_difference: mean absolute difference.
        top1_agreement: share of positions at which both rank the same token first.
    """

    inputs: int
    tokens: int
    max_logit_difference: float
    mean_logit_difference: float
    top1_agreement: float


@torch.inference_mode()
def logits(model: PreTrainedModel, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
    """Float32 logits [T, V] of each input (token ids), on the CPU."""
    model.eval()
    ids = [torch.tensor([each], device=model.device) for each in inputs]
    return [model(one, use_cache=False).logits[0].float().cpu() for one in ids]


def certify(adapted: Sequence[Tensor], merged: Sequence[Tensor]) -> Certificate:
    """Compare the logits [T, V] of two models on the same inputs."""
    gaps = [(a - m).abs() for a, m in zip(adapted, merged, strict=True)]
    same = [a.argmax(-1) == m.argmax(-1) for a, m in zip(adapted, merged, strict=True)]
    tokens = sum(len(each) for each in same)
    return Certificate(
        inputs=len(gaps),
        tokens=tokens,
        max_logit_difference=max(float(gap.max()) for gap in gaps),
        mean_logit_difference=sum(float(gap.mean()) * len(gap) for gap in gaps) / tokens,
        top1_agreement=sum(int(each.sum()) for each in same) / tokens,
    )
