"""Numbers for texts: exact match and field scores. Pure functions, no model, no torch.

JSON objects are compared by value: key order and spacing do not count, ``1`` and ``true`` differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FieldScores:
    """Micro-averaged scores over (key, value) pairs."""

    precision: float
    recall: float
    f1: float


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows whose stripped texts are equal, or are equal as JSON objects."""
    _check(predictions, references)
    return sum(map(_same, predictions, references)) / len(references)


def field_scores(predictions: Sequence[str], references: Sequence[str]) -> FieldScores | None:
    """Precision, recall and F1 over the fields of JSON objects; None unless every reference is one.

    A prediction that is no JSON object counts as one without fields.
    """
    _check(predictions, references)
    expected = [fields for reference in references if (fields := _fields(reference)) is not None]
    if len(expected) < len(references):
        return None
    found = [_fields(prediction) or frozenset() for prediction in predictions]
    hits = sum(len(one & other) for one, other in zip(found, expected, strict=True))
    precision = _share(hits, sum(map(len, found)))
    recall = _share(hits, sum(map(len, expected)))
    return FieldScores(precision, recall, _share(2 * precision * recall, precision + recall))


def perplexity(mean_loss: float) -> float:
    """``exp(mean_loss)``; infinite where a float cannot hold it."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if not references:
        raise ValueError("no rows to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")


def _same(prediction: str, reference: str) -> bool:
    if prediction.strip() == reference.strip():
        return True
    expected = _fields(reference)
    return expected is not None and _fields(prediction) == expected


def _fields(text: str) -> frozenset[tuple[str, str]] | None:
    """The (key, value) pairs of a JSON object, values in one canonical spelling; None for other texts."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            return None
        return frozenset((key, json.dumps(item, sort_keys=True)) for key, item in value.items())
    except (ValueError, RecursionError):  # a model may write brackets nested without end
        return None


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
