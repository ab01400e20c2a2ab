"""How good a model is on held-out rows: loss and perplexity, and by generation exact match and field F1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorakit.data.encode import DataSummary, Row, encode_all, prompt_ids
from lorakit.data.probe import stop_ids
from lorakit.data.rendering import Policy
from lorakit.data.sample import Sample
from lorakit.data.templates import Template
from lorakit.evals.generate import generate
from lorakit.evals.metrics import exact_match, field_scores, perplexity
from lorakit.evals.objective import batch_loss, batching, in_batches

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

    def to_json(self) -> dict[str, Any]:
        """As JSON values that `from_json` takes."""
        values = asdict(self)
        values["answers"] = None if self.answers is None else list(self.answers)
        values["perplexity"] = None if math.isinf(self.perplexity) else self.perplexity
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """Undoes `to_json`."""
        answers, spread = values["answers"], values["perplexity"]
        return cls(
            **{
                **values,
                "data": DataSummary(**values["data"]),
                "answers": None if answers is None else tuple(answers),
                "perplexity": math.inf if spread is None else spread,
            }
        )

    def scores(self) -> dict[str, float | int]:
        """The measured numbers alone; an infinite perplexity is left out, as JSON has no word for it."""
        kept = ("rows", "loss", "perplexity", "exact_match", "field_f1")
        return {
            key: value for key, value in asdict(self).items() if key in kept and value not in (None, math.inf)
        }


@dataclass(frozen=True)
class HeldOut:
    """Samples made ready to be scored as often as needed.

    Attributes:
        samples: with the references.
        rows: the same as tokens, cut to length.
        data: what became of them.
        prompts: what the model is asked with, if it is to answer.
        stop: tokens that end an answer.
    """

    samples: Sequence[Sample]
    rows: Sequence[Row]
    data: DataSummary
    prompts: Sequence[Sequence[int]]
    stop: Sequence[int]


def hold_out(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    template: Template,
    cutoff_len: int,
    answers: bool,
) -> HeldOut:
    """Render and encode ``samples``, for their loss and, with ``answers``, for generation.

    Raises:
        DataError: a sample that the chat template refuses, or no row left within ``cutoff_len``.
    """
    rows, data = encode_all(tokenizer, samples, Policy(cutoff_len), template)
    prompts = [prompt_ids(tokenizer, sample, template) for sample in samples] if answers else []
    return HeldOut(samples, rows, data, prompts, stop_ids(tokenizer, template) if answers else ())


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    poll: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score ``model``; answers are generated only if ``max_new_tokens`` is given.

    ``on_batch(done, total)`` follows the answers. ``poll`` is called after each batch, and what it raises ends
    the evaluation. With too little memory for ``batch_size`` rows, fewer are taken.

    Raises:
        MemoryLimitError: there is too little for a single row.
    """
    rows, data = held_out.rows, held_out.data
    loss = mean_loss(model, tokenizer, rows, batch_size, poll)
    if max_new_tokens is None:
        return Evaluation(data.rows, loss, perplexity(loss), data)

    def answered(done: int, total: int) -> None:
        on_batch(done, total)
        poll()

    answers = generate(
        model,
        tokenizer,
        held_out.prompts,
        stop=held_out.stop,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        on_batch=answered,
    )
    references = [sample.reference for sample in held_out.samples]
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
) -> float:
    """Σ loss / Σ supervised tokens over all rows, however they fall into batches; ``poll`` follows each."""
    was_training = model.training
    model.eval()
    total, supervised = 0.0, 0

    def add(start: int, end: int) -> None:
        nonlocal total, supervised
        batch = collate(rows[start:end])
        total += float(batch_loss(model, batch))
        supervised += len(batch.targets_N)

    try:
        with batching(model, tokenizer, rows) as collate:
            in_batches(len(rows), batch_size, add, lambda done: poll())
    finally:
        model.train(was_training)
    return total / supervised
