"""Pictures with labels: a folder of them, or rows of ``{image, label}``. Pillow decodes them when asked to."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.sources import find_files, raw_rows
from lorakit.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PIXEL_LIMIT = 100_000_000


@dataclass(frozen=True)
class Picture:
    """One picture, not decoded yet.

    Attributes:
        source: its file, or the bytes of one.
        label: its class, if it has one.
        place: where the row stands.
    """

    source: Path | bytes
    label: str | None
    place: str

    def load(self) -> Image:
        """Decode it, as RGB.

        Raises:
            DataError: it is no picture, damaged, or beyond `PIXEL_LIMIT`.
        """
        from PIL import Image

        stream = io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source
        try:
            with Image.open(stream) as picture:
                width, height = picture.size
                if width * height > PIXEL_LIMIT:
                    raise DataError(f"a picture of {width} × {height} pixels", place=self.place)
                return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"not a picture, or damaged: {error}", place=self.place) from error


def read_pictures(path: str | Path) -> Iterator[Picture]:
    """The pictures of a folder (with one subfolder a class, or none), or the rows of a data file.

    Raises:
        DataError: there is none, or a row has no picture.
    """
    path = Path(path)
    pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else []
    for picture in pictures:
        inside = picture.relative_to(path).parts
        if len(inside) > 2:
            raise DataError("pictures lie in the folder or in one subfolder a class", place=str(picture))
        yield Picture(picture, inside[0] if len(inside) == 2 else None, str(picture))
    if not pictures:
        for file in find_files(path):
            for row in raw_rows(file):
                if row.problem is not None:
                    raise DataError(row.problem, place=row.place)
                yield _from_row(row.value, file.parent, row.place)


def _from_row(row: Any, folder: Path, place: str) -> Picture:
    if not isinstance(row, dict) or row.get("image") is None:
        raise DataError("a row of pictures needs the keys image and, if wanted, label", place=place)
    image, label = row["image"], row.get("label")
    if isinstance(image, dict):  # as `datasets` stores it
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | bytes):
        raise DataError(f"image must be a path or bytes, not {type(image).__name__}", place=place)
    if not isinstance(label, str | int | None) or isinstance(label, bool):
        raise DataError(f"label must be a name or a whole number, not {type(label).__name__}", place=place)
    source = folder / image if isinstance(image, str) else image
    return Picture(source, None if label is None else str(label), place)
