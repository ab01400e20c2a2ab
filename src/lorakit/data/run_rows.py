"""The rows that a run trains on, encoded once and kept in the cache, and the samples that it holds out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorakit.config.resolve import Resolved
from lorakit.data.cache import describe_files
from lorakit.data.configured import data_sets, held_out_samples, training_stream
from lorakit.data.mix import split_rows
from lorakit.data.prepare import CacheUse, Encoder, Prepared, prepare
from lorakit.data.reading import DataSet
from lorakit.data.sample import Sample
from lorakit.data.sources import REGISTRY
from lorakit.log import logger

_SILENCE = 10.0  # seconds between two lines about the progress


@dataclass(frozen=True)
class RunRows:
    """Rows to train on, and samples to evaluate with."""

    training: Prepared
    held_out: list[Sample]


def run_rows(settings: Resolved, encoder: Encoder, poll: Callable[[], None] = lambda: None) -> RunRows:
    """Read and encode what the configuration names. Files whose rows are in the cache are not parsed again.

    ``poll`` is called after every part; what it raises leaves no half-written cache.

    Raises:
        DataError: naming the file, the row and the rule it breaks.
    """
    sets = data_sets(settings, settings.dataset)
    stream = training_stream(settings, sets)
    samples: Iterable[Sample] = stream
    held_out: list[Sample] = []
    count: int | None = None
    if settings.val_size:
        samples, held_out = split_rows(list(stream), settings.val_size, settings.seed)
        count = len(samples)
    else:
        held_out = held_out_samples(settings)
    use = CacheUse(
        folder=Path(settings.tokenized_path) if settings.tokenized_path else None,
        # What the hub holds today is not known before it is read.
        overwrite=settings.overwrite_cache or any(data.hub for data in sets),
        workers=settings.preprocessing_num_workers,
    )
    with _Display(count) as display:

        def advance(rows: int, tokens: int) -> None:
            display.advance(rows, tokens)
            poll()

        training = prepare(
            encoder,
            samples,
            _description(settings, sets),
            use,
            facts=lambda: asdict(stream.counts),
            advance=advance,
        )
    if not training.fresh:
        logger.info("%d encoded rows are in the cache", training.data.rows)
    return RunRows(training, held_out)


def _description(settings: Resolved, sets: list[DataSet]) -> dict[str, Any]:
    """All that the samples depend on: files by content, and the settings that choose, skip, mix and split."""
    registry = Path(settings.dataset_dir) / REGISTRY
    keys = ("max_samples", "on_bad_row", "max_bad_rows", "mix_strategy", "interleave_probs", "val_size")
    values = dict(settings)
    drawn = settings.val_size or settings.interleave_probs or any(data.num_samples for data in sets)
    return {
        "sets": [
            {
                "files": describe_files(data.files),
                "suffixes": [file.suffixes for file in data.files],
                "hub": asdict(data.hub) if data.hub else None,
                "registry": [data.name, *describe_files([registry])] if data.format else None,
            }
            for data in sets
        ],
        **{key: values[key] for key in keys},
        "seed": settings.seed if drawn else None,
    }


class _Display:
    """Rows done so far: a bar on a terminal, now and then a line in the log elsewhere.

    The bar redraws itself when it is told to and has no thread: processes are forked while it is there.
    """

    def __init__(self, count: int | None) -> None:
        self._bar: Progress | None = None
        if sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in {"dumb", "unknown"}:
            columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
            self._task = self._bar.add_task("", total=count, start=False)
        self._said = time.monotonic()

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, rows: int, tokens: int) -> None:
        """So many rows and tokens are done."""
        if self._bar:
            if rows and not self._bar.tasks[0].started:
                self._bar.start()
                self._bar.start_task(self._task)
            self._bar.update(self._task, completed=rows, refresh=True)
        elif time.monotonic() - self._said >= _SILENCE:
            self._said = time.monotonic()
            logger.info("encoded %d rows, %d tokens", rows, tokens)
