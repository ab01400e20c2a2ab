"""Files that are either whole or absent: write aside, fsync, rename. Also sha256 and size.

A reader never sees half a file, and a crash or a full disk leaves what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorakit.errors import StorageError


def cache_folder() -> Path:
    """Where fetched and converted files are kept: ``LORAKIT_CACHE``, else ``~/.cache/lorakit``."""
    return Path(os.environ.get("LORAKIT_CACHE") or "~/.cache/lorakit").expanduser()


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time make ``path``; the others wait."""
    from filelock import FileLock

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise StorageError(
            f"cannot use the cache {path.parent}: {error.strerror or error}",
            remedy="set LORAKIT_CACHE to a folder that can be written",
        ) from error
    try:
        yield
    finally:
        lock.release()


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; ``StorageError`` if the disk refuses."""
    write_with(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then fsync it and rename it into place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        fsync(aside)
        aside.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    A folder that stands at ``target`` is moved aside first and put back if the promotion fails.
    """
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".tmp-{target.name}-", dir=target.parent))
        stage.chmod(0o777 & ~_umask())  # mkdtemp gives 0700, which hides results from other users
    except OSError as error:
        raise _refused(target, error) from error
    try:
        yield stage
        for path in stage.rglob("*"):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors and tempfile write 0600
                fsync(path)
        _promote(stage, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _promote(stage: Path, target: Path) -> None:
    fsync(stage)
    if not target.exists():
        stage.replace(target)
    else:
        old = target.with_name(f".old-{target.name}-{os.getpid()}")
        target.replace(old)
        try:
            stage.replace(target)
        except OSError:
            old.replace(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    fsync(target.parent)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a later rename cannot point at missing bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {error.strerror or error}",
        remedy="free some space or choose another output_dir; what was there before is untouched",
    )
