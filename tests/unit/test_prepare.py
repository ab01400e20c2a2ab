"""Samples to stored rows: the same bytes whatever the number of processes, the facts kept with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorakit.data import prepare as module
from lorakit.data.encode import DataSummary, encode_all
from lorakit.data.prepare import CacheUse, Encoder, prepare, total
from lorakit.data.rendering import Policy
from lorakit.data.sample import Message, Sample
from lorakit.data.templates import Template, find_template
from lorakit.errors import DataError


@pytest.fixture
def encoder(tiny_llama: Path) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return Encoder(tokenizer, find_template(tokenizer), Policy(64))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 7)


def samples(count: int, system: str = "Count.") -> list[Sample]:
    first = Message("system", system)
    return [
        Sample((first, Message("user", "x" * (n % 90)), Message("assistant", f"It is {n}.")), f"rows:{n}")
        for n in range(1, count + 1)
    ]


def untouched() -> Iterator[Sample]:
    raise AssertionError("the samples were read again")
    yield


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_processes_changes_nothing(encoder: Encoder, workers: int, tmp_path: Path) -> None:
    found = prepare(encoder, iter(samples(100)), {}, CacheUse(tmp_path, workers=workers))
    rows, summary = encode_all(encoder.tokenizer, samples(100), encoder.policy, encoder.template)
    assert list(found.rows) == rows
    assert found.data == summary
    assert summary.truncated > 0
    prepare(encoder, iter(samples(100)), {}, CacheUse(tmp_path / "one", workers=1))
    (mine,), (other,) = tmp_path.glob("*/rows.arrow"), (tmp_path / "one").glob("*/rows.arrow")
    assert mine.read_bytes() == other.read_bytes()


def test_what_is_in_the_cache_is_not_read_again(encoder: Encoder, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    first = prepare(
        encoder, samples(20), {"file": "a"}, CacheUse(tmp_path), facts=lambda: {"bad": 3},
        advance=lambda rows, tokens: told.append((rows, tokens)),
    )  # fmt: skip
    again = prepare(encoder, untouched(), {"file": "a"}, CacheUse(tmp_path))
    assert (first.fresh, again.fresh) == (True, False)
    assert again.data == first.data
    assert again.facts == first.facts == {"bad": 3}
    assert again.system == first.system == "Count."
    assert told[-1] == (20, first.data.tokens) and [rows for rows, _ in told] == [7, 14, 20]


def test_a_system_message_counts_only_if_all_have_it(encoder: Encoder, tmp_path: Path) -> None:
    mixed = [*samples(3), *samples(3, system="Think.")]
    assert prepare(encoder, mixed, {}, CacheUse(tmp_path)).system is None


@pytest.mark.parametrize("change", ["file", "policy", "template", "tokenizer"])
def test_whatever_the_rows_depend_on_makes_them_anew(encoder: Encoder, change: str, tmp_path: Path) -> None:
    prepare(encoder, samples(5), {"file": "a"}, CacheUse(tmp_path))
    if change == "tokenizer":
        encoder.tokenizer.add_tokens(["It is"])
    policy = Policy(63) if change == "policy" else encoder.policy
    template = find_template(encoder.tokenizer, "chatml" if change == "template" else "auto")
    other = Encoder(encoder.tokenizer, template, policy)
    assert prepare(other, samples(5), {"file": "b" if change == "file" else "a"}, CacheUse(tmp_path)).fresh


def test_a_template_that_writes_the_date_is_good_for_a_day(encoder: Encoder) -> None:
    dated = Template("auto", "{{ strftime_now('%d') }}" + encoder.template.source)
    assert Encoder(encoder.tokenizer, dated, encoder.policy).describe()["today"]
    assert encoder.describe()["today"] is None


def test_a_broken_template_is_told_before_anything_is_encoded(encoder: Encoder, tmp_path: Path) -> None:
    silent = Template("auto", "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(DataError, match="leaves the assistant's words out"):
        prepare(Encoder(encoder.tokenizer, silent, encoder.policy), samples(50), {}, CacheUse(tmp_path))


@pytest.mark.parametrize("rows", [[], [Sample((Message("assistant", "a", train=False),), "x", kind="text")]])
def test_no_row_at_all(encoder: Encoder, rows: list[Sample], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left"):
        prepare(encoder, rows, {}, CacheUse(tmp_path))


def test_summaries_add_up(encoder: Encoder) -> None:
    parts = [samples(50)[:20], samples(50)[20:]]
    one, other = (encode_all(encoder.tokenizer, part, encoder.policy, encoder.template)[1] for part in parts)
    whole = encode_all(encoder.tokenizer, samples(50), encoder.policy, encoder.template)[1]
    assert total(one, other) == total(other, one) == whole
    assert total(DataSummary(), whole) == whole
