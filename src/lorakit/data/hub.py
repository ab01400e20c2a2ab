"""Data sets of the Hugging Face hub, through `datasets`, which is loaded when one is asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorakit.data.raw import RawRow
from lorakit.data.tables import named_classes
from lorakit.errors import DataError
from lorakit.log import logger

_HUB_ID = re.compile(r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]*(?<![.-])", re.ASCII)
_PAUSES = (1.0, 4.0, 16.0)  # seconds before each new try


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub.

    Attributes:
        name: ``owner/name``.
        subset: the configuration of it, where it has several.
        split: train, test, …
        folder: the folder of the repository that holds its files.
        streaming: fetch rows as they are needed, not the whole data set first.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    streaming: bool = False


def is_hub_id(name: str) -> bool:
    """Whether the hub could have a data set of this name."""
    return _HUB_ID.fullmatch(name) is not None


def hub_rows(source: HubSet) -> Iterator[RawRow]:
    """The rows of a hub data set; a stream that breaks is taken up again where it broke.

    Raises:
        DataError: there is none of this name, or the hub cannot be reached.
    """
    rows, number, tries = _open(source), 0, 0
    classes = {column: kind.names for column, kind in (rows.features or {}).items() if _is_class(kind)}
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            break
        except (OSError, ValueError) as error:
            if tries == len(_PAUSES):
                raise _unreachable(source, error) from error
            logger.warning("%s: the stream broke after row %d (%s); trying again", source.name, number, error)
            time.sleep(_PAUSES[tries])
            tries += 1
            iterator = iter(_open(source).skip(number))
        else:
            number, tries = number + 1, 0
            yield named_classes(RawRow(f"{source.name}: row {number}", row), classes)
    if not number:
        raise DataError("the data set holds no rows", place=source.name)


def _open(source: HubSet) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return datasets.load_dataset(
            source.name,
            source.subset,
            split=source.split,
            data_dir=source.folder,
            streaming=source.streaming,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError) as error:
        raise _unreachable(source, error) from error


def _is_class(kind: object) -> bool:
    import datasets

    return isinstance(kind, datasets.ClassLabel)


def _unreachable(source: HubSet, error: Exception) -> DataError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"no such file or folder, and the hub gives no data set of this name: {said[0]}",
        place=source.name,
        remedy="check the name, subset and split; without a network, name a local file or folder",
    )
