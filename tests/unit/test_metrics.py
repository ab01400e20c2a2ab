from __future__ import annotations

import math

import pytest

from lorakit.evals.metrics import FieldScores, exact_match, field_scores, perplexity


def test_exact_match_strips_but_keeps_case() -> None:
    assert exact_match([" yes\n", "Yes", "no"], ["yes", "yes", "no"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "same"),
    [
        ('{"b":2,"a":{"y":1,"x":[1,2]}}', True),
        ('{"a": 0, "a": {"x": [1, 2], "y": 1}, "b": 2}', True),  # the last of two equal keys wins
        ('{"a": {"x": [2, 1], "y": 1}, "b": 2}', False),
        ('{"a": {"x": [1, 2], "y": 1}, "b": true}', False),
        ('{"a": {"x": [1, 2], "y": 1}, "b": 2, "c": 3}', False),
        ('{"a": {"x": [1, 2], "y": 1}, "b": 2', False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_json_objects_match_by_value(prediction: str, same: bool) -> None:
    assert exact_match([prediction], ['{"a": {"x": [1, 2], "y": 1}, "b": 2}']) == float(same)


def test_one_is_not_true_in_json() -> None:
    assert exact_match(['{"a": true}'], ['{"a": 1}']) == 0.0


def test_json_that_is_no_object_is_compared_as_text() -> None:
    assert exact_match(["[1,2]"], ["[1, 2]"]) == 0.0


def test_field_scores_by_hand() -> None:
    references = ['{"city": "Rome", "zip": "1"}', '{"city": "Oslo", "zip": "2"}']
    predictions = ['{"zip": "1", "city": "Roma", "state": "IT"}', '{"city": "Oslo"}']
    # found 4 pairs, expected 4, agreeing: zip=1 and city=Oslo
    assert field_scores(predictions, references) == FieldScores(0.5, 0.5, 0.5)
    # the second is no JSON: 3 found, 1 agrees; F1 = 2 * 1/3 * 1/4 / (7/12) = 2/7
    scores = field_scores([predictions[0], "Oslo"], references)
    assert scores is not None
    assert (scores.precision, scores.recall) == (pytest.approx(1 / 3), 1 / 4)
    assert scores.f1 == pytest.approx(2 / 7)


def test_field_scores_need_objects_as_references() -> None:
    assert field_scores(["{}", "{}"], ['{"a": 1}', "text"]) is None
    assert field_scores(["nothing"], ['{"a": 1}']) == FieldScores(0.0, 0.0, 0.0)


@pytest.mark.parametrize("score", [exact_match, field_scores])
def test_rows_must_be_there_and_in_pairs(score) -> None:
    with pytest.raises(ValueError, match="no rows to score"):
        score([], [])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        score(["a"], ["a", "b"])


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
