"""How many rows there are and about how long they are, told before a model is there. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.data.reading import SampleStream, find_sets
from lorakit.data.sample import Sample

_COUNTED = 1000  # rows whose tokens are counted; the rest by their bytes
_BYTES_A_TOKEN = 3.0  # without a tokenizer: English has more, many languages fewer
_TOKENS_A_TURN = 8  # what a template writes around a message


@dataclass(frozen=True)
class Estimate:
    """Rows and their tokens.

    Attributes:
        rows: how many there are.
        longest: tokens of the longest one.
        most: tokens that 99 rows in 100 do not exceed.
        mean: tokens on average.
        counted: a tokenizer counted those of the first rows; else all are taken from bytes.
    """

    rows: int
    longest: int
    most: int
    mean: float
    counted: bool


def estimate(names: Sequence[str | Path], tokenizer: Path | None = None) -> Estimate:
    """Read every row behind the names.

    Args:
        names: files, folders or patterns, as the key ``dataset`` takes them.
        tokenizer: the model's ``tokenizer.json``, if it is here.

    Raises:
        DataError: there is no such file, or a row in it is bad.
    """
    count = _counter(tokenizer) if tokenizer else None
    sizes: list[int] = []
    turns: list[int] = []
    counted_bytes = counted_tokens = 0
    for number, sample in enumerate(SampleStream(find_sets(names))):
        text = _text(sample)
        sizes.append(len(text.encode("utf-8", "replace")))
        turns.append(len(sample.messages))
        if count and number < _COUNTED:
            counted_bytes += sizes[-1]
            counted_tokens += count(text)
    each = counted_bytes / counted_tokens if counted_tokens else _BYTES_A_TOKEN
    tokens = sorted(round(size / each) + _TOKENS_A_TURN * turn for size, turn in zip(sizes, turns, strict=True))
    most = tokens[-(-99 * len(tokens) // 100) - 1]
    return Estimate(len(tokens), tokens[-1], most, sum(tokens) / len(tokens), count is not None)


def _text(sample: Sample) -> str:
    parts = [f"{m.content}{m.thinking or ''}{m.tool_calls or ''}" for m in sample.messages]
    return "\n".join([*parts, *map(str, sample.tools)])


def _counter(path: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(path))
    return lambda text: len(made.encode(text, add_special_tokens=False).ids)
