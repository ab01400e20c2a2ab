"""The numbers that betray bad data: what was lost, what repeats, what leaks, what is never trained."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lorakit.data.encode import Encoded
from lorakit.data.packing import best_fit, fill
from lorakit.data.sample import Message, Sample

_EXAMPLES = 5  # places named for each finding
_BARS = 12  # at most, in a histogram
_UNTRAINED_WARNING = 0.05  # share of rows without any loss that is worth a word


@dataclass(frozen=True)
class Bar:
    """Rows with ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Repeats:
    """Rows that repeat others: letter by letter, and when case, width and blanks do not count."""

    exact: int
    normalised: int
    examples: tuple[tuple[str, str], ...]  # place of the repetition, place of the first


@dataclass(frozen=True)
class Waterfall:
    """What became of the rows that were read; repeated rows are counted and kept."""

    read: int
    bad: int
    duplicate: int
    too_long: int  # dropped for their length, or because cutting them left nothing to learn
    untrained: int  # dropped as nothing in them carries loss, whatever their length
    kept: int

    def __str__(self) -> str:
        steps = (
            f"read {self.read}", f"bad {self.bad}", f"duplicate {self.duplicate} (kept)",
            f"too long {self.too_long}", f"without loss {self.untrained}", f"kept {self.kept}",
        )  # fmt: skip
        return " → ".join(steps)


@dataclass(frozen=True)
class Tokens:
    """Sizes of the encoded rows, as they are trained."""

    total: int
    trained: int
    lost: int
    lost_share: float
    truncated: int  # rows that lost a part
    split: int  # rows that became several
    longest: int
    median: float
    histogram: tuple[Bar, ...]  # of the whole rows, before anything is cut

    @property
    def masked_share(self) -> float:
        """Share of the tokens that carry no loss."""
        return 1 - self.trained / self.total if self.total else 1.0


@dataclass(frozen=True)
class Leakage:
    """Held-out rows that training sees, too."""

    held_out: int
    rows: Repeats
    prompts: Repeats


@dataclass(frozen=True)
class Batches:
    """How rows share a forward pass: padded to the longest of it, laid end to end, or packed into bins."""

    padded: bool
    bins: int | None  # with ``packing``
    fill: float | None  # the share of the bins' tokens that rows take
    refused: bool  # ``packing`` is wanted of a model whose rows would see each other

    def __str__(self) -> str:
        if self.bins:
            return f"{self.bins:,} bins, {self.fill:.1%} full; nothing is padded"
        if self.padded:
            return "each padded to its longest row"
        return "rows lie end to end, nothing is padded"


@dataclass(frozen=True)
class Survey:
    """The numbers of a data set."""

    waterfall: Waterfall
    tokens: Tokens
    duplicates: Repeats
    leakage: Leakage | None
    labels: dict[str, int]
    unseen_labels: tuple[str, ...]  # of held-out rows, never trained
    batches: Batches | None = None

    def lines(self) -> list[tuple[str, str]]:
        """The numbers as titled sentences."""
        tokens, leak = self.tokens, self.leakage
        masked = f"{tokens.trained:,} with loss ({tokens.masked_share:.1%} masked)"
        found = [
            ("rows", str(self.waterfall)),
            ("tokens", f"{tokens.total:,}, {masked}; longest row {tokens.longest:,}, median {tokens.median:g}"),
            ("too long", f"{tokens.truncated:,} rows cut, {tokens.split:,} split; {_lost(tokens)}"),
            ("duplicates", _times(self.duplicates)),
        ]
        if self.batches:
            found.append(("batches", str(self.batches)))
        if leak:
            shared = f"{_times(leak.rows)} trained, too; {_times(leak.prompts)} by their prompt"
            found.append(("held out", f"{leak.held_out:,} rows: {shared}"))
        if self.labels:
            rows = sum(self.labels.values())
            shares = (f"{name} {count} ({count / rows:.1%})" for name, count in self.labels.items())
            found.append(("labels", ", ".join(shares)))
        return found

    def warnings(self) -> list[str]:
        """What a person should look at before training, in sentences."""
        return [text for wanted, text in self._findings() if wanted]

    def _findings(self) -> Iterator[tuple[bool, str]]:
        fall, rows = self.waterfall, max(self.waterfall.read - self.waterfall.bad, 1)
        lost = (fall.too_long + fall.untrained) / rows
        yield lost > _UNTRAINED_WARNING, f"{lost:.1%} of the rows are not trained: nothing in them carries loss"
        yield self.tokens.lost > 0, f"{_lost(self.tokens)} to cutoff_len"
        repeats = self.duplicates
        yield repeats.normalised > 0, f"rows that repeat an earlier one: {_times(repeats)}{_at(repeats)}"
        if leak := self.leakage:
            found = leak.rows.normalised
            yield found > 0, f"held-out rows that are trained, too: {_times(leak.rows)}{_at(leak.rows)}"
            text = f"held-out rows whose prompt is trained, too: {_times(leak.prompts)}{_at(leak.prompts)}"
            yield leak.prompts.normalised > found, text
        yield bool(self.unseen_labels), f"held-out labels never trained: {', '.join(self.unseen_labels)}"
        refused = self.batches is not None and self.batches.refused
        yield refused, "packing: rows of this model cannot be kept from seeing each other; training refuses it"


def survey(
    encoded: Iterable[tuple[Sample, Encoded]],
    held_out: Sequence[Sample] = (),
    *,
    bad: int = 0,
    cutoff_len: int,
) -> Survey:
    """Count everything.

    Args:
        encoded: every row that could be read, and what became of it.
        held_out: the rows of the evaluation.
        bad: rows that were skipped in reading.
        cutoff_len: length in tokens above which a row is too long.
    """
    samples: list[Sample] = []
    lengths: list[int] = []
    total = trained = longest = lost = truncated = split = too_long = untrained = 0
    for sample, found in encoded:
        samples.append(sample)
        whole = [len(row.ids) for row in found.whole]
        sizes = [len(row.ids) for row in found.rows]
        over = max(whole, default=0) > cutoff_len
        lengths += whole
        total += sum(sizes)
        trained += sum(row.supervised for row in found.rows)
        longest = max(longest, *sizes, 0)
        truncated += found.truncated > 0
        split += found.split > 0
        too_long += not sizes and over
        untrained += not sizes and not over
        lost += max(sum(whole) - sum(sizes), 0) if over else 0
    duplicates = _repeats(samples, within=samples)
    return Survey(
        Waterfall(
            read=len(samples) + bad, bad=bad, duplicate=duplicates.exact, too_long=too_long,
            untrained=untrained, kept=len(samples) - too_long - untrained,
        ),
        Tokens(
            total=total, trained=trained, lost=lost, lost_share=lost / max(sum(lengths), 1),
            truncated=truncated, split=split, longest=longest,
            median=float(statistics.median(lengths)) if lengths else 0.0, histogram=histogram(lengths),
        ),
        duplicates,
        leakage(samples, held_out) if held_out else None,
        dict(Counter(s.label for s in samples if s.label is not None).most_common()),
        tuple(sorted({s.label for s in held_out if s.label} - {s.label for s in samples if s.label})),
    )  # fmt: skip


def leakage(trained: Sequence[Sample], held_out: Sequence[Sample]) -> Leakage:
    """Held-out rows whose whole text, or whose prompt, is among the trained ones."""
    return Leakage(
        len(held_out),
        _repeats(held_out, within=trained),
        _repeats([s for s in held_out if s.kind != "text"], within=trained, prompt_only=True),
    )


def batches(lengths: Sequence[int], *, can_pack: bool, capacity: int | None) -> Batches:
    """How rows of these lengths become batches.

    Args:
        lengths: of the rows as they are trained.
        can_pack: whether the model keeps rows that lie end to end apart.
        capacity: tokens of a bin, if rows are to be packed into bins.
    """
    if capacity is None or not can_pack or not lengths:
        return Batches(not can_pack, None, None, refused=capacity is not None and not can_pack)
    bins = best_fit(lengths, capacity)
    return Batches(False, len(bins), fill(lengths, bins, capacity), refused=False)


def histogram(lengths: Sequence[int]) -> tuple[Bar, ...]:
    """Counts over at most a dozen ranges of one round width, without gaps."""
    if not lengths:
        return ()
    low, high = min(lengths), max(lengths)
    width = next(
        step * 10**power
        for power in range(len(str(high)) + 1)
        for step in (1, 2, 5)
        if high // (step * 10**power) - low // (step * 10**power) < _BARS
    )
    counts = Counter(length // width for length in lengths)
    slots = range(low // width, high // width + 1)
    return tuple(Bar(slot * width, (slot + 1) * width - 1, counts[slot]) for slot in slots)


def _repeats(samples: Sequence[Sample], *, within: Sequence[Sample], prompt_only: bool = False) -> Repeats:
    """How many samples are among others; within themselves, every one but the first counts."""
    itself = samples is within
    counts: list[int] = []
    examples: list[tuple[str, str]] = []
    for normalised in (False, True):
        seen: dict[bytes, str] = {}
        if not itself:
            for sample in within:
                seen.setdefault(_digest(sample, normalised, prompt_only), sample.place)
        count = 0
        for sample in samples:
            digest = _digest(sample, normalised, prompt_only)
            if digest in seen:
                count += 1
                if normalised and len(examples) < _EXAMPLES:
                    examples.append((sample.place, seen[digest]))
            elif itself:
                seen[digest] = sample.place
        counts.append(count)
    return Repeats(counts[0], counts[1], tuple(examples))


def _digest(sample: Sample, normalised: bool, prompt_only: bool) -> bytes:
    messages = sample.prompt if prompt_only else sample.messages
    parts = [_comparable(message, normalised) for message in messages]
    text = json.dumps(parts, ensure_ascii=True, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _comparable(message: Message, normalised: bool) -> tuple[object, ...]:
    return (
        message.role,
        _normal(message.content) if normalised else message.content,
        [dict(call) for call in message.tool_calls],
    )


def _normal(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _times(repeats: Repeats) -> str:
    exactly = "" if repeats.exact == repeats.normalised else f" ({repeats.exact} of them exactly)"
    return f"{repeats.normalised}{exactly}"


def _lost(tokens: Tokens) -> str:
    return f"{tokens.lost:,} tokens ({tokens.lost_share:.1%}) are lost"


def _at(repeats: Repeats) -> str:
    return ", e.g. {} as {}".format(*repeats.examples[0]) if repeats.examples else ""
