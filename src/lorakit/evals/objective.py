"""How a model's loss is computed on rows: packed where the model can, padded everywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.data.store import lengths_of
from lorakit.models.patch import can_pack, packed
from lorakit.ops.loss import cross_entropy_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Collate = Callable[[Sequence[Row]], Batch]


@contextlib.contextmanager
def batching(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> Iterator[Collate]:
    """Within the block, the function that turns rows into batches which this model takes."""
    if can_pack(model, longest=max(lengths_of(rows))):
        with packed(model):
            yield lambda chosen: pack(chosen).to(model.device)
    else:
        yield lambda chosen: pad(chosen, tokenizer.pad_token_id).to(model.device)


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Σ −log p over the supervised tokens of one batch; packed, only their positions get logits at all."""
    if batch.packed:
        logits_BNV = model(**batch.inputs, logits_to_keep=batch.keep_N, use_cache=False).logits
        return cross_entropy_sum(logits_BNV[0], batch.targets_N)
    logits_BTV = model(**batch.inputs, use_cache=False).logits
    return cross_entropy_sum(logits_BTV.flatten(0, 1)[batch.keep_N], batch.targets_N)
