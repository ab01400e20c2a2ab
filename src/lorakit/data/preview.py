"""Rows token by token, as training would see them: what is prompt, trained, cut away or padding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.data.encode import Encoded, Row
from lorakit.data.sample import Sample
from lorakit.ops.loss import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["prompt", "trained", "cut", "padding", "gap"]  # gap: a part that is not shown
Marked = tuple[int, Kind]

_CUT: Kind = "cut"
_EDGE = 2000  # tokens that are shown of the beginning and of the end of a very long row

_REPLACEMENT = "\ufffd"  # what decoders write for half a character
# Control characters and marks that turn the direction of writing: on a screen they hide what is there.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """The fewest neighbouring tokens that make whole characters and are for the same."""

    text: str
    ids: tuple[int, ...]
    kind: Kind
    special: bool


@dataclass(frozen=True)
class ShownRow:
    """One sample in pieces, one sequence for each row that it became."""

    number: int
    place: str
    tokens: int
    trained: int
    cut: int
    padding: int
    sequences: tuple[tuple[Piece, ...], ...]


def show(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, number: int, encoded: Encoded, pad_to: int = 0
) -> ShownRow:
    """One sample in pieces of text. What is cut away is shown as such, unless long rows are split.

    Args:
        tokenizer: decodes the tokens.
        sample: as it was read.
        number: of the sample.
        encoded: what became of it.
        pad_to: length in tokens that its batch is padded to; 0 if nothing is padded.
    """
    rows, whole = encoded.rows, encoded.whole
    if not rows:
        marked = [_cut(row.ids) for row in whole]
    elif len(rows) == len(whole):
        marked = [_aligned(row, uncut) for row, uncut in zip(rows, whole, strict=True)]
    else:
        marked = [_marked(row) for row in rows]
    kinds = [kind for tokens in marked for _, kind in tokens]
    padding = [max(pad_to - len(row.ids), 0) for row in rows] or [0] * len(whole)  # what is dropped needs none
    sequences = tuple(
        (*_edges(tokenizer, tokens), *_padding(tokenizer, count))
        for tokens, count in zip(marked, padding, strict=True)
    )
    trained, cut = kinds.count("trained"), kinds.count("cut")
    return ShownRow(number, sample.place, len(kinds), trained, cut, sum(padding), sequences)


def _padding(tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[Piece]:
    if count:
        yield Piece(f"⟨padding: {count} × {tokenizer.pad_token}⟩", (), "padding", False)


def _marked(row: Row) -> list[Marked]:
    """Every token with what it is for. The first never trains: nothing stands before it."""
    return [
        (token, "trained" if i and label != IGNORE else "prompt")
        for i, (token, label) in enumerate(zip(row.ids, row.labels, strict=True))
    ]


def _aligned(row: Row, whole: Row) -> list[Marked]:
    """The tokens of the whole: those of the row, which is a stretch of it behind at most one first token, and
    those that were cut.
    """
    marked = _marked(row)
    for head in (0, 1):
        size = len(row.ids) - head
        for start in range(head, len(whole.ids) - size + 1):
            if _same(row, head, whole, start):
                before, after = whole.ids[head:start], whole.ids[start + size :]
                return [*marked[:head], *_cut(before), *marked[head:], *_cut(after)]
    return marked


def _same(row: Row, head: int, whole: Row, start: int) -> bool:
    """Whether the row goes on from ``head`` as the whole does from ``start``; a first label may be missing."""
    stop = start + len(row.ids) - head
    return (
        row.ids[head] == whole.ids[start]
        and row.ids[head:] == whole.ids[start:stop]
        and row.labels[head + 1 :] == whole.labels[start + 1 : stop]
    )


def _cut(ids: Sequence[int]) -> list[Marked]:
    return [(token, _CUT) for token in ids]


def _edges(tokenizer: PreTrainedTokenizerBase, marked: Sequence[Marked]) -> Iterator[Piece]:
    """All of a row, or its beginning and its end."""
    left_out = len(marked) - 2 * _EDGE
    if left_out <= 0:
        yield from _pieces(tokenizer, marked)
        return
    yield from _pieces(tokenizer, marked[:_EDGE])
    yield Piece(f"\n… {left_out} tokens more …\n", (), "gap", False)
    yield from _pieces(tokenizer, marked[-_EDGE:])


def _pieces(tokenizer: PreTrainedTokenizerBase, marked: Sequence[Marked]) -> Iterator[Piece]:
    """Tokens are decoded behind the piece before them, as many tokenizers write a blank only between words."""
    special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    ids = [token for token, _ in marked]
    before = begin = 0
    for i, (token, kind) in enumerate(marked):
        alone = token in special
        last = i + 1 == len(ids) or marked[i + 1][1] != kind or alone or ids[i + 1] in special
        text = _decode(tokenizer, ids[before : i + 1])
        if text.endswith(_REPLACEMENT) and not last:
            continue
        known = _decode(tokenizer, ids[before:begin])
        yield Piece(text[len(known) :], tuple(ids[begin : i + 1]), kind, alone)
        before, begin = begin, i + 1


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def visible(text: str) -> str:
    """The text with everything written out that would steer a terminal or hide on a page."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
