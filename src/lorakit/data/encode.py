r"""Conversation → token ids and labels, made together in one pass over the rendered text.

    <|im_start|>user\n8128 Drive<|im_end|>\n<|im_start|>assistant\n{"number":"8128"}<|im_end|>\n
    ────────────── no loss (label −100) ───────────────────────── ── loss, and the end ──── ─ no

An assistant turn begins where the template stops when it is asked for an answer, and ends with the
end-of-turn token, which is trained too: a model that never sees it rewarded never stops.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.sample import Sample
from lorakit.data.templates import render
from lorakit.errors import DataError, ModelError
from lorakit.ops.loss import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One encoded conversation: ``labels[i]`` is ``ids[i]`` where token i carries loss, else `IGNORE`."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Tokens that carry loss. The first token never does: nothing stands before it to predict it."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class DataSummary:
    """What became of the rows."""

    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    truncated: int
    dropped: int


def encode_all(
    tokenizer: PreTrainedTokenizerBase, samples: Iterable[Sample], cutoff_len: int
) -> tuple[list[Row], DataSummary]:
    """Encode every sample, cut rows at ``cutoff_len`` tokens, drop rows that have no loss left.

    Raises:
        DataError: no row is left.
    """
    rows: list[Row] = []
    truncated = dropped = 0
    for sample in samples:
        row = encode(tokenizer, sample)
        if len(row.ids) > cutoff_len:
            truncated += 1
            row = Row(row.ids[:cutoff_len], row.labels[:cutoff_len])
        if row.supervised:
            rows.append(row)
        else:
            dropped += 1
    if not rows:
        raise DataError(
            f"no row is left to train on: {dropped} of {dropped} lost their whole answer to cutoff_len",
            remedy=f"raise cutoff_len (it is {cutoff_len})",
        )
    return rows, DataSummary(
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        supervised_tokens=sum(row.supervised for row in rows),
        longest=max(len(row.ids) for row in rows),
        truncated=truncated,
        dropped=dropped,
    )


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Row:
    """Token ids and labels of one conversation.

    Raises:
        DataError: the template rewrites earlier turns, or writes no end-of-turn token.
        ModelError: the tokenizer cannot say which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer is a slow one, which cannot tell which characters a token covers")
    text, spans = _render_spans(tokenizer, sample)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    labels = [IGNORE] * len(ids)
    ends = _end_tokens(tokenizer)
    for start, stop in spans:
        # Tokenizers that trim offsets give a token of spaces the empty range (end, end): it is inside, too.
        inside = [i for i, (begin, end) in enumerate(offsets) if start <= begin and start < end <= stop]
        last = next((i for i in reversed(inside) if ids[i] in ends), None)
        if last is None:
            raise DataError(
                "the chat template writes no end-of-turn token after the answer: the model would never stop",
                place=sample.place,
                remedy="repair tokenizer.chat_template or the tokenizer's eos_token",
            )
        for i in inside[: inside.index(last) + 1]:
            labels[i] = ids[i]
    return Row(tuple(ids), tuple(labels))


def _render_spans(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
    """The text and the character ranges of its assistant turns, what follows each included."""
    text = render(tokenizer, sample.messages, ask=False, place=sample.place)
    spans = []
    for i, message in enumerate(sample.messages):
        if message.role == "assistant":
            before = render(tokenizer, sample.messages[:i], ask=True, place=sample.place)
            after = render(tokenizer, sample.messages[: i + 1], ask=False, place=sample.place)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise DataError(
                    "the chat template rewrites earlier turns, so the answer cannot be found in its output",
                    place=sample.place,
                    remedy="split the conversation into rows of one question and one answer",
                )
            spans.append((len(before), len(after)))
    return text, spans


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens, any of which may end a turn (families use eos, <|eot_id|>, <end_of_turn> …)."""
    added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)
