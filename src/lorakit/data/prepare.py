"""Samples → rows on disk: encoded by several processes, in memory that does not grow with their number."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.cache import cached, describe_tokenizer
from lorakit.data.encode import DataSummary, Row, encode_batch
from lorakit.data.pool import chunks, cores, in_order
from lorakit.data.probe import check_template
from lorakit.data.rendering import Policy
from lorakit.data.sample import Sample
from lorakit.data.store import StoredRows, to_batch
from lorakit.data.templates import Template

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

_PART = 1000  # samples that a process takes at a time


@dataclass(frozen=True)
class Encoder:
    """All that decides which rows a sample becomes."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    policy: Policy

    def encode(self, samples: list[Sample]) -> tuple[pyarrow.RecordBatch, DataSummary]:
        """The rows of some samples, and what became of them."""
        encoded = encode_batch(self.tokenizer, samples, self.policy, self.template)
        rows: list[Row] = [row for one in encoded for row in one.rows]
        return to_batch(rows), DataSummary().add(encoded)

    def describe(self) -> dict[str, Any]:
        """The same as values for a fingerprint."""
        template = {**asdict(self.template), "variables": dict(self.template.variables)}
        dated = "strftime_now" in f"{self.template.source}{self.template.tool_source}"
        return {
            "today": str(datetime.date.today()) if dated else None,  # the template writes it
            "tokenizer": describe_tokenizer(self.tokenizer),
            "template": template,
            "policy": asdict(self.policy),
        }


@dataclass(frozen=True)
class CacheUse:
    """Where rows are kept (None: lorakit's cache), whether they are made anew, by how many processes."""

    folder: Path | None = None
    overwrite: bool = False
    workers: int | None = None  # None: one a core


@dataclass(frozen=True)
class Prepared:
    """Encoded rows and what is known of them.

    Attributes:
        rows: on disk.
        data: what became of the samples.
        system: the system message that all samples share, so that generation can use the same one.
        facts: what ``facts`` of `prepare` told when they were made.
        fresh: whether that was now.
    """

    rows: StoredRows
    data: DataSummary
    system: str | None
    facts: Mapping[str, Any]
    fresh: bool


def prepare(
    encoder: Encoder,
    samples: Iterable[Sample],
    depends_on: Mapping[str, Any],
    use: CacheUse,
    *,
    facts: Callable[[], Mapping[str, Any]] = dict,
    advance: Callable[[int, int], None] = lambda rows, tokens: None,
) -> Prepared:
    """The samples' rows, out of the cache if they are there: then ``samples`` is not touched at all.

    Args:
        encoder: makes the rows.
        samples: read once, a part at a time.
        depends_on: what the samples depend on, as JSON values: the content of their files, the way of reading.
        use: of the cache.
        facts: asked after the last sample for what else to keep (JSON).
        advance: told after every part how many rows and tokens there are so far.

    Raises:
        DataError: a sample cannot be encoded, or no row is left.
    """

    def build(write: Callable[[pyarrow.RecordBatch], None]) -> Mapping[str, Any]:
        systems: set[str | None] = set()
        summary = DataSummary()
        parts = chunks(_looked_at(samples, encoder, systems), _PART)
        for batch, part in in_order(encoder.encode, parts, use.workers or cores()):
            write(batch)
            summary = total(summary, part)
            advance(summary.rows, summary.tokens)
        summary.check(encoder.policy.cutoff_len)
        system = systems.pop() if len(systems) == 1 else None
        return {"data": asdict(summary), "system": system, "facts": dict(facts())}

    parts = {**encoder.describe(), **depends_on}
    found = cached(parts, build, folder=use.folder, overwrite=use.overwrite)
    kept = found.facts
    return Prepared(found.rows, DataSummary(**kept["data"]), kept["system"], kept["facts"], found.fresh)


def total(one: DataSummary, other: DataSummary) -> DataSummary:
    """What became of the samples of both."""
    counts = {
        field.name: (max if field.name == "longest" else int.__add__)(
            asdict(one)[field.name], asdict(other)[field.name]
        )
        for field in fields(DataSummary)
    }
    return DataSummary(**counts)


def _looked_at(samples: Iterable[Sample], encoder: Encoder, systems: set[str | None]) -> Iterator[Sample]:
    """The samples; the first one to be rendered has the template checked, and system messages are collected."""
    checked = False
    for sample in samples:
        if sample.kind == "chat" and not checked:
            check_template(encoder.tokenizer, encoder.template)
            checked = True
        if len(systems) < 2:
            systems.add(sample.system)
        yield sample
