from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import UsageError
from lorakit.report.curves import curve_svg
from lorakit.report.html import render, write_report
from lorakit.report.numbers import DASH, measures
from lorakit.report.record import EvalPoint, RunRecord

CONFIG = (
    "model_name_or_path: org/tiny  # c.yaml:1\nlora_rank: 8               # default\nlora_target: [q_proj]\n"
)
RUN: dict[str, Any] = {
    "lorakit": "0.1.0",
    "command": "lorakit train c.yaml",
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 412.7,
    "status": "finished",
    "model": {"name": "org/tiny", "kind": "hub"},
    "adapter": {
        "r": 8,
        "lora_alpha": 16,
        "scaling": 2.0,
        "targets": [{"name": "q_proj", "modules": 30, "shape": [576, 192], "parameters": 184320}],
        "trainable": 184320,
        "total": 134515008,
        "percent": 0.137,
    },
    "data": {
        "train": {
            "files": ["a.jsonl"],
            "rows": 1280,
            "tokens": 161234,
            "supervised_tokens": 60211,
            "longest": 240,
            "truncated": 0,
            "dropped": 3,
        },
        "eval": None,
    },
    "environment": {"platform": "Linux", "torch": "2.13.0"},
    "samples": [
        {"prompt": "p<1>", "reference": "good", "before": "<script>alert(1)</script>", "after": "good"},
        {"prompt": "q", "reference": None, "before": None, "after": "x" * 5000},
    ],
    "base_unchanged": True,
}


def train(step: int, **values: Any) -> dict[str, Any]:
    return {
        "event": "train",
        "step": step,
        "loss": 2.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "memory_gb": 1.9,
        **values,
    }


EVENTS = [
    {"event": "eval", "step": 0, "rows": 200, "loss": 2.9, "perplexity": 18.17, "exact_match": 0.005},
    *(train(step, tokens_per_second=400.0 + step) for step in range(1, 9)),
    {"event": "note", "text": "saved"},
    {"event": "eval", "step": 8, "rows": 200, "loss": 0.2, "perplexity": 1.22, "exact_match": 0.525},
]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", RUN, EVENTS)


def make_run(folder: Path, run: Any, events: list[dict[str, Any]], config: str = CONFIG) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    (folder / "config.resolved.yaml").write_text(config, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Tags, ids and addresses of a page; fails on tags that do not close."""

    VOID = frozenset({"meta", "br", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in {"src", "href", "xlink:href"}:
                self.links.append(str(value))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_record_is_typed(run_dir: Path) -> None:
    record = RunRecord.read(run_dir)
    assert record.info.adapter is not None
    assert record.info.adapter.targets[0].shape == (576, 192)
    assert record.info.data.train is not None
    assert (record.info.data.train.rows, record.info.data.eval) == (1280, None)
    assert record.settings == {"model_name_or_path": "org/tiny", "lora_rank": 8, "lora_target": ["q_proj"]}
    assert [point.step for point in record.train] == list(range(1, 9))
    assert record.before == EvalPoint(0, 200, 2.9, 18.17, 0.005, None)
    assert record.after is not None
    assert record.after.exact_match == 0.525


def test_only_the_model_is_needed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model": {"name": "m"}}')
    record = RunRecord.read(tmp_path)
    assert (record.train, record.evals, record.before, record.after) == ((), (), None, None)
    page = render(record)
    assert "This run was not evaluated on held-out rows." in page
    assert "<svg" not in page
    Page(page)


def test_a_resumed_run_counts_its_last_word(tmp_path: Path) -> None:
    events = [train(1), train(2), train(3, loss=9.0), train(2, loss=5.0), train(3, loss=4.0)]
    record = RunRecord.read(make_run(tmp_path / "r", RUN, events))
    assert [(point.step, point.loss) for point in record.train] == [(1, 2.0), (2, 5.0), (3, 4.0)]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not the directory of a run: it holds no run\.json"):
        write_report(tmp_path)
    with pytest.raises(UsageError):
        RunRecord.read(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("run", "events", "config", "reason"),
    [
        ({}, [], CONFIG, "model: Field required"),
        ([], [], CONFIG, "dictionary or an instance of RunInfo"),
        ({**RUN, "data": {"train": {"rows": "many"}}}, [], CONFIG, "data.train.rows: Input should be"),
        (RUN, [{"event": "train", "loss": 1}], CONFIG, "0.step: Field required"),
        (RUN, [], "a: [1", "while parsing a flow sequence"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, run: Any, events: Any, config: str, reason: str) -> None:
    with pytest.raises(UsageError, match="cannot read the run") as caught:
        RunRecord.read(make_run(tmp_path / "r", run, events, config))
    assert reason in caught.value.message


def test_page_is_one_small_valid_file(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 5  # held-out loss has two points only
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert path.stat().st_size < 200_000
    assert "prefers-color-scheme: dark" in text


def test_page_tells_the_run(run_dir: Path) -> None:
    text = render(RunRecord.read(run_dir))
    row = re.search(r"<td>Exact match</td>(.*)</tr>", text)
    assert row is not None
    assert re.findall(r">([^<]+)</td>", row[1]) == ["0.5%", "52.5%", "+52.0 points"]
    assert "Held-out rows: 200" in text
    assert "184,320 of 134,515,008 weights trained (0.14 %) on 1,280 rows in 8 steps, 6m53s in all." in text
    assert "lora_rank: 8               <i># default</i>" in text
    assert '<pre class="command">lorakit train c.yaml</pre>' in text
    assert '<td class="n">576 \N{MULTIPLICATION SIGN} 192</td>' in text
    assert '<div class="text right">good</div>' in text
    assert "x" * 4000 + " …" in text
    assert "their sha256 is the same before and after" in text


def test_hostile_text_stays_text(run_dir: Path) -> None:
    text = render(RunRecord.read(run_dir))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "p&lt;1&gt;" in text


def test_missing_and_nan_become_dashes(tmp_path: Path) -> None:
    events = [*(train(step, loss=float("nan"), grad_norm=None) for step in range(1, 9)), EVENTS[-1]]
    run = {**RUN, "base_unchanged": False, "data": {"train": {"rows": 5}}}
    text = render(RunRecord.read(make_run(tmp_path / "r", run, events)))
    assert "Training loss" not in text
    assert "Gradient norm" not in text
    assert "Learning rate" in text
    assert f"before {DASH}" in text
    assert "The base weights changed during the run." in text
    assert text.count(f'<td class="n">{DASH}</td>') >= 5
    assert "nan" not in text.lower().replace("finance", "")


def test_measures_know_which_way_is_better() -> None:
    found = {
        m.name: m for m in measures(EvalPoint(0, loss=1.0, field_f1=0.5), EvalPoint(9, loss=2.0, field_f1=0.75))
    }
    assert found["Loss"][1:] == ("1.000", "2.000", "+1.000", False)
    assert found["Field F1"][1:] == ("0.500", "0.750", "+0.250", True)
    assert set(found) == {"Loss", "Field F1"}
    infinite = measures(EvalPoint(0, perplexity=float("inf")), EvalPoint(9, perplexity=2.0))
    assert infinite[0][1:4] == (DASH, "2.00", DASH)


def test_curves_are_the_same_every_time_and_stay_small() -> None:
    steps = list(range(1, 20_001))
    losses = [3.0 / step for step in steps]
    picture = curve_svg(steps, losses, title='a "b" <c>', unit="loss & more", smooth=True)
    assert picture == curve_svg(steps, losses, title='a "b" <c>', unit="loss & more", smooth=True)
    assert len(picture) < 60_000
    assert picture.startswith('<svg role="img" aria-label=\'a "b" &lt;c&gt;\'')
    assert "loss &amp; more" in picture
    assert "var(--accent)" in picture
    assert "<metadata" not in picture
    with pytest.raises(ValueError, match="no finite values"):
        curve_svg([1.0], [float("nan")], title="t", unit="u")


def test_curves_leave_out_what_is_not_finite() -> None:
    args: dict[str, Any] = {"title": "t", "unit": "u", "smooth": True}
    assert curve_svg([1, 2, 3], [1.0, float("inf"), 2.0], **args) == curve_svg([1, 3], [1.0, 2.0], **args)
