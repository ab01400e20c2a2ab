"""Files of every kind and packing give the same rows; what is damaged, cut or a bomb is refused."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lorakit.data import compression, json_rows
from lorakit.data.raw import RawRow
from lorakit.data.sources import KINDS, kind_of, raw_rows
from lorakit.errors import DataError

ROWS = [
    {"prompt": "a, “b”\n", "completion": "c"},
    {"prompt": "", "completion": "é👩‍👩‍👧"},
    {"prompt": "\tx", "completion": '"'},
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in a file of the kind that its name says."""
    match kind_of(path):
        case ".jsonl":
            text = "\n".join(json.dumps(row) for row in rows)
        case ".json":
            text = json.dumps(rows, ensure_ascii=False, indent=1)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            return path
        case kind:
            mark = "\t" if kind == ".tsv" else ","
            cells = [list(rows[0]), *(row.values() for row in rows)]
            text = "\r\n".join(mark.join('"' + c.replace('"', '""') + '"' for c in line) for line in cells)
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        half = len(data) // 2  # two frames
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


def values(path: Path, data: str | bytes | None = None) -> list[Any]:
    if data is not None:
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return [row.value if row.problem is None else row.problem for row in raw_rows(path)]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != ".txt"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"rows{kind}{packing}"
    if kind == ".parquet" and packing:
        assert kind_of(path) is None
    else:
        assert values(written(path, ROWS)) == ROWS


class TestPacked:
    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_a_bomb(self, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compression, "EXPANSION_FLOOR", 1_000_000)
        zeros = b" " * 5_000_000
        path = tmp_path / f"rows.jsonl{suffix}"
        with pytest.raises(DataError, match="a compression bomb") as caught:
            values(path, gzip.compress(zeros) if suffix == ".gz" else zstandard.compress(zeros))
        assert caught.value.place == str(path)

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_cut_off(self, tmp_path: Path, suffix: str) -> None:
        path = written(tmp_path / f"rows.jsonl{suffix}", ROWS * 20)
        with pytest.raises(DataError, match="the compressed file is cut off"):
            values(path, path.read_bytes()[:-9])

    @pytest.mark.parametrize("suffix", [".gz", ".zst"])
    def test_not_packed_at_all(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(DataError, match="file, or damaged"):
            values(tmp_path / f"rows.jsonl{suffix}", '{"a": 1}\n')

    def test_a_file_that_is_packed_but_not_called_so(self, tmp_path: Path) -> None:
        (problem,) = values(tmp_path / "rows.jsonl", gzip.compress(b'{"a": 1}')[:10])
        assert problem.startswith("not UTF-8 text (byte 1: 0x8b)")


class TestJson:
    def test_places_and_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        text = '\ufeff[ {"a": "é"},\n {"a": 2} ]\n'
        path.write_text(text)
        first, second = raw_rows(path)
        assert (first.place, first.offset) == (f"{path}: row 1", 5)
        assert (second.place, second.offset) == (f"{path}: row 2", text.encode().index(b'{"a": 2}'))

    def test_columns(self, tmp_path: Path) -> None:
        assert values(tmp_path / "rows.json", '{"a": [1, 2], "b": ["x", "y"]}') == [
            {"a": 1, "b": "x"},
            {"a": 2, "b": "y"},
        ]

    @pytest.mark.parametrize(
        ("text", "said"),
        {
            '{"a": [1, 2], "b": []}': "columns of different length: a 2, b 0",
            '{"a": [1], "b": 3}': r"a \.json file must hold a list of rows",
            "7": "must hold a list of rows",
            '[{"a": 1}': "Expecting ',' delimiter",
            '[{"a": 1},': "Expecting value",
            '[{"a": 1},]': "Expecting value",
            '[{"a": 1} {"a": 2}]': r"Expecting ',' delimiter near '\[\{\"a\": 1\} \{\"a\": 2\}\]'",
            '[{"a": 1}] x': "Extra data",
            '[{"a": "x': "Unterminated string",
            '[{"a": tru': "Expecting value",
            '[{"a": 1, wrong}]': "Expecting property name",
        }.items(),
    )
    def test_broken(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(DataError, match=said):
            values(tmp_path / "rows.json", text)

    def test_the_byte_of_a_mistake(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        with pytest.raises(DataError) as caught:
            values(path, '[{"a": "éé"}, {"a" 2}]')
        start = len('[{"a": "éé"}, {"a" '.encode())
        assert caught.value.place == f"{path} (byte {start})"

    @pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
    def test_rows_that_are_cut_anywhere_by_the_reading(
        self, tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(json_rows, "_PIECE", piece)
        rows = [{"t": 'é\u2028👩 \\ " \ud83d', "n": [1.5e-3, -12, True, None, {}]}, {}, {"u": "x" * 200}]
        text = json.dumps(rows[:1])[:-1] + "," + json.dumps(rows[1:], ensure_ascii=False)[1:]
        assert values(tmp_path / "rows.json", text) == rows

    def test_a_large_row(self, tmp_path: Path) -> None:
        row = {"t": "é" * 5_000_000}
        assert values(tmp_path / "rows.json", json.dumps([row, row], ensure_ascii=False)) == [row, row]
        assert values(tmp_path / "rows.jsonl", json.dumps(row) + "\n" + json.dumps(row)) == [row, row]

    def test_a_row_beyond_the_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(json_rows, "ROW_LIMIT", 1_000)
        row = json.dumps({"t": "x" * 2_000})
        with pytest.raises(DataError, match="a row of more than 0 MiB"):
            values(tmp_path / "rows.jsonl", row)

    @pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv"])
    def test_memory_does_not_grow_with_the_file(self, tmp_path: Path, kind: str) -> None:
        path = written(tmp_path / f"rows{kind}", [{"a": "x" * 200, "b": str(n)} for n in range(8_000)])
        tracemalloc.start()
        count = sum(1 for _ in raw_rows(path))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == 8_000
        assert path.stat().st_size > 1_600_000
        assert peak < 800_000


class TestTables:
    def test_bad_rows_do_not_end_the_reading(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        rows = values(path, b'\xef\xbb\xbfa,b\n1,2\n\n1,2,3\n1,\xff\n1,"x"y\n"3\n4",5\n')
        assert rows == [
            {"a": "1", "b": "2"},
            "the row has 3 cells, the header names 2",
            "not UTF-8 text (byte 20: 0xff)",
            "not a row of a table: ',' expected after '\"'",
            {"a": "3\n4", "b": "5"},
        ]
        assert [row.offset for row in raw_rows(path)] == [7, 12, 18, 22, 29]

    @pytest.mark.parametrize(
        ("header", "said"),
        [
            ("a,b,a", "the header names a twice"),
            ("a,,b", "the header has no name for column 2"),
            ('a,"b', "the header: not a row of a table"),
        ],
    )
    def test_a_bad_header(self, tmp_path: Path, header: str, said: str) -> None:
        with pytest.raises(DataError, match=said):
            values(tmp_path / "rows.csv", header + "\n1,2,3\n")

    def test_a_large_cell(self, tmp_path: Path) -> None:
        assert values(tmp_path / "rows.tsv", f"a\tb\n{'x' * 1_000_000}\ty\n") == [
            {"a": "x" * 1_000_000, "b": "y"}
        ]

    def test_a_header_alone_is_no_row(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="the file holds no rows"):
            values(tmp_path / "rows.csv", "a,b\n")

    def test_class_names_of_a_parquet_file(self, tmp_path: Path) -> None:
        features = {"label": {"_type": "ClassLabel", "names": ["bad", "good"]}, "text": {"_type": "Value"}}
        table = pa.Table.from_pylist([{"text": "x", "label": 1}, {"text": "y", "label": 2}])
        note = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(note), tmp_path / "rows.parquet")
        assert values(tmp_path / "rows.parquet") == [
            {"text": "x", "label": "good"},
            "label 2 is none of the 2 classes",
        ]

    def test_not_a_parquet_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="not a Parquet file, or damaged"):
            values(tmp_path / "rows.parquet", "PAR1")


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\ufeffOnce\n\nupon a time\n")
    assert list(raw_rows(path)) == [RawRow(str(path), {"text": "Once\n\nupon a time\n"}, 0)]
