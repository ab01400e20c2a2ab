"""Bad data: every mistake ends in a clear line and an exit code, before anything is trained.

Each case goes through ``lorakit preview``, which reads, encodes and counts as training does.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from transformers import AutoTokenizer

from lorakit.cli.main import main
from lorakit.data.cache import cached, describe_files, describe_tokenizer
from lorakit.data.encode import Row
from lorakit.data.pool import chunks, in_order
from lorakit.data.store import to_batch
from lorakit.errors import MemoryLimitError


class Outcome(NamedTuple):
    """What the command left: exit code, and what it printed as JSON and said on stderr."""

    status: int
    found: dict[str, Any]
    said: str


Preview = Callable[..., Outcome]


@pytest.fixture
def preview(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Preview:
    """``preview(rows, key=value…)``: rows are dictionaries, or the text or bytes of a file."""
    monkeypatch.chdir(tmp_path)

    def run(rows: Any = None, name: str = "rows.jsonl", *more: str, **keys: Any) -> Outcome:
        if rows is not None:
            write(Path(name), rows)
        settings = {"model_name_or_path": str(tiny_llama), "dataset": name, "output_dir": "out"} | keys
        Path("c.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
        status = main(["preview", "c.yaml", "--json", *more])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert not Path("out").exists()
        return Outcome(status, json.loads(out) if out else {}, err)

    return run


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Callable[..., str]:
    """A copy of the tiny model whose tokenizer is changed."""

    def change(**attributes: Any) -> str:
        folder = tmp_path / "model"
        shutil.copytree(tiny_llama, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return change


def write(path: Path, rows: Any) -> Path:
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    elif isinstance(rows, str):
        path.write_text(rows, encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(number: int = 0, answer: str = "Yes.", **more: Any) -> dict[str, Any]:
    return {"instruction": f"Ask {number}", "output": answer} | more


def chat(*turns: str) -> dict[str, Any]:
    pairs = (turn.split(": ", 1) for turn in turns)
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


class TestD21NotFound:
    def test_a_missing_file(self, preview: Preview, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", [row()])
        status, _, said = preview(None, "tran.jsonl")
        assert status == 3
        assert "no such file or folder" in said
        assert "did you mean train.jsonl?" in said

    def test_a_hub_data_set_without_the_hub(self, preview: Preview, tmp_path: Path) -> None:
        registry = {"far": {"hf_hub_url": "nobody/nothing", "split": "nowhere"}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(registry))
        status, _, said = preview(None, "far")
        assert status == 3
        assert "nobody/nothing" in said
        assert "name a local file or folder" in said


class TestD22BadRow:
    LINES: ClassVar = [json.dumps(row(i)) for i in range(100)]

    def test_its_place(self, preview: Preview) -> None:
        lines = [*self.LINES[:57], '{"instruction": "x" "output": "y"}', *self.LINES[58:]]
        status, _, said = preview("\n".join(lines))
        assert status == 3
        byte = len("\n".join(lines[:57])) + 1 + len('{"instruction": "x" ')
        assert f"rows.jsonl:58 (byte {byte})" in said
        assert """near '{"instruction": "x" "output": "y"}'""" in json.loads(said.splitlines()[-1])["message"]

    def test_skipped_and_counted(self, preview: Preview) -> None:
        lines = [*self.LINES[:57], '{"instruction": "x"}', *self.LINES[58:]]
        status, found, said = preview("\n".join(lines), on_bad_row="skip")
        assert status == 0
        assert (found["waterfall"]["read"], found["waterfall"]["bad"], found["waterfall"]["kept"]) == (
            100,
            1,
            99,
        )
        assert "skipped 1 of 100 rows" in said

    def test_too_many_of_them(self, preview: Preview) -> None:
        lines = [*self.LINES[:90], *["{}"] * 10]
        status, _, said = preview("\n".join(lines), on_bad_row="skip", max_bad_rows=0.09)
        assert status == 3
        assert "10 of 100 rows are bad, more than max_bad_rows (9.0%) allows; the first: " in said
        assert "rows.jsonl:91" in said


class TestD23Empty:
    @pytest.mark.parametrize(
        ("name", "text"), [("r.jsonl", ""), ("r.jsonl", "\n\n"), ("r.json", "[]"), ("r.csv", "text,label\n")]
    )
    def test_no_rows(self, preview: Preview, name: str, text: str) -> None:
        status, _, said = preview(text, name)
        assert status == 3
        assert "the file holds no rows" in said

    def test_none_left(self, preview: Preview) -> None:
        rows = [row(i % 8, "y" * 500) for i in range(10)]
        status, found, said = preview(rows, cutoff_len=16, long_rows="drop")
        assert status == 3
        assert (
            "no row is left to train on: read 10 → bad 0 → duplicate 2 (kept) → "
            "too long 10 → without loss 0 → kept 0"
        ) in json.loads(said.splitlines()[-1])["message"]
        assert found["waterfall"]["kept"] == 0


class TestD24Columns:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"question": "a", "answer": "b"}], "{answer, question} is in no known format"),
            ([row(), {"instruction": "a", "response": "b"}], "output missing in a row of the format alpaca"),
            (
                [row(), chat("user: a", "assistant: b")],
                "instruction, output missing in a row of the format alpaca",
            ),
            ([row(output=None)], "an empty turn"),
            ([row(output=5)], "output must be text, not int"),
            ([{"text": "a", "label": None}], "label must be a name or a whole number of at least 0, not null"),
        ],
    )
    def test_found_and_needed(self, preview: Preview, rows: list[Any], message: str) -> None:
        status, _, said = preview(rows)
        assert status == 3
        assert message in json.loads(said.splitlines()[-1])["message"]
        assert f"rows.jsonl:{len(rows)}" in json.loads(said.splitlines()[-1])["place"]

    def test_what_is_needed_is_named(self, preview: Preview) -> None:
        said = json.loads(preview([{"question": "a", "answer": "b"}]).said.splitlines()[-1])
        assert "{messages}" in said["remedy"]
        assert "{instruction, output}" in said["remedy"]


class TestD25NothingToLearn:
    def test_a_few_are_dropped_and_counted(self, preview: Preview) -> None:
        status, found, said = preview(openai([*(row(i) for i in range(99)), {"messages": unheard()}]))
        assert status == 0
        assert (found["waterfall"]["untrained"], found["waterfall"]["kept"]) == (1, 99)
        assert "not trained" not in said

    def test_many_are_a_warning(self, preview: Preview) -> None:
        status, found, said = preview(openai([*(row(i) for i in range(9)), {"messages": unheard()}]))
        assert (status, found["waterfall"]["untrained"]) == (0, 1)
        assert "10.0% of the rows are not trained" in said

    def test_all_are_an_error(self, preview: Preview) -> None:
        status, _, said = preview([{"messages": unheard()}] * 3)
        assert status == 3
        assert "no row is left to train on" in said


def unheard() -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]


def openai(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Alpaca rows as messages."""
    return [
        r if "messages" in r else chat(f"user: {r['instruction']}", f"assistant: {r['output']}") for r in rows
    ]


class TestD26Turns:
    @pytest.mark.parametrize(
        ("turns", "rule"),
        [
            (["human: a", "assistant: b"], "message 1 needs a role out of system, user, assistant, tool"),
            (["user: a", "user: b", "assistant: c"], "turns must alternate"),
            (["user: a", "assistant: b", "assistant: c"], "turns must alternate"),
            (["user: a", "assistant: "], "an empty turn"),
            (["user: a", "system: b", "assistant: c"], "a system message may only come first"),
            (["user: a"], "no assistant turn"),
            (["tool: a", "assistant: c"], "turns must alternate"),
        ],
    )
    def test_the_rule(self, preview: Preview, turns: list[str], rule: str) -> None:
        status, _, said = preview([chat(*turns)])
        assert status == 3
        assert rule in said
        assert "rows.jsonl:1 (byte 0)" in said

    def test_no_messages(self, preview: Preview) -> None:
        status, _, said = preview([{"messages": []}])
        assert (status, "no assistant turn" in said) == (3, True)

    def test_a_tool_result_that_answers_nothing(self, preview: Preview) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "2"},
            {"role": "assistant", "content": "5"},
        ]
        status, _, said = preview([{"messages": turns}])
        assert status == 3
        assert "message 3 answers the tool call '2', which nobody made" in said


TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
EACH = "{% for m in messages %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


class TestD27Template:
    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "has no chat template"),
            ("{{ raise_exception('roles!') }}", "roles!"),
            (EACH + TURN.replace("<|im_end|>", "") + "{% endfor %}" + ASK, "no end-of-turn"),
            ("{% for i in range(10**9) %}x{% endfor %}", "template"),
            ("{% for m in messages if m['role'] != 'assistant' %}" + TURN + "{% endfor %}" + ASK,
             "template"),
        ],
        ids=["missing", "raises", "eats the end", "bomb", "no answer"],
    )  # fmt: skip
    def test_refused_before_training(
        self, preview: Preview, model: Callable[..., str], template: str | None, message: str
    ) -> None:
        start = time.monotonic()
        status, _, said = preview([row()], model_name_or_path=model(chat_template=template))
        assert status == 3
        assert message in said
        assert time.monotonic() - start < 20


class TestD28Tokenizer:
    def test_no_end_token(self, preview: Preview, model: Callable[..., str]) -> None:
        status, _, said = preview([row()], model_name_or_path=model(eos_token=None, pad_token=None))
        assert status == 4
        assert "the tokenizer has no end-of-text token" in said

    def test_an_end_that_also_pads_is_trained(self, preview: Preview, tiny_llama: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        assert tokenizer.pad_token_id == tokenizer.eos_token_id
        (shown,) = preview([row()], "rows.jsonl", "--rows", "0").found["rows"]
        trained = [piece for piece in shown["sequences"][0] if piece["kind"] == "trained"]
        assert "".join(piece["text"] for piece in trained) == "Yes.<|im_end|>"
        assert trained[-1]["ids"] == [tokenizer.eos_token_id]


class TestD29LongRows:
    ROWS: ClassVar = [
        chat(f"user: {'q' * 50}", f"assistant: {'abcde' * 6}"),
        chat("user: q", "assistant: a"),
    ]

    def test_dropped(self, preview: Preview) -> None:
        _, found, said = preview(self.ROWS, cutoff_len=32, long_rows="drop")
        assert (found["waterfall"]["too_long"], found["waterfall"]["kept"]) == (1, 1)
        assert found["tokens"]["lost"] > 80
        assert "are lost to cutoff_len" in said

    @pytest.mark.parametrize("policy", ["truncate", "split"])
    def test_cut(self, preview: Preview, policy: str) -> None:
        status, found, said = preview(self.ROWS, "rows.jsonl", "--rows", "0", cutoff_len=32, long_rows=policy)
        assert status == 0
        assert found["tokens"]["longest"] <= 32
        assert found["waterfall"]["kept"] == 2
        assert found["rows"][0]["trained"] > 0
        if policy == "truncate":
            assert found["tokens"]["truncated"] == 1
            assert found["rows"][0]["cut"] == found["tokens"]["lost"] > 0
            assert f"{found['tokens']['lost']} tokens ({found['tokens']['lost_share']:.1%}) are lost" in said
        else:
            assert found["tokens"]["split"] == 1


class TestD30Characters:
    @pytest.mark.parametrize(
        "text",
        [
            "a\u0000b",
            "שלום עולם \u202eabc",
            "👩🏽‍🚒🏳️‍🌈",
            "\ufeffa",
            "\u2028",
            "a" * 3_000,
            "\ufffd",
            "<|im_end|>",
        ],
    )
    def test_survive(self, preview: Preview, text: str) -> None:
        status, found, _ = preview([row(answer=f"x{text}y")], "rows.jsonl", "--rows", "0", cutoff_len=65536)
        assert status == 0
        pieces = found["rows"][0]["sequences"][0]
        trained = "".join(piece["text"] for piece in pieces if piece["kind"] == "trained")
        assert trained.startswith(f"x{text}y".partition("<|im_end|>")[0])

    def test_a_lone_surrogate(self, preview: Preview) -> None:
        status, _, said = preview('{"instruction": "a", "output": "b\\ud800"}\n')
        assert status == 3
        assert "output holds a lone surrogate at character 1" in said

    def test_not_utf_8(self, preview: Preview) -> None:
        status, _, said = preview(b'{"instruction": "a", "output": "caf\xe9"}\n')
        assert status == 3
        assert "not UTF-8 text (byte 35: 0xe9)" in said

    def test_utf_16(self, preview: Preview) -> None:
        status, _, said = preview(json.dumps(row()).encode("utf-16"))
        assert (status, "not UTF-8 text (byte 0: 0xff)" in said) == (3, True)

    def test_a_row_of_10_mb(self, preview: Preview) -> None:
        status, found, _ = preview(
            [row(answer="word " * 400), row(answer=" Springfield" * 900_000)], long_rows="truncate"
        )
        assert status == 0
        assert found["tokens"]["longest"] <= 2048
        assert found["tokens"]["truncated"] >= 1

    @pytest.mark.parametrize("text", ["a", " "])
    def test_hardly_any_token(self, preview: Preview, text: str) -> None:
        """One token and the end of the text are enough; blanks are nothing."""
        status, _, said = preview([{"text": text}])
        assert status == (0 if text.strip() else 3), said


class TestD31Labels:
    @pytest.mark.parametrize("label", [-1, 1.5, None, [], {}, True])
    def test_no_label(self, preview: Preview, label: Any) -> None:
        status, _, said = preview([{"text": "a", "label": label}])
        assert status == 3
        assert "label must be a name or a whole number" in said

    def test_held_out_but_never_trained(self, preview: Preview, tmp_path: Path) -> None:
        write(tmp_path / "eval.jsonl", [{"text": "c", "label": "meh"}])
        rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]
        status, found, said = preview(rows, eval_dataset="eval.jsonl")
        assert (status, found["labels"]) == (0, {"good": 1, "bad": 1})
        assert "held-out labels never trained: meh" in said


class TestD32Repetition:
    def test_leakage_and_duplicates(self, preview: Preview, tmp_path: Path) -> None:
        write(tmp_path / "eval.jsonl", [row(1), row(2, "No."), row(9), {**row(3), "instruction": "ASK  3"}])
        status, found, said = preview([row(1), row(2), row(3), row(1)], eval_dataset="eval.jsonl")
        assert status == 0
        assert (found["duplicates"]["exact"], found["waterfall"]["duplicate"], found["waterfall"]["kept"]) == (
            1,
            1,
            4,
        )
        assert (found["leakage"]["rows"]["exact"], found["leakage"]["rows"]["normalised"]) == (1, 2)
        assert (found["leakage"]["prompts"]["exact"], found["leakage"]["prompts"]["normalised"]) == (2, 3)
        assert "held-out rows that are trained, too: 2 (1 of them exactly)" in said


class TestD33D34Cache:
    ROWS: ClassVar = [Row((1, 2, 3), (-100, 2, 3))]

    def build(self, made: list[int]) -> Callable[..., dict[str, Any]]:
        def work(write_batch: Callable[[Any], None]) -> dict[str, Any]:
            made.append(1)
            write_batch(to_batch(self.ROWS))
            return {"kept": 1}

        return work

    def test_a_change_of_file_or_template_makes_new_rows(self, tiny_llama: Path, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        file, made = write(tmp_path / "rows.jsonl", [row()]), []
        for change in (None, None, "file", "template"):
            if change == "file":
                write(file, [row(1)])
            elif change == "template":
                tokenizer.chat_template += " "
            parts = {"files": describe_files([file]), "tokenizer": describe_tokenizer(tokenizer)}
            assert list(cached(parts, self.build(made), folder=tmp_path / "cache").rows) == self.ROWS
        assert len(made) == 3

    @pytest.mark.parametrize("damage", ["rows.arrow", "manifest.json"])
    def test_a_half_written_cache_is_made_again(
        self, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        made: list[int] = []
        cached({}, self.build(made), folder=tmp_path)
        (file,) = tmp_path.glob(f"*/{damage}")
        file.write_bytes(file.read_bytes()[:-20])
        assert list(cached({}, self.build(made), folder=tmp_path).rows) == self.ROWS
        assert len(made) == 2
        assert "encoding them again" in caplog.text


class TestD35Streams:
    def test_a_compressed_file_that_ends_early(self, preview: Preview) -> None:
        packed = gzip.compress("".join(json.dumps(row(i)) + "\n" for i in range(1000)).encode())
        status, _, said = preview(packed[: len(packed) // 2], "rows.jsonl.gz")
        assert status == 3
        assert "the compressed file is cut off" in said

    def test_a_list_that_ends_early(self, preview: Preview) -> None:
        status, _, said = preview(json.dumps([row(i) for i in range(5)])[:-30], "rows.json")
        assert (status, "not JSON" in said) == (3, True)


def _die(part: list[int]) -> int:
    if 7 in part:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(part)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one process encodes")
def test_d36_a_worker_that_dies_is_named_with_its_rows() -> None:
    with pytest.raises(MemoryLimitError, match="ended with code -9") as caught:
        list(in_order(_die, chunks(range(20), 3), workers=2))
    assert caught.value.place == "rows 7 to 9"
    assert "preprocessing_num_workers" in str(caught.value.remedy)


class TestD37Archives:
    def test_a_bomb(self, preview: Preview, tmp_path: Path) -> None:
        zeros = b"0" * 2**20
        with gzip.open(tmp_path / "rows.jsonl.gz", "wb", compresslevel=1) as file:
            file.write(b'{"text": "')
            for _ in range(300):
                file.write(zeros)
        start = time.monotonic()
        status, _, said = preview(None, "rows.jsonl.gz")
        assert status == 3
        assert "MiB" in said
        assert time.monotonic() - start < 20

    @pytest.mark.parametrize("name", ["rows.zip", "rows.tar.gz"])
    def test_not_read(self, preview: Preview, name: str) -> None:
        status, _, said = preview(b"PK", name)
        assert status == 3
        assert "archives are not read" in said
