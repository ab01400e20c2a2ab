"""How a model's loss is computed on rows: packed where the model can, padded everywhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.errors import MemoryLimitError
from lorakit.hardware import is_out_of_memory
from lorakit.log import logger
from lorakit.models.fast import fast, loss_head, targets
from lorakit.models.patch import can_pack, packed
from lorakit.ops.loss import cross_entropy_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Collate = Callable[[Sequence[Row]], Batch]


def in_batches(
    count: int, size: int, handle: Callable[[int, int], None], after: Callable[[int], None] = lambda done: None
) -> None:
    """Let ``handle(start, end)`` go through ``count`` rows, ``size`` at a time; ``after(done)`` follows.

    Where memory runs short, ``handle`` gets fewer rows from there on, and ``after`` is called as often as ever.

    Raises:
        MemoryLimitError: there is too little for a single row.
    """
    part = size
    for first in range(0, count, size):
        start, last = first, min(first + size, count)
        while start < last:
            end = min(start + part, last)
            try:
                handle(start, end)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if end - start == 1:
                    raise MemoryLimitError(
                        "there is not enough memory to evaluate a single row",
                        remedy="lower cutoff_len or max_new_tokens, or leave the evaluation out",
                    ) from error
                part = (end - start) // 2
                logger.info("out of memory: evaluating %d rows at once from here on", part)
            else:
                start = end
        after(last)


@contextlib.contextmanager
def batching(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> Iterator[Collate]:
    """Within the block, the function that turns rows into batches which this model takes."""
    if can_pack(model):
        with packed(model), fast(model, attention=True), loss_head(model):
            yield lambda chosen: pack(chosen).to(model.device)
    else:
        with fast(model, attention=False):
            yield lambda chosen: pad(chosen, tokenizer.pad_token_id).to(model.device)


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Σ −log p over the supervised tokens of one batch; packed, only their positions get logits at all."""
    if batch.packed:
        with targets(batch.targets_N):
            found = model(**batch.inputs, logits_to_keep=batch.keep_N, use_cache=False).logits
        return found if found.dim() == 0 else cross_entropy_sum(found[0], batch.targets_N)
    logits_BTV = model(**batch.inputs, use_cache=False).logits
    return cross_entropy_sum(logits_BTV.flatten(0, 1)[batch.keep_N], batch.targets_N)
