"""Pictures with labels, decoded when they are asked for."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lorakit.data import vision
from lorakit.data.vision import read_pictures
from lorakit.errors import DataError


def picture(path: Path | io.BytesIO, color: str = "red", mode: str = "RGB") -> None:
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3), color).save(path, "PNG")


def test_a_folder_of_classes(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "2.png", "blue")
    picture(tmp_path / "cat" / "1.PNG")
    (tmp_path / "dog" / "notes.txt").touch()
    cat, dog = read_pictures(tmp_path)
    assert [(p.label, p.place) for p in (cat, dog)] == [
        ("cat", str(tmp_path / "cat" / "1.PNG")),
        ("dog", str(tmp_path / "dog" / "2.png")),
    ]
    assert (dog.load().getpixel((0, 0)), dog.load().size) == ((0, 0, 255), (4, 3))


def test_a_folder_without_classes(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    assert [p.label for p in read_pictures(tmp_path)] == [None]
    picture(tmp_path / "a" / "b" / "1.png")
    with pytest.raises(DataError, match="one subfolder a class"):
        list(read_pictures(tmp_path))


def test_rows_with_paths(tmp_path: Path) -> None:
    picture(tmp_path / "in" / "1.png", mode="L", color="white")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "in/1.png", "label": 3}))
    (row,) = read_pictures(tmp_path / "rows.jsonl")
    assert (row.label, row.load().mode) == ("3", "RGB")


def test_rows_with_bytes_and_class_names(tmp_path: Path) -> None:
    stream = io.BytesIO()
    picture(stream)
    note = {
        "huggingface": json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat"]}}}})
    }
    table = pa.Table.from_pylist([{"image": {"bytes": stream.getvalue(), "path": "1.png"}, "label": 0}])
    pq.write_table(table.replace_schema_metadata(note), tmp_path / "rows.parquet")
    (row,) = read_pictures(tmp_path / "rows.parquet")
    assert (row.label, row.load().size) == ("cat", (4, 3))


def test_nothing_is_decoded_before(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_text("no picture")
    (broken,) = read_pictures(tmp_path)
    with pytest.raises(DataError, match="not a picture, or damaged") as caught:
        broken.load()
    assert caught.value.place == str(tmp_path / "1.png")


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "1.png")
    monkeypatch.setattr(vision, "PIXEL_LIMIT", 11)
    (large,) = read_pictures(tmp_path)
    with pytest.raises(DataError, match="a picture of 4 × 3 pixels"):
        large.load()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"picture": "x"}, "needs the keys image"),
        ({"image": 3}, "image must be a path or bytes, not int"),
        ({"image": "x.png", "label": 0.5}, "label must be a name or a whole number, not float"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, row: dict[str, object], said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=said):
        list(read_pictures(tmp_path / "rows.jsonl"))
