"""How good a model is on held-out rows: loss and perplexity, and by generation exact match and field F1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from lorakit.data.encode import DataSummary, Row, encode_all
from lorakit.data.sample import Sample
from lorakit.evals.generate import generate
from lorakit.evals.metrics import exact_match, field_scores, perplexity
from lorakit.evals.objective import batch_loss, batching

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on one set of rows. What was not measured is None."""

    rows: int
    loss: float  # mean over the supervised tokens
    perplexity: float
    data: DataSummary
    answers: tuple[str, ...] | None = None  # generated, in the order of the samples
    exact_match: float | None = None
    field_f1: float | None = None  # only where every reference is a JSON object

    def scores(self) -> dict[str, float | int]:
        """The measured numbers alone; an infinite perplexity is left out, as JSON has no word for it."""
        kept = ("rows", "loss", "perplexity", "exact_match", "field_f1")
        return {
            key: value for key, value in asdict(self).items() if key in kept and value not in (None, math.inf)
        }


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    cutoff_len: int,
    batch_size: int,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score ``model`` on ``samples``; answers are generated only if ``max_new_tokens`` is given.

    Raises:
        DataError: a sample that the chat template refuses, or no row left within ``cutoff_len``.
    """
    rows, data = encode_all(tokenizer, samples, cutoff_len)
    loss = mean_loss(model, tokenizer, rows, batch_size)
    if max_new_tokens is None:
        return Evaluation(data.rows, loss, perplexity(loss), data)
    answers = generate(
        model,
        tokenizer,
        [sample.prompt for sample in samples],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=on_batch,
    )
    references = [sample.reference for sample in samples]
    fields = field_scores(answers, references)
    return Evaluation(
        rows=data.rows,
        loss=loss,
        perplexity=perplexity(loss),
        data=data,
        answers=tuple(answers),
        exact_match=exact_match(answers, references),
        field_f1=None if fields is None else fields.f1,
    )


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int
) -> float:
    """Σ loss / Σ supervised tokens over all rows, however they fall into batches."""
    was_training = model.training
    model.eval()
    total, supervised = 0.0, 0
    with batching(model, tokenizer, rows) as collate:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size])
            total += float(batch_loss(model, batch))
            supervised += len(batch.targets_N)
    model.train(was_training)
    return total / supervised
