"""Several data sets as one line of rows, and one line of rows as two: mixing and splitting.

Everything is drawn from the seed alone, so that the same files give the same order on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from lorakit.errors import DataError

T = TypeVar("T")
Source = Callable[[], Iterable[T]]
Strategy = Literal["concat", "interleave_under", "interleave_over"]

_END = object()


@dataclass(frozen=True)
class Mix:
    """How data sets are joined.

    Attributes:
        strategy: one after the other; taking turns until one is used up; or until all are, shorter ones anew.
        probabilities: of taking the next row from each data set; turns in fixed order if there are none.
    """

    strategy: Strategy = "concat"
    probabilities: tuple[float, ...] | None = None


def blend(sources: Sequence[Source[T]], mix: Mix, seed: int) -> Iterator[T]:
    """The rows of all sources in the order of the mix; a source is opened again when it starts anew.

    Raises:
        DataError: there is not one probability for each source.
    """
    if mix.probabilities is not None and len(mix.probabilities) != len(sources):
        raise DataError(
            f"{len(mix.probabilities)} probabilities for {len(sources)} data sets",
            remedy="interleave_probs takes one for each data set",
        )
    if mix.strategy == "concat":
        for source in sources:
            yield from source()
    elif mix.probabilities is None:
        yield from _take_turns([_Looped(source) for source in sources], over=mix.strategy == "interleave_over")
    else:
        yield from _draw([_Looped(source) for source in sources], mix, seed)


def split_rows(rows: Sequence[T], val_size: float, seed: int) -> tuple[list[T], list[T]]:
    """Rows to train on and rows held out, each in their order.

    Args:
        rows: all rows.
        val_size: share of the rows if below 1, else their number.
        seed: of the draw.

    Raises:
        DataError: one of the two parts is empty.
    """
    count = round(len(rows) * val_size) if val_size < 1 else int(val_size)
    if not 0 < count < len(rows):
        raise DataError(
            f"val_size {val_size:g} of {len(rows)} rows holds out {min(count, len(rows))}, "
            f"which leaves {'nothing to train on' if count else 'nothing to evaluate'}",
            remedy="choose another val_size",
        )
    held = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for number, row in enumerate(rows) if number not in held]
    return kept, [rows[number] for number in sorted(held)]


def draw(rows: Iterable[T], count: int, seed: int) -> list[T]:
    """``count`` random rows in their order; where there are fewer, all of them and random ones once more.

    No more than ``count`` rows are held at a time.
    """
    chance = random.Random(seed)
    kept: list[tuple[int, T]] = []
    for number, row in enumerate(rows):
        if len(kept) < count:
            kept.append((number, row))
        elif (place := chance.randrange(number + 1)) < count:
            kept[place] = (number, row)
    if not kept:
        return []
    again = chance.choices(kept, k=count - len(kept))
    return [row for _, row in sorted([*kept, *again], key=lambda pair: pair[0])]


class _Looped(Iterator[T]):
    """A source without end that knows when it has been through once."""

    def __init__(self, source: Source[T]) -> None:
        self._source = source
        self._rows = iter(source())
        self._next: T | object = next(self._rows, _END)
        self.used_up = False
        if self._next is _END:
            raise DataError("a data set without rows cannot be interleaved")

    def __next__(self) -> T:
        if self._next is _END:
            self._rows = iter(self._source())
            self._next = next(self._rows, _END)
        row, self._next = self._next, next(self._rows, _END)
        self.used_up = self.used_up or self._next is _END
        return row  # type: ignore[return-value]


def _take_turns(loops: Sequence[_Looped[T]], *, over: bool) -> Iterator[T]:
    """Whole rounds, one row of each source, as far as the shortest (or, with ``over``, the longest) goes."""
    done = all if over else any
    while True:
        for loop in loops:
            yield next(loop)
        if done(loop.used_up for loop in loops):
            return


def _draw(loops: Sequence[_Looped[T]], mix: Mix, seed: int) -> Iterator[T]:
    assert mix.probabilities is not None
    chance = random.Random(seed)
    done = all if mix.strategy == "interleave_over" else any
    drawn = [loop for loop, share in zip(loops, mix.probabilities, strict=True) if share > 0]
    while not done(loop.used_up for loop in drawn):
        yield next(chance.choices(loops, mix.probabilities)[0])
