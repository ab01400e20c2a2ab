"""The door of the data: names, registries, bad rows, mixing and splitting."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorakit.config.load import load_mapping
from lorakit.config.resolve import resolve
from lorakit.data.configured import read_data
from lorakit.data.hub import HubSet, hub_rows
from lorakit.data.mix import Mix, blend, draw, split_rows
from lorakit.data.reading import Reading, SampleStream, find_sets, read_samples
from lorakit.errors import ConfigError, DataError


def rows(path: Path, *answers: str) -> Path:
    """A JSONL file; an empty answer is a bad row."""
    path.write_text("".join(json.dumps({"prompt": "x", "completion": answer}) + "\n" for answer in answers))
    return path


def answers(reading: Reading) -> list[str]:
    return [sample.reference for sample in reading.samples]


class TestBadRows:
    def test_error_names_row_byte_snippet_and_rule(self, tmp_path: Path) -> None:
        path = rows(tmp_path / "a.jsonl", "1", "", "3")
        with pytest.raises(DataError) as caught:
            read_samples([path])
        assert caught.value.place == f"{path}:2 (byte 35)"
        assert caught.value.message == 'completion is empty, in {"prompt": "x", "completion": ""}'

    def test_skip_counts_them(self, tmp_path: Path) -> None:
        path = rows(tmp_path / "a.jsonl", "1", "", "3")
        path.write_text(path.read_text() + "{broken\n[]\n")
        reading = read_samples([path], on_bad_row="skip", max_bad_rows=0.6)
        assert answers(reading) == ["1", "3"]
        assert (reading.read, reading.bad, reading.formats) == (5, 3, {"prompt/completion": 2})
        assert reading.files == (path,)
        assert "completion is empty" in reading.problems[0]
        assert "not JSON" in reading.problems[1]
        assert "must be a JSON object" in reading.problems[2]

    def test_too_many(self, tmp_path: Path) -> None:
        path = rows(tmp_path / "a.jsonl", "1", "", "3")
        with pytest.raises(
            DataError, match=r"1 of 3 rows are bad, more than max_bad_rows \(5\.0%\) allows"
        ) as caught:
            read_samples([path], on_bad_row="skip")
        assert f"{path}:2 (byte 35)" in caught.value.message

    def test_a_first_bad_row_does_not_decide_the_format(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"x": 1}\n{"text": "a"}\n{"text": "b"}\n')
        assert answers(read_samples([path], on_bad_row="skip", max_bad_rows=0.5)) == ["a", "b"]

    def test_rows_of_another_format(self, tmp_path: Path) -> None:
        path = rows(tmp_path / "a.jsonl", "1")
        path.write_text(path.read_text() + '{"text": "b"}\n')
        with pytest.raises(
            DataError, match=r"completion, prompt missing in a row of the format prompt/comp"
        ) as caught:
            read_samples([path])
        assert "found {text}" in caught.value.message
        assert caught.value.remedy == "needed: {completion, prompt}"

    @pytest.mark.parametrize("value", ["x" * 10_000_000, "\ud800" * 90, "\x00", ["y" * 1000] * 1000])
    def test_the_snippet_is_short_and_printable(self, tmp_path: Path, value: Any) -> None:
        (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": value, "completion": 7}))
        with pytest.raises(DataError) as caught:
            read_samples([tmp_path])
        assert len(caught.value.message) < 500
        caught.value.message.encode()


def test_the_format_is_logged_once_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [rows(tmp_path / "a.jsonl", "1", "2"), rows(tmp_path / "b.jsonl", "3")]
    with caplog.at_level(logging.INFO, "lorakit"):
        read_samples(paths, mix=Mix("interleave_over"))
    assert caplog.messages == [f"{path}: rows in the format prompt/completion" for path in paths]


def test_a_csv_holds_lists_as_json(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]).replace(
        '"', '""'
    )
    (tmp_path / "a.csv").write_text(f'messages\n"{turns}"\n')
    assert answers(read_samples([tmp_path])) == ["B"]


class TestRegistry:
    def read(self, folder: Path, entry: dict[str, Any], data: list[dict[str, Any]], **more: Any) -> Reading:
        (folder / "data.json").write_text(json.dumps(data))
        (folder / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "data.json"} | entry}))
        return read_samples(["mine"], dataset_dir=folder, **more)

    def test_alpaca_under_other_names(self, tmp_path: Path) -> None:
        entry = {"columns": {"prompt": "q", "query": "q2", "response": "a", "system": "s", "history": "h"}}
        row = {"q": "A", "q2": "B", "a": "C", "s": "S", "h": [["1", "2"]], "output": "no"}
        (sample,) = self.read(tmp_path, entry, [row]).samples
        assert [m.content for m in sample.messages] == ["S", "1", "2", "A\nB", "C"]

    def test_defaults_take_no_further_columns(self, tmp_path: Path) -> None:
        (sample,) = self.read(tmp_path, {}, [{"instruction": "A", "output": "B", "system": "S"}]).samples
        assert [m.content for m in sample.messages] == ["A", "B"]

    def test_a_prompt_alone_is_text(self, tmp_path: Path) -> None:
        (sample,) = self.read(tmp_path, {"columns": {"prompt": "story"}}, [{"story": "Once"}]).samples
        assert (sample.kind, sample.reference) == ("text", "Once")

    def test_sharegpt_with_tags(self, tmp_path: Path) -> None:
        entry = {
            "formatting": "sharegpt",
            "columns": {"messages": "turns", "system": "sys", "tools": "t"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "Q", "assistant_tag": "A",
                     "function_tag": "F", "observation_tag": "O", "system_tag": "X"},
        }  # fmt: skip
        said = [("Q", "1"), ("F", '{"name": "f", "arguments": {}}'), ("O", "2"), ("A", "3")]
        row = {"turns": [{"who": who, "says": says} for who, says in said], "sys": "S", "t": "[]"}
        (sample,) = self.read(tmp_path, entry, [row]).samples
        assert [m.role for m in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
        assert sample.tools == ()

    def test_sharegpt_of_openai_turns(self, tmp_path: Path) -> None:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        entry = {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": tags | {"system_tag": "system"},
        }
        turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        assert answers(self.read(tmp_path, entry, [{"messages": turns}])) == ["B"]
        assert answers(self.read(tmp_path, {"formatting": "openai"}, [{"messages": turns}])) == ["B"]

    @pytest.mark.parametrize(("wanted", "expected"), [(2, 2), (3, 3), (5, 5)])
    def test_num_samples_are_drawn(self, tmp_path: Path, wanted: int, expected: int) -> None:
        data = [{"instruction": "A", "output": str(n)} for n in range(3)]
        first = answers(self.read(tmp_path, {"num_samples": wanted}, data))
        assert len(first) == expected
        assert first == sorted(first) == answers(self.read(tmp_path, {"num_samples": wanted}, data))
        assert len(set(first)) == min(wanted, 3)

    def test_a_local_copy_of_a_hub_data_set_is_taken_first(self, tmp_path: Path) -> None:
        (tmp_path / "owner" / "name").mkdir(parents=True)
        (tmp_path / "owner" / "name" / "a.jsonl").write_text('{"instruction": "A", "output": "B"}')
        (tmp_path / "dataset_info.json").write_text('{"mine": {"hf_hub_url": "owner/name"}}')
        assert answers(read_samples(["mine"], dataset_dir=tmp_path)) == ["B"]

    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            ({"ranking": True}, "ranking: it belongs to preference training"),
            ({"columns": {"prompt": "a", "chosen": "b"}}, "chosen is known but not built: it"),
            ({"columns": {"prompt": "a", "kto_tag": "b"}}, "kto_tag is known but not built"),
            ({"columns": {"prompt": "a", "images": "b"}}, "images is known but not built: only text"),
            ({"script_url": "x"}, "script_url is known but not built: loading scripts are code"),
            ({"fromatting": "alpaca"}, "unknown key fromatting"),
            ({"tags": {"roletag": "x"}, "formatting": "sharegpt"}, "unknown key roletag"),
            ({"formatting": "chatml"}, "formatting must be one of alpaca, sharegpt, openai, not 'chatml'"),
            ({"num_samples": 0}, "num_samples must be a whole number of at least 1"),
            ({"columns": {"query": "x"}}, "alpaca needs the columns prompt and response"),
            ({"columns": [1]}, "must be an object, not list"),
            ({"file_name": None}, "the entry names no data"),
            ({"file_name": 3}, "file_name must be text, not int"),
            ({"columns": {"prompt": "q", "response": "r"}}, "q, r missing in a row of the format alpaca"),
        ],
    )  # fmt: skip
    def test_refused(self, tmp_path: Path, entry: dict[str, Any], said: str) -> None:
        with pytest.raises(DataError, match=said):
            self.read(tmp_path, entry, [{"instruction": "A", "output": "B"}])

    def test_a_near_name_is_offered(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as caught:
            self.read(tmp_path, {"fromatting": "alpaca"}, [])
        assert caught.value.remedy == "did you mean formatting?"

    @pytest.mark.parametrize("text", ["[1]", "{", '{"a": {}, "a": {}}'])
    def test_a_broken_registry(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "dataset_info.json").write_text(text)
        with pytest.raises(DataError, match="registry"):
            read_samples(["a"], dataset_dir=tmp_path)


class TestHub:
    def test_rows_and_class_names(self, tmp_path: Path) -> None:
        features = {
            "label": {"_type": "ClassLabel", "names": ["bad", "good"]},
            "text": {"_type": "Value", "dtype": "string"},
        }
        note = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.Table.from_pylist([{"text": "x", "label": 1}, {"text": "y", "label": 0}])
        pq.write_table(table.replace_schema_metadata(note), tmp_path / "train.parquet")
        found = list(hub_rows(HubSet(str(tmp_path), streaming=True)))
        assert [row.value["label"] for row in found] == ["good", "bad"]
        assert found[1].place == f"{tmp_path}: row 2"

    def test_without_a_network(self) -> None:
        with pytest.raises(DataError, match="no such file or folder, and the hub gives no data set") as caught:
            read_samples(["owner/name"])
        assert caught.value.exit_code == 3

    def test_a_local_path_is_tried_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "owner").mkdir()
        (tmp_path / "owner" / "name").mkdir()
        rows(tmp_path / "owner" / "name" / "a.jsonl", "1")
        monkeypatch.chdir(tmp_path)
        assert answers(read_samples(["owner/name"])) == ["1"]
        assert answers(read_samples(["name"], dataset_dir=tmp_path / "owner")) == ["1"]


class TestMix:
    ROWS = ("abc", "xy")

    def mixed(self, strategy: Any, shares: tuple[float, ...] | None = None, seed: int = 0) -> str:
        return "".join(blend([lambda part=part: part for part in self.ROWS], Mix(strategy, shares), seed))

    def test_orders(self) -> None:
        assert self.mixed("concat") == "abcxy"
        assert self.mixed("interleave_under") == "axby"
        assert self.mixed("interleave_over") == "axbycx"

    def test_shares(self) -> None:
        assert self.mixed("interleave_under", (1.0, 0.0)) == "abc"
        assert self.mixed("interleave_over", (0.0, 3.0)) == "xy"
        for seed in range(20):
            under, over = (self.mixed(f"interleave_{kind}", (0.5, 0.5), seed) for kind in ("under", "over"))
            assert ("c" in under) != ("y" in under)
            assert set(over) == set("abcxy")
            assert over.startswith(under)
            assert over == self.mixed("interleave_over", (0.5, 0.5), seed)

    def test_shares_come_out_right(self) -> None:
        drawn = list(
            blend([lambda: "a" * 5000, lambda: "b" * 5000], Mix("interleave_under", (0.8, 0.2)), seed=1)
        )
        assert drawn.count("a") / len(drawn) == pytest.approx(0.8, abs=0.02)

    def test_wrong_number_and_nothing_to_mix(self) -> None:
        with pytest.raises(DataError, match="1 probabilities for 2 data sets"):
            self.mixed("interleave_under", (1.0,))
        with pytest.raises(DataError, match="without rows"):
            list(blend([list, lambda: ["a"]], Mix("interleave_over"), 0))

    def test_rows_that_come_again_are_counted_once(self, tmp_path: Path) -> None:
        sets = find_sets([rows(tmp_path / "a.jsonl", "1", "2", "3"), rows(tmp_path / "b.jsonl", "4")])
        stream = SampleStream(sets, mix=Mix("interleave_over"))
        assert [sample.reference for sample in stream] == ["1", "4", "2", "4", "3", "4"]
        assert (stream.counts.read, stream.counts.formats) == (4, {"prompt/completion": 4})
        assert [sample.reference for sample in stream][:2] == ["1", "4"]

    def test_split(self) -> None:
        numbers = list(range(100))
        for size, count in ((0.1, 10), (7, 7), (0.004, None), (100, None)):
            if count is None:
                with pytest.raises(DataError, match=f"val_size {size:g} of 100 rows"):
                    split_rows(numbers, size, 1)
                continue
            kept, held = split_rows(numbers, size, 1)
            assert (len(held), sorted(kept + held)) == (count, numbers)
            assert (kept, held) == (sorted(kept), sorted(held)) == split_rows(numbers, size, 1)
            assert held != split_rows(numbers, size, 2)[1]

    def test_draw_is_fair(self) -> None:
        drawn = [number for seed in range(300) for number in draw(range(10), 3, seed)]
        assert all(60 <= drawn.count(number) <= 125 for number in range(10))
        assert draw([], 3, 0) == []


class TestConfiguration:
    def resolved(self, folder: Path, **keys: Any) -> Any:
        needed = {"model_name_or_path": "owner/model", "output_dir": "out", "dataset": "a.jsonl"}
        return resolve(load_mapping(needed | keys, folder))

    def test_names_stay_names_and_paths_become_absolute(self, tmp_path: Path) -> None:
        (tmp_path / "dataset_info.json").write_text('{"mine": {}}')
        names = "mine, owner/name, owner/name-v1.5, a.jsonl, sub/b.jsonl.gz, data"
        assert self.resolved(tmp_path, dataset=names).dataset == (
            "mine",
            "owner/name",
            "owner/name-v1.5",
            str(tmp_path / "a.jsonl"),
            str(tmp_path / "sub/b.jsonl.gz"),
            str(tmp_path / "data"),
        )

    def test_reading_a_run(self, tmp_path: Path) -> None:
        (tmp_path / "dataset_info.json").write_text(
            '{"mine": {"file_name": "b.jsonl", "columns": {"prompt": "t"}}}'
        )
        (tmp_path / "b.jsonl").write_text('{"t": "1"}\n{"t": "2"}\n')
        rows(tmp_path / "a.jsonl", "3", "4", "", "5")
        keys = {"on_bad_row": "skip", "max_bad_rows": 0.3, "mix_strategy": "interleave_under"}
        data = read_data(self.resolved(tmp_path, dataset="mine, a.jsonl", val_size=0.25, **keys))
        assert sorted(sample.reference for sample in data.samples + data.held_out) == ["1", "2", "3", "4"]
        assert (len(data.held_out), data.training.bad) == (1, 1)
        data = read_data(self.resolved(tmp_path, dataset="mine", eval_dataset="a.jsonl", **keys))
        assert [s.reference for s in data.held_out] == ["3", "4", "5"]

    def test_val_size_means_evaluation(self, tmp_path: Path) -> None:
        settings = self.resolved(tmp_path, val_size=100, predict_with_generate=True)
        assert (settings.do_eval, settings.val_size) == (True, 100)
        assert settings.origins["do_eval"] == "derived: val_size is given"

    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            ({"val_size": 0.1, "eval_dataset": "b"}, "both say which rows are held out"),
            ({"val_size": 1.5}, "neither a share below 1 nor a whole number"),
            ({"interleave_probs": 1.0}, "no meaning when data sets come one after the other"),
            (
                {"interleave_probs": "0.5,0.5", "mix_strategy": "interleave_under"},
                "one number for each data set",
            ),
            ({"interleave_probs": [0], "mix_strategy": "interleave_over"}, "all zero"),
            ({"interleave_probs": "much"}, r"must be a number or list of numbers, not \"much"),
            ({"mix_strategy": "concatenate"}, "did you mean `concat`"),
            ({"on_bad_row": "ignore"}, "`on_bad_row` must be one of the allowed values"),
            ({"max_bad_rows": 1.0}, "below 1"),
        ],
    )
    def test_refused(self, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            self.resolved(tmp_path, **keys)
