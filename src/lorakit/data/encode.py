"""Sample → token ids and labels, made together from one text.

Tokenising goes in batches, which fast tokenizers spread over all cores. The token that ends an answer is
trained with it: a model that never sees it rewarded never stops.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lorakit.data.pool import chunks
from lorakit.data.rendering import Policy, Rendered, render_prompt, render_sample
from lorakit.data.sample import Sample
from lorakit.data.templates import Template
from lorakit.data.token_ends import with_ends
from lorakit.errors import DataError, ModelError
from lorakit.ops.loss import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 512


@dataclass(frozen=True)
class Row:
    """One encoded sequence: ``labels[i]`` is ``ids[i]`` where token i carries loss, else `IGNORE`."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Tokens that carry loss. The first token never does: nothing stands before it to predict it."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORE) if self.labels else 0


@dataclass(frozen=True)
class Encoded:
    """What became of one sample.

    Attributes:
        whole: its rows before anything is cut; several if the template rewrites history.
        rows: as they are trained; none if the sample was dropped.
        truncated: rows that were cut to length.
        split: rows that came out of longer ones.
        too_long: rows dropped for their length.
        masked: rows dropped because nothing in them carries loss.
        rewritten: whether it became a row for each answer, as the template rewrites what came before.
    """

    whole: tuple[Row, ...]
    rows: tuple[Row, ...]
    truncated: int = 0
    split: int = 0
    too_long: int = 0
    masked: int = 0
    rewritten: bool = False


@dataclass(frozen=True)
class DataSummary:
    """What became of all samples; ``dropped`` is ``too_long`` and ``masked`` together."""

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    too_long: int = 0
    masked: int = 0
    rewritten: int = 0
    whole_tokens: int = 0  # before anything was cut

    def add(self, encoded: Sequence[Encoded]) -> DataSummary:
        """The summary with these samples counted, too."""
        rows = [row for one in encoded for row in one.rows]
        too_long, masked = sum(one.too_long for one in encoded), sum(one.masked for one in encoded)
        return DataSummary(
            rows=self.rows + len(rows),
            tokens=self.tokens + sum(len(row.ids) for row in rows),
            supervised_tokens=self.supervised_tokens + sum(row.supervised for row in rows),
            longest=max([self.longest, *(len(row.ids) for row in rows)]),
            truncated=self.truncated + sum(one.truncated for one in encoded),
            dropped=self.dropped + too_long + masked,
            split=self.split + sum(one.split for one in encoded),
            too_long=self.too_long + too_long,
            masked=self.masked + masked,
            rewritten=self.rewritten + sum(one.rewritten for one in encoded),
            whole_tokens=self.whole_tokens + sum(len(row.ids) for one in encoded for row in one.whole),
        )

    def check(self, cutoff_len: int) -> None:
        """Refuse to go on without a row.

        Raises:
            DataError: no row is left.
        """
        if self.rows == 0:
            raise DataError(
                f"no row is left to train on: {self.too_long} of {self.dropped} are too long, "
                f"{self.masked} carry no loss",
                remedy=f"raise cutoff_len (it is {cutoff_len})" if self.too_long else "see `lorakit preview`",
            )


def encode_all(
    tokenizer: PreTrainedTokenizerBase, samples: Iterable[Sample], policy: Policy, template: Template
) -> tuple[list[Row], DataSummary]:
    """Encode every sample, bring long rows to length, drop rows that carry no loss.

    Raises:
        DataError: a sample cannot be rendered, or no row is left.
        ModelError: the tokenizer cannot say which characters a token covers.
    """
    rows: list[Row] = []
    summary = DataSummary()
    for chunk in chunks(samples, _BATCH):
        encoded = encode_batch(tokenizer, chunk, policy, template)
        rows += (row for one in encoded for row in one.rows)
        summary = summary.add(encoded)
    summary.check(policy.cutoff_len)
    return rows, summary


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], policy: Policy, template: Template
) -> list[Encoded]:
    """What becomes of each sample; tokenised together, which is faster than one by one."""
    reader = _Reader(tokenizer)
    bos_id, eos = tokenizer.bos_token_id, tokenizer.eos_token
    rendered = [render_sample(template, sample, policy, bos=reader.bos, eos=eos) for sample in samples]
    tokens = iter(reader.tokenize([text for texts in rendered for text in texts]))
    results = []
    for sample, texts in zip(samples, rendered, strict=True):
        whole = tuple(reader.label(text, *next(tokens), policy, sample.place) for text in texts)
        results.append(_fit(whole, policy, bos_id, rewritten=any(t.rewritten for t in texts)))
    return results


def prompt_ids(tokenizer: PreTrainedTokenizerBase, sample: Sample, template: Template) -> list[int]:
    """What the model is asked with: everything before the last answer of ``sample``, as training has it."""
    reader = _Reader(tokenizer)
    ((ids, _),) = reader.tokenize([render_prompt(template, sample, bos=reader.bos)])
    return ids


class _Reader:
    """Text → tokens with their places, and places → labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer is a slow one, which cannot tell which characters a token covers")
        self._tokenizer = tokenizer
        # Any special token may end a turn (families use eos, <|eot_id|>, <end_of_turn> …).
        added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._ends = frozenset(tokenizer.all_special_ids) | frozenset(added)
        # Text without a template begins as the tokenizer begins any text.
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        self.bos: str = tokenizer.bos_token if begins else ""

    def tokenize(self, texts: Sequence[Rendered]) -> list[tuple[list[int], list[int]]]:
        """Ids of each text, and where each token ends; pieces between cuts are tokenised apart."""
        bounds = [[0, *text.cuts, len(text.text)] for text in texts]
        pieces = [text.text[a:b] for text, at in zip(texts, bounds, strict=True) for a, b in pairwise(at)]
        if not pieces:
            return []
        encoded = with_ends(self._tokenizer, pieces)
        if len(pieces) == len(texts):
            return encoded
        parts = iter(encoded)
        return [_joined(at, [next(parts) for _ in at[1:]]) for at in bounds]

    def label(
        self, text: Rendered, ids: list[int], token_ends: Sequence[int], policy: Policy, place: str
    ) -> Row:
        """The row with its labels.

        A token that reaches into an answer from before it (a blank melted into the line break of a template)
        carries loss with the answer.
        """
        labels = list(ids) if policy.train_on_prompt else [IGNORE] * len(ids)
        for span in text.spans:
            start = bisect_right(token_ends, span.start)
            stop = bisect_right(token_ends, span.stop)
            if span.answer:
                stop = self._end(ids, start, stop, place)
            labels[start:stop] = ids[start:stop] if span.train else [IGNORE] * (stop - start)
        return Row(tuple(ids), tuple(labels))

    def _end(self, ids: Sequence[int], start: int, stop: int, place: str) -> int:
        for i in range(stop, start, -1):
            if ids[i - 1] in self._ends:
                return i
        raise DataError(
            "the chat template writes no end-of-turn token after the answer: the model would never stop",
            place=place,
            remedy="choose another template, or repair the tokenizer's chat_template or eos_token",
        )


def _joined(bounds: Sequence[int], parts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[int], list[int]]:
    """Pieces in a row, with ends counted from the start of the text."""
    ids: list[int] = []
    ends: list[int] = []
    for base, (some, local) in zip(bounds, parts, strict=False):
        ids += some
        # A blank that the tokenizer puts in front covers nothing; it belongs to the piece all the same.
        ends += [max(end, 1) + base for end in local]
    return ids, ends


def _fit(whole: tuple[Row, ...], policy: Policy, bos: int | None, *, rewritten: bool) -> Encoded:
    """Bring rows to length."""
    limit, kept = policy.cutoff_len, []
    truncated = split = too_long = 0
    masked = 0 if whole else 1
    for row in whole:
        if not row.supervised:
            masked += 1
        elif len(row.ids) <= limit:
            kept.append(row)
        elif policy.long_rows == "truncate":
            truncated += 1
            kept.append(_truncated(row, limit, bos))
        elif policy.long_rows == "split":
            parts = [part for part in _parts(row, limit) if part.supervised]
            split += len(parts)
            kept += parts
        else:
            too_long += 1
    return Encoded(whole, tuple(kept), truncated, split, too_long, masked, rewritten)


def _truncated(row: Row, limit: int, bos: int | None) -> Row:
    """A stretch of the row with its first answer in it: the start if that ends in time, else a later one.

    An answer that is too long itself keeps at least half of the room, and loses its end. The token that begins
    every text stays, too.
    """
    first = next(i for i, label in enumerate(row.labels) if i and label != IGNORE)
    after = next((i for i in range(first, len(row.ids)) if row.labels[i] == IGNORE), len(row.ids))
    if after <= limit:
        return Row(row.ids[:limit], row.labels[:limit])
    start = after - limit if after - first < limit else max(0, first - limit // 2)
    head = 1 if start and row.ids[0] == bos else 0
    start, stop = start + head, start + limit
    return Row(row.ids[:head] + row.ids[start:stop], row.labels[:head] + row.labels[start:stop])


def _parts(row: Row, limit: int) -> list[Row]:
    """Rows of at most ``limit`` tokens, each beginning with the token before it: no loss is missed."""
    starts = range(0, len(row.ids) - 1, limit - 1)
    parts = [Row(row.ids[start : start + limit], row.labels[start : start + limit]) for start in starts]
    return [parts[0], *(Row(part.ids, (IGNORE, *part.labels[1:])) for part in parts[1:])]
