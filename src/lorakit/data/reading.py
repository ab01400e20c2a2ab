"""The door of the data: names of files, folders, registry entries and hub data sets in, samples out.

Rows pass one at a time. A bad one stops the reading, or is counted and skipped up to a ceiling.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lorakit.data.dataset_info import find_entry
from lorakit.data.formats.common import Format
from lorakit.data.formats.recognise import recognise
from lorakit.data.hub import HubSet, hub_rows, is_hub_id
from lorakit.data.mix import Mix, blend, draw
from lorakit.data.raw import RawRow
from lorakit.data.sample import Sample
from lorakit.data.sources import REGISTRY, find_files, kind_of, raw_rows
from lorakit.errors import DataError
from lorakit.log import logger

OnBadRow = Literal["error", "skip"]

_SNIPPET = 80
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class DataSet:
    """One name of ``dataset``: its files or hub data set, its format if that is told, rows to draw from it."""

    name: str
    files: tuple[Path, ...] = ()
    hub: HubSet | None = None
    format: Format | None = None
    num_samples: int | None = None


@dataclass
class Counts:
    """What has been read so far: rows seen, bad ones skipped, rows by format, the first of what was wrong."""

    read: int = 0
    bad: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """All samples and what became of the rows.

    Attributes:
        samples: in the order of the mix.
        read: rows seen.
        bad: rows skipped by ``on_bad_row: skip``.
        formats: recognised format to its rows.
        files: the files that were read, for a fingerprint.
        problems: what was wrong with the first of the bad rows.
    """

    samples: list[Sample]
    read: int
    bad: int
    formats: dict[str, int]
    files: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()


def find_sets(
    names: Sequence[str | Path], *, dataset_dir: Path | None = None, streaming: bool = False
) -> list[DataSet]:
    """What each name means: an entry of ``dataset_info.json`` first, then a path, then a hub data set.

    Raises:
        DataError: there is nothing of this name.
    """
    return [_find(str(name), dataset_dir, streaming) for name in names]


def read_samples(
    paths: Sequence[str | Path],
    *,
    dataset_dir: Path | None = None,
    max_samples: int | None = None,
    on_bad_row: OnBadRow = "error",
    max_bad_rows: float = 0.05,
    mix: Mix | None = None,
    seed: int = 42,
    streaming: bool = False,
) -> Reading:
    """Every row behind the names as a sample.

    Args:
        paths: files, folders, patterns, registry entries, hub data sets.
        dataset_dir: the folder with ``dataset_info.json``.
        max_samples: keep only this many rows of each data set, from its start.
        on_bad_row: stop at a bad row, or skip it.
        max_bad_rows: the share of a data set's rows that may be skipped.
        mix: how several data sets are joined; one after the other if left out.
        seed: of every draw.
        streaming: fetch the rows of hub data sets as they are needed.

    Raises:
        DataError: naming the file, the row and the rule it breaks.
    """
    sets = find_sets(paths, dataset_dir=dataset_dir, streaming=streaming)
    stream = SampleStream(sets, max_samples, on_bad_row, max_bad_rows, mix or Mix(), seed)
    samples = list(stream)
    seen = stream.counts
    files = tuple(file for data in sets for file in data.files)
    return Reading(samples, seen.read, seen.bad, seen.formats, files, tuple(seen.problems))


class SampleStream:
    """The samples of data sets, one at a time; ``counts`` grows as they pass, each row counted once."""

    def __init__(
        self,
        sets: Sequence[DataSet],
        max_samples: int | None = None,
        on_bad_row: OnBadRow = "error",
        max_bad_rows: float = 0.05,
        mix: Mix | None = None,
        seed: int = 42,
    ) -> None:
        self._sets = sets
        self._max_samples = max_samples
        self._skip = on_bad_row == "skip"
        self._ceiling = max_bad_rows
        self._mix = mix or Mix()
        self._seed = seed
        self._own: dict[int, Counts] = {}

    @property
    def counts(self) -> Counts:
        """What was read so far in all data sets."""
        total = Counts()
        for own in self._own.values():
            total.read += own.read
            total.bad += own.bad
            total.problems += own.problems
            for name, rows in own.formats.items():
                total.formats[name] = total.formats.get(name, 0) + rows
        return total

    def __iter__(self) -> Iterator[Sample]:
        self._own.clear()
        return blend([partial(self._rows, n, data) for n, data in enumerate(self._sets)], self._mix, self._seed)

    def _rows(self, number: int, data: DataSet) -> Iterator[Sample]:
        """One pass over a data set; only the first is counted and logged."""
        first = number not in self._own
        own = Counts()
        self._own.setdefault(number, own)
        samples: Iterator[Sample] = self._converted(data, own, quiet=not first)
        if data.num_samples is not None:
            samples = iter(draw(samples, data.num_samples, self._seed))
        yield from islice(samples, self._max_samples)
        self._check(data, own)
        if own.bad and first:
            logger.warning("%s: skipped %d of %d rows, which are bad", data.name, own.bad, own.read)

    def _converted(self, data: DataSet, own: Counts, *, quiet: bool) -> Iterator[Sample]:
        sources = [(str(file), raw_rows(file)) for file in data.files]
        sources += [(data.hub.name, hub_rows(data.hub))] if data.hub else []
        for source, rows in sources:
            known = data.format
            for row in rows:
                own.read += 1
                try:
                    if known is None:
                        known = recognise(_value(row), row.place)
                        if not quiet:
                            logger.info("%s: rows in the format %s", source, known.name)
                    sample = known.sample(_value(row), row.place)
                except DataError as error:
                    told = _located(error, row)
                    if not self._skip:
                        raise told from error
                    own.bad += 1
                    if len(own.problems) < _SHOWN_PROBLEMS:
                        own.problems.append(str(told))
                else:
                    own.formats[known.name] = own.formats.get(known.name, 0) + 1
                    yield sample

    def _check(self, data: DataSet, seen: Counts) -> None:
        if seen.bad > self._ceiling * seen.read:
            raise DataError(
                f"{seen.bad} of {seen.read} rows are bad, more than max_bad_rows ({self._ceiling:.1%}) allows; "
                f"the first: {seen.problems[0]}",
                place=data.name,
                remedy="mend the rows or raise max_bad_rows",
            )


def _find(name: str, folder: Path | None, streaming: bool) -> DataSet:
    inside = _name_in(name, folder)
    entry = find_entry(folder, inside) if folder is not None and inside is not None else None
    if entry is not None:
        files = tuple(find_files(entry.files)) if entry.files else ()
        hub = replace(entry.hub, streaming=streaming) if entry.hub else None
        logger.info("%s: rows in the format %s, as %s says", name, entry.format.name, REGISTRY)
        return DataSet(name, files, hub, entry.format, entry.num_samples)
    path = Path(name)
    if folder is not None and not path.exists():
        path = folder / path
    if not path.exists() and is_hub_id(name) and kind_of(path) is None:
        return DataSet(name, hub=HubSet(name, streaming=streaming))
    return DataSet(name, tuple(find_files(path)))


def _name_in(name: str, folder: Path | None) -> str | None:
    """The name as a registry of this folder has it: a configuration makes it a path inside of the folder."""
    if folder is None:
        return None
    path = Path(name)
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else name


def _value(row: RawRow) -> dict[str, Any]:
    if row.problem is not None:
        raise DataError(row.problem, place=row.place)
    if not isinstance(row.value, dict):
        raise DataError(f"a row must be a JSON object, not {type(row.value).__name__}", place=row.place)
    return row.value


def _located(error: DataError, row: RawRow) -> DataError:
    """The error with the byte where the row begins, and the start of the row."""
    place = row.place if row.offset is None else f"{row.place} (byte {row.offset})"
    message = error.message if row.problem else f"{error.message}, in {_snippet(row.value)}"
    return DataError(message, place=place, remedy=error.remedy)


def _snippet(value: object) -> str:
    """The start of a row as JSON on one line, each text of it cut short."""
    if isinstance(value, dict):
        value = {str(key)[:_SNIPPET]: _short(part) for key, part in islice(value.items(), _SNIPPET)}
    text = json.dumps(_short(value), ensure_ascii=False, default=lambda part: type(part).__name__)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SNIPPET else text[:_SNIPPET] + "…"


def _short(value: object) -> object:
    if isinstance(value, str | bytes):
        return value[:_SNIPPET] if isinstance(value, str) else "bytes"
    return value[:3] if isinstance(value, list) else value
