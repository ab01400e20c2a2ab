"""What the preview says of rows is what was encoded, and what it counts is there."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorakit.data.encode import Encoded, Row
from lorakit.data.preview import ShownRow, show, visible
from lorakit.data.sample import Message, Sample
from lorakit.data.survey import batches, histogram, leakage, survey
from lorakit.ops.loss import IGNORE
from lorakit.report.preview import render_preview


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def sample(prompt: str, answer: str, place: str = "rows.jsonl:1", label: str | None = None) -> Sample:
    return Sample((Message("user", prompt), Message("assistant", answer)), place, label=label)


def row_of(ids: tuple[int, ...], trained: int) -> Row:
    """A row whose last ``trained`` tokens carry loss."""
    return Row(ids, (*[IGNORE] * (len(ids) - trained), *ids[len(ids) - trained :]))


def uncut(ids: tuple[int, ...], trained: int) -> Encoded:
    whole = (row_of(ids, trained),)
    return Encoded(whole, whole)


def part(row: Row, start: int, stop: int) -> Row:
    return Row(row.ids[start:stop], row.labels[start:stop])


def joined(*rows: Row) -> Row:
    return Row(sum((row.ids for row in rows), ()), sum((row.labels for row in rows), ()))


def encoded(*samples: Sample) -> list[tuple[Sample, Encoded]]:
    return [(sample, uncut((1, 2), 1)) for sample in samples]


class TestPieces:
    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), st.data())
    def test_they_are_the_row(self, tokenizer: PreTrainedTokenizerBase, text: str, data: st.DataObject) -> None:
        ids = tuple(tokenizer(text + "<|im_end|>").input_ids)
        trained = data.draw(st.integers(0, len(ids)))
        shown = show(tokenizer, sample("a", "b"), 3, uncut(ids, trained))
        (pieces,) = shown.sequences
        assert tuple(i for piece in pieces for i in piece.ids) == ids
        carried = [i for piece in pieces if piece.kind == "trained" for i in piece.ids]
        assert len(carried) == shown.trained == min(trained, len(ids) - 1)
        if trained in (0, 1):  # no boundary inside a character
            assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
            assert [piece.text for piece in pieces if piece.special][-1:] == ["<|im_end|>"]

    def test_an_emoji_is_one_piece(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = tuple(tokenizer("x😀<|im_end|>").input_ids)
        (pieces,) = show(tokenizer, sample("a", "b"), 0, uncut(ids, 1)).sequences
        assert [piece.text for piece in pieces] == ["x", "😀", "<|im_end|>"]
        assert len(pieces[1].ids) > 1
        assert [(piece.kind, piece.special) for piece in pieces][1:] == [("prompt", False), ("trained", True)]

    @pytest.mark.parametrize(
        ("keep", "shown"),
        [
            ([(0, 7)], "abcde[fg](hij)"),
            ([(4, 10)], "(abcd)e[fghij]"),
            ([(0, 1), (3, 9)], "a(bc)de[fghi](j)"),
            ([], "(abcdefghij)"),
        ],
        ids=["end", "beginning", "both", "dropped"],
    )
    def test_what_is_cut(
        self, tokenizer: PreTrainedTokenizerBase, keep: list[tuple[int, int]], shown: str
    ) -> None:
        ids = tuple(tokenizer(letter).input_ids[0] for letter in "abcdefghij")
        whole = row_of(ids, 5)
        rows = (joined(*(part(whole, *at) for at in keep)),) if keep else ()
        found = show(tokenizer, sample("a", "b"), 0, Encoded((whole,), rows))
        assert self.text(found) == [shown]
        assert found.cut == 10 - sum(stop - start for start, stop in keep)

    def test_split_rows_are_shown_as_they_are_trained(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = tuple(tokenizer(letter).input_ids[0] for letter in "abcdefghij")
        whole = row_of(ids, 5)
        rows = (part(whole, 0, 6), part(whole, 5, 10))
        found = show(tokenizer, sample("a", "b"), 0, Encoded((whole,), rows))
        assert self.text(found) == ["abcde[f]", "f[ghij]"]

    @pytest.mark.parametrize(
        ("rows", "shown", "padding"),
        [
            ([(0, 6), (5, 10)], ["abcde[f]⟨padding: 2 × <|im_end|>⟩", "f[ghij]⟨padding: 3 × <|im_end|>⟩"], 5),
            ([(0, 7)], ["abcde[fg](hij)⟨padding: 1 × <|im_end|>⟩"], 1),
            ([(0, 8)], ["abcde[fgh](ij)"], 0),
            ([], ["(abcdefghij)"], 0),
        ],
        ids=["split", "cut", "longest", "dropped"],
    )
    def test_padding(
        self, tokenizer: PreTrainedTokenizerBase, rows: list[tuple[int, int]], shown: list[str], padding: int
    ) -> None:
        ids = tuple(tokenizer(letter).input_ids[0] for letter in "abcdefghij")
        whole = row_of(ids, 5)
        one = Encoded((whole,), tuple(part(whole, *at) for at in rows))
        found = show(tokenizer, sample("a", "b"), 0, one, pad_to=8)
        assert self.text(found) == shown
        assert found.padding == padding
        assert found.tokens == sum(len(row.ids) for row in (one.rows if len(rows) > 1 else one.whole))

    def text(self, found: ShownRow) -> list[str]:
        marks = {"prompt": ("", ""), "trained": ("[", "]"), "cut": ("(", ")"), "padding": ("", "")}
        return [
            "".join(
                "".join(piece.text for piece in run).join(marks[kind])
                for kind, run in groupby(pieces, key=lambda piece: piece.kind)
            )
            for pieces in found.sequences
        ]

    def test_nothing_steers_the_terminal(self) -> None:
        assert (
            visible("a\x1b[2J\x00\u202eb\r\n\tc é\ud800") == r"a\u001b[2J\u0000\u202eb\u000d" + "\n\tc é\\ud800"
        )


class TestNumbers:
    def test_the_waterfall(self) -> None:
        whole = row_of(tuple(range(10)), 4)
        silent = Row((1, 2), (IGNORE, IGNORE))
        looks = [
            Encoded((whole,), (part(whole, 0, 8),), truncated=1),
            Encoded((whole,), (part(whole, 0, 8), part(whole, 7, 10)), split=2),
            Encoded((whole,), (), too_long=1),
            Encoded((silent,), (), masked=1),
            Encoded((part(whole, 5, 10),), (part(whole, 5, 10),)),
        ]
        rows = [(sample(str(i), "x"), one) for i, one in enumerate(looks)]
        found = survey(rows, bad=2, cutoff_len=8)
        assert str(found.waterfall) == (
            "read 7 → bad 2 → duplicate 0 (kept) → too long 1 → without loss 1 → kept 3"
        )
        tokens = found.tokens
        assert (tokens.total, tokens.longest, tokens.median, tokens.truncated, tokens.split) == (
            24,
            8,
            10,
            1,
            1,
        )
        assert (tokens.lost, tokens.lost_share) == (2 + 10, 12 / 37)
        assert tokens.trained == 2 + 2 + 2 + 4
        assert tokens.masked_share == 1 - 10 / 24
        assert found.warnings() == [
            "40.0% of the rows are not trained: nothing in them carries loss",
            "12 tokens (32.4%) are lost to cutoff_len",
        ]

    def test_repetitions(self) -> None:
        rows = [
            sample("What is π?", "3.14", "r:1"),
            sample("What is π?", "3.14", "r:2"),
            sample(" what  IS π?", "3.14\n", "r:3"),
            sample("What is e?", "3.14", "r:4"),
            sample("\uff37hat is π?", "3.14", "r:5"),
        ]
        found = survey(encoded(*rows), cutoff_len=9).duplicates
        assert (found.exact, found.normalised) == (1, 3)
        assert found.examples == (("r:2", "r:1"), ("r:3", "r:1"), ("r:5", "r:1"))

    def test_a_clean_set_warns_of_nothing(self) -> None:
        rows = [sample(str(i), "x", f"r:{i}") for i in range(5)]
        assert survey(encoded(*rows), [sample("9", "x")], cutoff_len=9).warnings() == []

    def test_leakage(self) -> None:
        trained = [sample("A", "1", "t:1"), sample("B", "2", "t:2")]
        held_out = [sample("A", "1", "h:1"), sample("B", "3", "h:2"), sample("b", "2", "h:3"), sample("C", "1")]
        found = leakage(trained, held_out)
        assert (found.held_out, found.rows.exact, found.rows.normalised) == (4, 1, 2)
        assert (found.prompts.exact, found.prompts.normalised) == (2, 3)
        warnings = survey(encoded(*trained), held_out, cutoff_len=9).warnings()
        assert warnings == [
            "held-out rows that are trained, too: 2 (1 of them exactly), e.g. h:1 as t:1",
            "held-out rows whose prompt is trained, too: 3 (2 of them exactly), e.g. h:1 as t:1",
        ]

    def test_labels(self) -> None:
        rows = [sample(str(i), "x", label="spam" if i < 3 else "ham") for i in range(4)]
        found = survey(encoded(*rows), [sample("q", "x", label="eggs")], cutoff_len=9)
        assert found.labels == {"spam": 3, "ham": 1}
        assert found.warnings() == ["held-out labels never trained: eggs"]
        assert ("labels", "spam 3 (75.0%), ham 1 (25.0%)") in found.lines()

    @given(st.lists(st.integers(1, 100_000), min_size=1, max_size=50))
    def test_a_histogram_holds_every_length_once(self, lengths: list[int]) -> None:
        bars = histogram(lengths)
        assert sum(bar.rows for bar in bars) == len(lengths)
        assert len(bars) <= 12
        assert all(a.high + 1 == b.low for a, b in pairwise(bars))
        assert all(bar.rows == sum(bar.low <= n <= bar.high for n in lengths) for bar in bars)

    @pytest.mark.parametrize(
        ("can_pack", "capacity", "said", "refused"),
        [
            (True, None, "rows lie end to end, nothing is padded", False),
            (True, 10, "3 bins, 80.0% full; nothing is padded", False),
            (False, None, "each padded to its longest row", False),
            (False, 10, "each padded to its longest row", True),
        ],
    )
    def test_batches(self, can_pack: bool, capacity: int | None, said: str, refused: bool) -> None:
        found = batches([3, 9, 7, 5], can_pack=can_pack, capacity=capacity)
        assert (str(found), found.refused) == (said, refused)
        whole = replace(survey([], cutoff_len=9), batches=found)
        assert ("batches", said) in whole.lines()
        assert any(warning.startswith("packing: ") for warning in whole.warnings()) == refused

    def test_no_rows(self) -> None:
        found = survey([], cutoff_len=9)
        assert (found.tokens.histogram, found.tokens.masked_share, found.tokens.lost_share) == ((), 1.0, 0.0)


def test_the_page_holds_whatever_the_rows_hold(tokenizer: PreTrainedTokenizerBase) -> None:
    evil = "<script>alert(1)</script>\x1b[2J"
    ids = tuple(tokenizer(evil).input_ids)
    row = sample(evil, evil, f"{evil}:1"), uncut(ids, 3)
    page = render_preview("<b>", survey([row, row], cutoff_len=99), [show(tokenizer, row[0], 0, row[1])])
    assert "<script" not in page
    assert "\x1b" not in page
    assert "<title>&lt;b&gt; · lorakit preview</title>" in page
    assert page.count('class="trained"') >= 3  # the legend, and the row
    assert "rows that repeat an earlier one: 1" in page


class TestCommand:
    @pytest.fixture
    def folder(self, tiny_llama: Path, tmp_path: Path) -> Path:
        rows = [{"instruction": f"Ask {i}", "output": "Yes."} for i in range(5)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "eval.jsonl").write_text(json.dumps(rows[3]))
        (tmp_path / "c.yaml").write_text(
            f"model_name_or_path: {tiny_llama}\ndataset: rows.jsonl\neval_dataset: eval.jsonl\noutput_dir: o\n"
        )
        return tmp_path

    def run(self, *arguments: object) -> int:
        from lorakit.cli.main import main

        return main(["preview", *map(str, arguments)])

    def test_for_a_person(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(folder / "c.yaml", "--rows", "3,1", "--html", folder / "page.html") == 0
        out, err = capsys.readouterr()
        row = "<|im_start|>user\nAsk {}<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
        assert row.format(1) in out
        assert out.index(row.format(3)) < out.index(row.format(1))
        assert "rows       read 5 → bad 0 → duplicate 0 (kept)" in out
        assert f"trained, too: 1, e.g. {folder}/eval.jsonl:1 as {folder}/rows.jsonl:4" in err
        page = re.sub("<[^>]+>", "", (folder / "page.html").read_text())
        assert "user\nAsk 3&lt;|im_end|&gt;" in page
        assert not (folder / "o").exists()

    def test_for_a_program(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(folder / "c.yaml", "--json", "--random", "2") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["waterfall"]["kept"] == 5
        assert found["leakage"]["rows"]["exact"] == 1
        assert found["tokens"]["masked_share"] == 1 - found["tokens"]["trained"] / found["tokens"]["total"]
        assert len(found["rows"]) == 2
        for row in found["rows"]:
            assert (
                "".join(piece["text"] for piece in row["sequences"][0] if piece["kind"] == "trained")
                == "Yes.<|im_end|>"
            )
        assert self.run(folder / "c.yaml", "--json", "--random", "2") == 0
        assert json.loads(capsys.readouterr().out) == found

    def test_colours(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        assert self.run(folder / "c.yaml", "--rows", "0") == 0
        out = capsys.readouterr().out
        assert "\x1b[1;32mYes.\x1b[0m\x1b[1;35m<|im_end|>\x1b[0m" in out
        assert "⟦" not in out
        assert "\x1b[2mpadding\x1b[0m" in out

    @pytest.mark.parametrize(
        ("changes", "packs"),
        [
            ({}, True),
            ({"model_type": "mistral", "sliding_window": 14}, True),
            ({"model_type": "mistral", "sliding_window": 13}, True),
            ({"model_type": "gpt2"}, False),
            ({"model_type": "nobody_knows_it"}, False),
            ({"attention_dropout": 0.1}, False),
        ],
        ids=str,
    )
    def test_padding(
        self,
        folder: Path,
        tiny_llama: Path,
        changes: dict[str, object],
        packs: bool,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        model = shutil.copytree(tiny_llama, folder / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))
        (folder / "rows.jsonl").write_text(
            '{"instruction": "1", "output": "2345"}\n{"instruction": "1", "output": "2"}'
        )
        run = [folder / "c.yaml", f"model_name_or_path={model}"]
        assert self.run(*run, "--html", folder / "page.html") == 0
        out = capsys.readouterr().out
        page = (folder / "page.html").read_text()
        longest = int(re.search("longest row ([0-9]+)", out)[1])
        assert longest == 14
        assert (f"{longest - 2} tokens, 2 trained, 2 padding" in out) != packs
        assert ("⟦2<|im_end|>⟧\n⟨padding: 2 × <|im_end|>⟩\n" in out) != packs
        assert ('<span class="padding" title="">⟨padding: 2 × &lt;|im_end|&gt;⟩</span>' in page) != packs
        assert self.run(*run, "--json", "packing=true", "cutoff_len=32") == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert [row["padding"] for row in found["rows"]] == ([0, 0] if packs else [0, 2])
        assert found["batches"] == {
            "padded": not packs,
            "bins": 1 if packs else None,
            "fill": (2 * longest - 2) / 32 if packs else None,
            "refused": not packs,
        }
        assert ("training refuses it" in captured.err) != packs

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rows", "5"], "there is no row 5: the rows are 0 to 4"),
            (["--rows", "one"], "--rows takes numbers"),
            (["--rows", "-1"], "--rows takes numbers"),
            (["--rows", "1", "--random", "1"], "--rows and --random both choose"),
            (["--random", "0"], "not in the range"),
        ],
    )
    def test_wrong_arguments(
        self, folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(folder / "c.yaml", *arguments) == 2
        assert message in capsys.readouterr().err
