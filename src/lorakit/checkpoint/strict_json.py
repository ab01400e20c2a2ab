"""JSON from people nobody knows: refused where Python's reader is lenient, and bounded in time and memory.

Duplicate keys (two readers may see two different adapters), NaN and Infinity (not JSON), deep nesting, and more
bytes or values than a description can need.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterMismatchError

_MAX_BYTES = 1 << 20
_MAX_VALUES = 50_000
_MAX_DEPTH = 64


def read_object(path: Path, *, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """The JSON object in the file ``path``.

    Raises:
        AdapterMismatchError: it cannot be read, is larger than ``max_bytes``, or `parse_object` refuses it.
    """
    data = read_bytes(path, max_bytes + 1)
    if len(data) > max_bytes:
        raise AdapterMismatchError(
            f"larger than {max_bytes} bytes: not an adapter description",
            place=str(path),
            remedy="is it another file under this name? save or download the adapter again",
        )
    return parse_object(data, str(path))


def read_bytes(path: Path, most: int) -> bytes:
    """At most the first ``most`` bytes of a regular file; a pipe or device could block for ever."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is a folder" if path.is_dir() else "it is not a regular file")
        with path.open("rb") as stream:
            return stream.read(most)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise AdapterMismatchError(
            f"cannot read {path.name or path}: {cause}",
            place=str(path),
            remedy="name an adapter folder (adapter_config.json and adapter_model.safetensors) or a run folder",
        ) from error


def parse_object(data: bytes, place: str, *, max_values: int = _MAX_VALUES) -> dict[str, Any]:
    """The JSON object that ``data`` is.

    Raises:
        AdapterMismatchError: not JSON, not an object, a key given twice, NaN or infinity, nested deeper than 64
            levels, or more than ``max_values`` values.
    """
    try:
        if sum(map(data.count, (b"[", b"{", b","))) > max_values:
            raise ValueError(f"more than {max_values} values")
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else error
        raise AdapterMismatchError(
            f"not JSON: {cause}", place=place, remedy="save or download the adapter again"
        ) from error
    if not isinstance(value, dict):
        raise AdapterMismatchError(
            "not a JSON object", place=place, remedy="save or download the adapter again"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:80]} is not a number that JSON knows")
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        children = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for group in children for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
