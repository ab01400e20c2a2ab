from __future__ import annotations

import io
import os
import re
import sys

import pytest

from lorakit.report import display
from lorakit.report.display import LiveDisplay, PlainDisplay, make_display
from lorakit.report.numbers import DASH, blend, duration

ENTRY = {
    "event": "train",
    "step": 20,
    "steps": 160,
    "loss": 1.2341,
    "learning_rate": 1e-3,
    "grad_norm": 0.812,
    "tokens_per_second": 411.7,
    "memory_gb": 1.93,
    "seconds": 31.2,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that displays see: its last element."""
    times = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: times[-1])
    return times


@pytest.fixture(autouse=True)
def terminal_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_plain_line_is_pinned(clock: list[float]) -> None:
    stream = io.StringIO()
    with make_display(160, stream) as shown:
        for step in range(1, 21):
            clock.append(step * 130 / 140)
            shown.advance(step, 1.0)
        shown.log(ENTRY)
        shown.note("saved checkpoint-20")
    line = "step 20/160  loss 1.234  lr 1.0e-03  grad 0.81  412 tok/s  1.9 GB  eta 2m10s"
    assert stream.getvalue() == f"{line}\nsaved checkpoint-20\n"


def test_what_is_not_known_is_left_out(clock: list[float]) -> None:
    stream = io.StringIO()
    with make_display(4, stream) as shown:
        shown.advance(1, 2.0)
        shown.log({"step": 1, "loss": float("nan"), "grad_norm": None})
    assert stream.getvalue() == "step 1/4  loss nan\n"


def test_pace_of_no_time_and_of_a_resumed_run(clock: list[float]) -> None:
    pace = display._Pace(200)
    pace.mark(150)
    assert pace.remaining() is None
    pace.mark(150)
    assert pace.remaining() is None
    pace.mark(151)
    assert pace.remaining() == 0.0  # no time has passed
    clock.append(4.0)
    pace.mark(152)
    assert pace.remaining() == pytest.approx(2.0 * 48)


def test_choice_of_display(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_display(1, io.StringIO()), PlainDisplay)
    assert isinstance(make_display(1, Terminal()), LiveDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(1, Terminal()), PlainDisplay)


def test_live_bar_shows_numbers_and_notes(clock: list[float]) -> None:
    stream = Terminal()
    with make_display(160, stream) as shown:
        shown.advance(19, 1.0)
        clock.append(1.0)
        shown.advance(20, 2.0)
        shown.log(ENTRY)
        shown.note("[bold]kept[/bold] as it is")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "20/160  eta 2m20s" in text
    assert "loss 1.200  lr 1.0e-03  grad 0.81  412 tok/s  1.9 GB" in text
    assert "[bold]kept[/bold] as it is\n" in text


def test_no_color_keeps_the_bar_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with make_display(2, stream) as shown:
        shown.advance(1, 1.0)
    assert "1/2" in stream.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", stream.getvalue())


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_stream_costs_nothing_but_the_line(terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    with make_display(2, stream) as shown:
        shown.advance(1, 1.0)
        stream.close()
        shown.log(ENTRY)
        shown.note("unheard")


def test_a_broken_pipe_costs_nothing_but_the_line() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = io.TextIOWrapper(io.FileIO(writer, "w"), encoding="utf-8", write_through=True)
    with make_display(2, stream) as shown:
        shown.log(ENTRY)
        shown.note("unheard")
    stream.detach().close()


def test_a_console_that_cannot_spell_gets_question_marks() -> None:
    raw = io.BytesIO()
    with make_display(2, io.TextIOWrapper(raw, encoding="cp1252")) as shown:
        shown.note("Zürich 東京 \ud800")
        assert raw.getvalue().decode("cp1252").splitlines() == ["Zürich ?? ?"]


def test_stderr_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with make_display(2) as shown:
        shown.note("here")
    assert capsys.readouterr() == ("", "here\n")
    assert sys.stderr is not None


def test_durations_and_smoothing() -> None:
    assert [duration(seconds) for seconds in (0, 42.4, 59.6, 130, 11_100, None, float("inf"))] == [
        "0s",
        "42s",
        "1m00s",
        "2m10s",
        "3h05m",
        DASH,
        DASH,
    ]
    assert blend(None, 2.0) == 2.0
    assert blend(2.0, 1.0) == pytest.approx(1.8)
    assert blend(2.0, float("nan")) == 2.0
    assert blend(float("nan"), 3.0) == 3.0
