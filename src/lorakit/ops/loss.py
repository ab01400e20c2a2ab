"""The language-model loss: a *sum* over labelled tokens, so that whoever adds up can divide exactly once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the label of tokens that carry no loss, as everywhere in this field


def cross_entropy_sum(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Σ −log softmax(logits)[label] in float32 (or better), over the tokens whose label is not `IGNORE`."""
    logits_NV = logits_NV if logits_NV.dtype.itemsize >= 4 else logits_NV.float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
