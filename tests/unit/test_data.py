"""Rows from files: every mistake is named with its file, row and rule, and nothing is read half."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.formats.recognise import to_sample
from lorakit.data.reading import read_samples
from lorakit.data.sample import Message, Sample, shared_system
from lorakit.data.sources import find_files, raw_rows
from lorakit.errors import DataError


def alpaca(**more: Any) -> dict[str, Any]:
    return {"instruction": "Ask", "output": "Answer"} | more


def chat(*turns: str, **more: dict[str, Any]) -> dict[str, Any]:
    """``chat("user: Hi", "assistant: Yes", assistant={"weight": 0})``"""
    pairs = (turn.split(": ", 1) for turn in turns)
    messages = [{"role": role, "content": content} for role, content in pairs]
    return {"messages": messages + [{"role": role} | turn for role, turn in more.items()]}


def turns(sample: Sample) -> list[str]:
    return [f"{m.role}: {m.content}" for m in sample.messages]


def rows_of(path: Path, text: str | bytes) -> list[tuple[str, dict[str, Any]]]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    rows = list(raw_rows(path))
    for row in rows:
        if row.problem:
            raise DataError(row.problem, place=row.place)
    return [(row.place, row.value) for row in rows]


class TestFiles:
    def test_a_folder_gives_its_data_files_by_name(self, tmp_path: Path) -> None:
        for name in ("b.jsonl", "a.json", "notes.txt", "c.jsonl.bak"):
            (tmp_path / name).write_text("[]")
        (tmp_path / "dataset_info.json").write_text("{}")
        (tmp_path / "deeper").mkdir()
        (tmp_path / "deeper" / "d.jsonl").touch()
        assert find_files(tmp_path) == [tmp_path / "a.json", tmp_path / "b.jsonl"]
        assert find_files(tmp_path / "*" / "*.jsonl") == [tmp_path / "deeper" / "d.jsonl"]
        assert find_files(tmp_path / "**" / "*.jsonl") == [
            tmp_path / "b.jsonl",
            tmp_path / "deeper" / "d.jsonl",
        ]
        assert find_files(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]

    def test_a_folder_without_data(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        with pytest.raises(DataError, match=r"no \.jsonl, .* or \.parquet file in this folder") as caught:
            find_files(tmp_path)
        assert caught.value.place == str(tmp_path)

    def test_a_missing_file_names_its_neighbours(self, tmp_path: Path) -> None:
        (tmp_path / "train.jsonl").touch()
        with pytest.raises(DataError, match="no such file or folder") as caught:
            find_files(tmp_path / "tran.jsonl")
        assert caught.value.remedy == "did you mean train.jsonl?"
        with pytest.raises(DataError) as caught:
            find_files(tmp_path / "missing" / "rows.json")
        assert caught.value.remedy == f"looked in {tmp_path / 'missing'}"

    def test_an_unknown_kind_of_file(self, tmp_path: Path) -> None:
        (tmp_path / "rows.xls").touch()
        with pytest.raises(DataError, match=r"\.xls: not a kind of file that is read") as caught:
            find_files(tmp_path / "rows.xls")
        assert str(caught.value.remedy).startswith("supported: .jsonl, .json, .csv")

    @pytest.mark.parametrize("name", ["rows.zip", "rows.tar.gz"])
    def test_an_archive(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).touch()
        with pytest.raises(DataError, match="archives are not read"):
            find_files(tmp_path / name)


class TestRows:
    def test_json_and_jsonl_give_the_same_rows_with_their_places(self, tmp_path: Path) -> None:
        rows = [{"n": 1}, {"n": 2}]
        one, other = tmp_path / "one.json", tmp_path / "other.jsonl"
        assert rows_of(one, json.dumps(rows)) == [(f"{one}: row {row['n']}", row) for row in rows]
        assert rows_of(other, '{"n": 1}\r\n\n  \n{"n": 2}') == [
            (f"{other}:1", rows[0]),
            (f"{other}:4", rows[1]),
        ]

    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path, name: str) -> None:
        text = '[{"a": "é"}]' if name == "rows.json" else '{"a": "é"}'
        ((_, row),) = rows_of(tmp_path / name, b"\xef\xbb\xbf" + text.encode())
        assert row == {"a": "é"}

    @pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
    def test_line_separators_of_unicode_do_not_end_a_row(self, tmp_path: Path, separator: str) -> None:
        raw = json.dumps({"a": f"x{separator}y"}, ensure_ascii=separator < " ") + "\n"
        ((place, row),) = rows_of(tmp_path / "rows.jsonl", raw)
        assert (place, row) == (f"{tmp_path / 'rows.jsonl'}:1", {"a": f"x{separator}y"})

    def test_a_bad_line_is_shown(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        with pytest.raises(DataError, match="not JSON: Expecting ',' delimiter") as caught:
            rows_of(path, '{"a": 1}\n{"a": 1 "bad": 2}\n{"a": 3}\n')
        assert caught.value.place == f"{path}:2"
        assert """near '{"a": 1 "bad": 2}'""" in caught.value.message

    def test_the_snippet_of_a_long_line_is_short(self, tmp_path: Path) -> None:
        filler = json.dumps("x" * 10_000)
        with pytest.raises(DataError) as caught:
            rows_of(tmp_path / "rows.jsonl", f'{{"a": {filler}, wrong, "b": {filler}}}')
        assert "wrong" in caught.value.message
        assert len(caught.value.message) < 200

    def test_brackets_without_end(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not JSON"):
            rows_of(tmp_path / "rows.json", "[" * 200_000)

    @pytest.mark.parametrize("row", ["[1]", '"text"', "7", "null"])
    def test_a_row_that_is_no_object(self, tmp_path: Path, row: str) -> None:
        kind = {"[1]": "list", '"text"': "str", "7": "int", "null": "NoneType"}[row]
        (tmp_path / "rows.jsonl").write_text(f"{json.dumps(alpaca())}\n{row}")
        with pytest.raises(DataError, match=f"a row must be a JSON object, not {kind}") as caught:
            read_samples([tmp_path])
        assert caught.value.place == f"{tmp_path / 'rows.jsonl'}:2 (byte 43)"

    def test_one_object_is_no_list_of_rows(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"a \.json file must hold a list of rows") as caught:
            rows_of(tmp_path / "rows.json", json.dumps(alpaca()))
        assert "name the file .jsonl" in str(caught.value.remedy)

    @pytest.mark.parametrize(("name", "text"), [("r.json", ""), ("r.json", " [] "), ("r.jsonl", "\n \n")])
    def test_a_file_without_rows(self, tmp_path: Path, name: str, text: str) -> None:
        with pytest.raises(DataError, match="the file holds no rows") as caught:
            rows_of(tmp_path / name, text)
        assert caught.value.place == str(tmp_path / name)

    @pytest.mark.parametrize(("raw", "byte"), [(b'{"a": "\xff"}', "byte 7: 0xff"), (b"\xff\xfe{", "byte 0")])
    def test_a_file_that_is_not_utf_8(self, tmp_path: Path, raw: bytes, byte: str) -> None:
        with pytest.raises(DataError, match="not UTF-8 text") as caught:
            rows_of(tmp_path / "rows.jsonl", raw)
        assert byte in caught.value.message

    def test_a_folder_called_like_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").mkdir()
        with pytest.raises(DataError, match="cannot read"):
            read_samples([tmp_path])


class TestAlpaca:
    def test_instruction_and_output_alone(self) -> None:
        assert turns(to_sample(alpaca(), "here")) == ["user: Ask", "assistant: Answer"]

    def test_everything(self) -> None:
        row = alpaca(input="this", system="Be brief", history=[["A?", "B."], ["C?", "D."]], category="x")
        sample = to_sample(row, "rows.json: row 3")
        assert turns(sample) == [
            "system: Be brief",
            "user: A?",
            "assistant: B.",
            "user: C?",
            "assistant: D.",
            "user: Ask\nthis",
            "assistant: Answer",
        ]
        assert (sample.place, sample.system, sample.reference) == ("rows.json: row 3", "Be brief", "Answer")
        assert sample.prompt == sample.messages[:-1]

    @pytest.mark.parametrize("key", ["input", "system", "history"])
    @pytest.mark.parametrize("nothing", [None, "absent"])
    def test_what_is_left_out_asks_for_nothing(self, key: str, nothing: str | None) -> None:
        row = alpaca() if nothing == "absent" else alpaca(**{key: None})
        assert turns(to_sample(row, "here")) == ["user: Ask", "assistant: Answer"]

    def test_the_question_may_stand_in_input_alone(self) -> None:
        assert turns(to_sample(alpaca(instruction="", input="2 + 2"), "here"))[0] == "user: 2 + 2"


class TestMessages:
    def test_turns_as_they_are(self) -> None:
        said = ["system: S", "user: A", "assistant: B", "user: C", "assistant:  D\n"]
        assert turns(to_sample(chat(*said), "here")) == said

    def test_messages_win_where_a_row_has_both_formats(self) -> None:
        row = chat("user: A", "assistant: B") | alpaca()
        assert turns(to_sample(row, "here")) == ["user: A", "assistant: B"]

    def test_a_last_question_without_an_answer_is_context(self) -> None:
        sample = to_sample(chat("user: A", "assistant: B", "user: C"), "here")
        assert (sample.reference, len(sample.prompt)) == ("B", 1)


PAIRS = r"history must be a list of \[question, answer\] pairs"
REFUSED = {
    "unknown keys": ({"story": "x", "id": 1}, r"a row with the keys \{id, story\} is in no known format"),
    "preferences": ({"prompt": "x", "chosen": "y", "rejected": "z"}, "holds preferences"),
    "no keys": ({}, r"a row with the keys \{\} is in no known format"),
    "half a row": ({"instruction": "Ask"}, r"the keys \{instruction\}"),
    "number as output": (alpaca(output=7), "output must be text, not int"),
    "list as instruction": (alpaca(instruction=["Ask"]), "instruction must be text, not list"),
    "false as input": (alpaca(input=False), "input must be text, not bool"),
    "history of texts": (alpaca(history=["A", "B"]), PAIRS),
    "history of triples": (alpaca(history=[["A", "B", "C"]]), PAIRS),
    "history of numbers": (alpaca(history=[[1, 2]]), "a turn of history must be text, not int"),
    "number as history": (alpaca(history=3), PAIRS),
    "text as history": (alpaca(history="A"), PAIRS),
    "empty answer": (alpaca(output=""), "an empty turn"),
    "null answer": (alpaca(output=None), "an empty turn"),
    "answer of spaces": (alpaca(output=" \n\t"), "an empty turn"),
    "empty question": (alpaca(instruction=""), "an empty turn"),
    "empty turn in the history": (alpaca(history=[["A", ""]]), "an empty turn"),
    "messages as text": ({"messages": "Hi"}, "messages must be a list, not str"),
    "message as text": ({"messages": ["Hi"]}, "message 1 needs a role out of system, user, assistant"),
    "no role": ({"messages": [{"content": "Hi"}]}, "message 1 needs a role"),
    "role that cannot be compared": ({"messages": [{"role": ["user"], "content": "Hi"}]}, "needs a role"),
    "unknown role": (chat("user: A", "narrator: B"), "message 2 needs a role"),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "message 1 has a part of type image_url; only text is read",
    ),
    "tool calls": (
        {"messages": [{"role": "user", "content": "A", "tool_calls": [{"name": "f"}]}]},
        "message 1: only an assistant calls tools, not user",
    ),
    "a name": (
        {"messages": [{"role": "user", "content": "A", "name": "x"}]},
        "has name, which is not supported",
    ),
    "a tool call without a name": (
        chat("user: A", assistant={"tool_calls": [{"function": {}}]}),
        "a tool call of message 2 must be an object with a name and arguments",
    ),
    "arguments that are no JSON": (
        chat("user: A", assistant={"tool_calls": [{"name": "f", "arguments": "{"}]}),
        "the arguments of a tool call of message 2 is not JSON",
    ),
    "a result of no call": (
        chat("user: A", assistant={"tool_calls": [{"id": "1", "name": "f"}]}, tool={"tool_call_id": "2"}),
        "message 3 answers the tool call '2', which nobody made",
    ),
    "a result of one of two calls": (
        chat("user: A", assistant={"tool_calls": [{"name": "f"}, {"name": "g"}]}, tool={}),
        "message 3 has no tool_call_id",
    ),
    "a result of nothing": (chat("user: A", tool={"content": "x"}), "no assistant turn"),
    "half a weight": (
        chat("user: A", assistant={"weight": 0.5, "content": "B"}),
        "message 2: weight must be 0 or 1",
    ),
    "train as text": (
        chat("user: A", assistant={"train": "no", "content": "B"}),
        "train must be true or false",
    ),
    "weight against train": (
        chat("user: A", assistant={"train": False, "weight": 1, "content": "B"}),
        "train and weight contradict each other",
    ),
    "tools of numbers": (chat("user: A", "assistant: B") | {"tools": [1]}, "each of tools must be an object"),
    "tools that are no JSON": (chat("user: A", "assistant: B") | {"tools": "[{"}, "tools is not JSON"),
    "unknown sharegpt role": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "message 1 needs a from out of human, .*; found 'narrator'",
    ),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f()"}]},
        "a tool call of message 2 is not JSON",
    ),
    "no completion": ({"prompt": "x", "completion": ""}, "completion is empty"),
    "empty text": ({"text": " \n"}, "text is empty"),
    "no label": (
        {"text": "x", "label": None},
        "label must be a name or a whole number of at least 0, not null",
    ),
    "a label below 0": ({"text": "x", "label": -1}, "not -1"),
    "a label that is no number": ({"text": "x", "label": float("nan")}, "not nan"),
    "late system": (chat("user: A", "system: S", "assistant: B"), "a system message may only come first"),
    "two systems": (chat("system: S", "system: T", "user: A", "assistant: B"), "may only come first"),
    "no answers": (chat("system: S", "user: A"), "no assistant turn: there is nothing to learn here"),
    "no turn": ({"messages": []}, "no assistant turn"),
    "two questions": (
        chat("user: A", "user: B", "assistant: C"),
        "turns must alternate user, assistant, …; found user, user, assistant",
    ),
    "answer first": (chat("assistant: A", "user: B"), "found assistant, user"),
    "two answers": (chat("user: A", "assistant: B", "assistant: C"), "must alternate"),
    "lone surrogate": (alpaca(output="ab\ud800"), "output holds a lone surrogate at character 2"),
    "lone surrogate in a message": (chat("user: \udfff", "assistant: B"), "content holds a lone surrogate"),
    "lone surrogate in the history": (
        alpaca(history=[["A", "\ud83d"]]),
        "a turn of history holds a lone surrogate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_cannot_be_used_says_why(name: str) -> None:
    row, message = REFUSED[name]
    with pytest.raises(DataError, match=message) as caught:
        to_sample(row, "rows.jsonl:7")
    assert caught.value.place == "rows.jsonl:7"
    assert caught.value.exit_code == 3


def test_many_rows_are_refused() -> None:
    assert len(REFUSED) >= 30


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(DataError) as caught:
        to_sample({"prompt": "x"}, "here")
    assert str(caught.value.remedy).startswith(
        "needed: {messages} or {conversations} or {instruction, output} or "
    )


def test_an_escaped_surrogate_in_a_file_is_found_at_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(alpaca()) + '\n{"instruction": "A", "output": "\\ud83d"}\n')
    with pytest.raises(DataError, match="lone surrogate") as caught:
        read_samples([path])
    assert caught.value.place == f"{path}:2 (byte 43)"
    assert caught.value.message.endswith('in {"instruction": "A", "output": "\\ud83d"}')


def test_max_samples_counts_in_each_data_set_and_does_not_look_further(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rows = [json.dumps(alpaca(output=f"{name}{n}")) for n in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows, "broken"]))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    samples = read_samples(files, max_samples=2).samples
    assert [sample.reference for sample in samples] == ["a0", "a1", "b0", "b1"]


def test_shared_system() -> None:
    def sample(system: str | None) -> Sample:
        first = [] if system is None else [Message("system", system)]
        return Sample((*first, Message("user", "A"), Message("assistant", "B")), "here")

    assert shared_system([sample("S"), sample("S")]) == "S"
    assert shared_system([sample("S"), sample("T")]) is None
    assert shared_system([sample("S"), sample(None)]) is None
    assert shared_system([sample(None)]) is None


class TestOtherFormats:
    def test_sharegpt_with_tools(self) -> None:
        row = {
            "system": "S",
            "tools": '[{"name": "f", "parameters": {}}]',
            "conversations": [
                {"from": "human", "value": "A"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "B", "weight": 0},
            ],
        }
        sample = to_sample(row, "here")
        assert turns(sample) == ["system: S", "user: A", "assistant: ", "tool: 3", "assistant: B"]
        assert sample.messages[2].tool_calls == ({"name": "f", "arguments": {"x": 1}},)
        assert sample.messages[4].train is False
        assert sample.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)

    def test_a_system_turn_wins_over_the_system_column(self) -> None:
        said = [
            {"from": "system", "value": "T"},
            {"from": "human", "value": "A"},
            {"from": "gpt", "value": "B"},
        ]
        assert turns(to_sample({"system": "S", "conversations": said}, "here"))[0] == "system: T"

    def test_either_kind_of_turn_under_either_key(self) -> None:
        ours = [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]
        theirs = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        for row in (
            {"messages": ours},
            {"conversations": ours},
            {"messages": theirs},
            {"conversations": theirs},
        ):
            assert turns(to_sample(row, "here")) == ["user: A", "assistant: B"]

    def test_openai_with_everything(self) -> None:
        call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
        row = {
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "messages": [
                {"role": "developer", "content": "S"},
                {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
                {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
                {"role": "tool", "tool_call_id": "c1", "name": "f", "content": ""},
                {
                    "role": "assistant",
                    "content": "C",
                    "reasoning_content": "so",
                    "train": True,
                    "refusal": None,
                },
            ],
        }
        sample = to_sample(row, "here")
        assert turns(sample) == ["system: S", "user: AB", "assistant: ", "tool: ", "assistant: C"]
        assert [m.train for m in sample.messages] == [None, None, False, None, True]
        assert sample.messages[2].tool_calls == ({"name": "f", "arguments": {"x": [1]}},)
        assert sample.messages[4].thinking == "so"
        assert sample.tools == ({"type": "function", "function": {"name": "f"}},)

    def test_prompt_and_completion_stand_as_they_are(self) -> None:
        sample = to_sample({"prompt": "A ", "completion": " B\n"}, "here")
        assert (sample.kind, turns(sample)) == ("completion", ["user: A ", "assistant:  B\n"])

    def test_prompt_and_completion_of_messages(self) -> None:
        prompt = chat("user: A", "assistant: B", "user: C")["messages"]
        sample = to_sample({"prompt": prompt, "completion": chat("assistant: D")["messages"]}, "here")
        assert (sample.kind, [m.train for m in sample.messages]) == ("chat", [False, False, False, None])

    def test_text(self) -> None:
        sample = to_sample({"text": " Once\n", "id": 3}, "here")
        assert (sample.kind, turns(sample)) == ("text", ["assistant:  Once\n"])

    @pytest.mark.parametrize(("label", "name"), [("good", "good"), (0, "0"), ("1", "1")])
    def test_classification(self, label: object, name: str) -> None:
        sample = to_sample({"text": "x", "label": label}, "here")
        assert (sample.kind, sample.label, turns(sample)) == ("chat", name, ["user: x", f"assistant: {name}"])

    @pytest.mark.parametrize("text", ["a\x00b", "שלום", "👩‍👩‍👧", "a\u2028b", "<|im_end|>"])
    def test_strange_text_goes_through_unchanged(self, text: str) -> None:
        assert to_sample(alpaca(output=text), "here").reference == text
