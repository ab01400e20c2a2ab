"""Rows are encoded once: kept as an Arrow file under the fingerprint of all that they depend on.

    $LORAKIT_CACHE/data/<fingerprint>/rows.arrow      the rows
                                      manifest.json   what they were made from, their number, size and sha256

The fingerprint covers the content of the files, the tokenizer, its template, the settings and lorakit's own
data code, so that a change in any of them makes new rows. A folder is promoted when it is whole, and checked
against its manifest when it is opened; what does not fit is built again. One process builds, the others wait.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.store import StoredRows
from lorakit.files import cache_folder, exclusive, sha256_file, staged_folder, tidy, write_text
from lorakit.log import logger

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

_ROWS, _MANIFEST = "rows.arrow", "manifest.json"
_KEPT = 30 * 24 * 3600  # seconds


@dataclass(frozen=True)
class Cached:
    """Encoded rows, and what their making had to say (counts, the shared system message …)."""

    rows: StoredRows
    facts: dict[str, Any]
    fresh: bool  # made now


Build = Callable[[Callable[["pyarrow.RecordBatch"], None]], Mapping[str, Any]]


def cached(
    parts: Mapping[str, Any], build: Build, *, folder: Path | None = None, overwrite: bool = False
) -> Cached:
    """The rows that were made from ``parts``, out of the cache if they are there.

    Args:
        parts: all that the rows depend on, as JSON values; see `describe_tokenizer` and `describe_files`.
        build: makes the rows: is given a function that takes them piece by piece, returns facts to keep (JSON).
        folder: where rows are kept, if not in lorakit's cache.
        overwrite: make them anew.

    Raises:
        StorageError: the cache cannot be written.
    """
    parts = {**parts, "code": _code()}
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    target = (folder or cache_folder() / "data") / name
    if not overwrite and (found := _open(target)) is not None:
        return found
    started = time.time_ns()
    with exclusive(target):
        # Another process may have made them while this one waited; if so, even a demand for new ones is met.
        if (found := _open(target)) is not None and (not overwrite or _made(target) >= started):
            return found
        tidy(target.parent, name)
        with staged_folder(target) as stage:
            facts = _write(stage, build)
            whole = {"size": (stage / _ROWS).stat().st_size, "sha256": sha256_file(stage / _ROWS)}
            manifest = {"parts": parts, "facts": facts, **whole}
            write_text(stage / _MANIFEST, json.dumps(manifest, indent=2))  # ASCII: paths need not be UTF-8
        if folder is None:
            _prune(target.parent)
        return Cached(StoredRows(target / _ROWS), facts, fresh=True)


def describe_files(files: Iterable[Path]) -> list[str]:
    """Files by content: renaming or touching one changes nothing, editing does."""
    return [sha256_file(path) for path in files]


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything in a tokenizer that decides which tokens a text becomes, its template included."""
    if tokenizer.is_fast:
        # Both belong to the last call, not to the tokenizer, and are set anew with the next.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        backend = tokenizer.backend_tokenizer.to_str()
    else:
        backend = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    pieces = (type(tokenizer).__name__, backend, tokenizer.chat_template, tokenizer.special_tokens_map)
    return hashlib.sha256(json.dumps(pieces, default=str).encode()).hexdigest()


def _write(stage: Path, build: Build) -> dict[str, Any]:
    sink = _Sink(stage / _ROWS)
    try:
        facts = dict(build(sink.write))
    finally:
        sink.close()
    return json.loads(json.dumps(facts))  # what is given now is what is given out of the cache later


class _Sink:
    """The file, opened with its first piece, which tells the columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pyarrow.RecordBatchStreamWriter | None = None

    def write(self, batch: pyarrow.RecordBatch) -> None:
        import pyarrow

        if self._writer is None:
            self._writer = pyarrow.ipc.new_stream(str(self._path), batch.schema)
        if batch.num_rows:
            self._writer.write_batch(batch)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _open(target: Path) -> Cached | None:
    """The rows at ``target`` if they are whole; a torn file is reported and counts as none."""
    try:
        manifest = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))
        rows = target / _ROWS
        whole = rows.stat().st_size == manifest["size"] and sha256_file(rows) == manifest["sha256"]
        facts = manifest["facts"]
    except FileNotFoundError:
        if target.exists():
            logger.warning("the cached rows in %s are incomplete: encoding them again", target)
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the cached rows in %s cannot be read (%s): encoding them again", target, error)
        return None
    if not whole:
        logger.warning("the cached rows in %s are damaged: encoding them again", target)
        return None
    with contextlib.suppress(OSError):  # a cache that is only read
        os.utime(target)
    return Cached(StoredRows(rows), facts, fresh=False)


def _prune(folder: Path) -> None:
    """Remove what nobody has opened for a month; who has it mapped keeps it."""
    for entry in folder.glob(f"*/{_MANIFEST}"):
        if time.time() - entry.parent.stat().st_mtime > _KEPT:
            shutil.rmtree(entry.parent, ignore_errors=True)


def _made(target: Path) -> int:
    return (target / _MANIFEST).stat().st_mtime_ns


@functools.cache
def _code() -> str:
    """lorakit's data code and the libraries that render and tokenise: another version may make other rows."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes() + b"\0")
    libraries = [f"{name} {version(name)}" for name in ("tokenizers", "transformers", "jinja2")]
    return f"{digest.hexdigest()} {libraries}"
