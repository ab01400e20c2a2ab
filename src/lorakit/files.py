"""Files and folders that are either whole or absent: write aside, fsync, rename. Also sha256 and free space.

A reader never sees half a file, and a crash or a full disk leaves what was there before. What is written aside
stands beside its target under a name that tells what a killed process left there; `tidy` acts on it:

    .lorakit-new-<8 hex>-<target>   half written, or on its way out: it is deleted
    .lorakit-old-<8 hex>-<target>   moved aside for its successor: it is put back if there is none
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import StorageError

_ASIDE = re.compile(r"\.lorakit-(?P<kind>new|old)-[0-9a-f]{8}-(?P<target>.+)", re.DOTALL)
_CANNOT_SYNC = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
}  # file systems that have no fsync, for folders mostly


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


def low_space(path: Path, need_bytes: int) -> str | None:
    """A warning if the disk under the folder ``path`` has less than ``need_bytes`` left for this user."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return f"cannot tell how much space is left in {path}: {error.strerror or error}"
    if free >= need_bytes:
        return None
    return (
        f"{free / 1e9:.2f} GB are left in {path}, and {need_bytes / 1e9:.2f} GB will be needed: free some space"
    )


# -------------------------------------------------------------------------------------------------- files


def json_text(value: Any) -> str:
    """Indented JSON as all of lorakit's own files have it; what JSON does not know becomes text."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; ``StorageError`` if the disk refuses."""
    write_with(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json_text(value))


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then fsync it and rename it into place.

    The mode of a file that is replaced is kept.
    """
    aside = _beside(path, "new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        if path.is_file():
            aside.chmod(_mode(path))
        fsync(aside)
        aside.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ folders


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    A folder that stands at ``target`` is moved aside first and put back if the promotion fails. Modes follow
    the umask; those of a folder and files that are replaced are kept.
    """
    stage = _beside(target, "new")
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    except OSError as error:
        raise _refused(target, error) from error
    try:
        yield stage
        _settle(stage, target)
        _promote(stage, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def discard(path: Path) -> None:
    """Delete a file or folder in such a way that a process killed half way leaves nothing that looks whole.

    Raises:
        StorageError: the disk refuses; it is still there then.
    """
    aside = _beside(path, "new")
    try:
        path.replace(aside)
        try:
            fsync(path.parent)  # else a power cut may bring the name back, and only some of its files
        except OSError:
            aside.replace(path)
            raise
    except OSError as error:
        raise _refused(path, error) from error
    _delete(aside)


def tidy(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes left half written in ``folder``, and put back what they had moved aside.

    Only while no other process writes there: to any entry, or to that of the given ``name``. What lies in
    folders below is left alone.

    Raises:
        StorageError: the disk refuses.
    """
    try:
        for path in sorted(folder.iterdir()):
            aside = _ASIDE.fullmatch(path.name)
            if aside is None or name not in {None, aside["target"]}:
                continue
            target = folder / aside["target"]
            if aside["kind"] == "new":
                _delete(path)
            elif target.exists():
                discard(path)
            else:
                path.replace(target)
                fsync(folder)
    except OSError as error:
        raise _refused(folder, error) from error


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a later rename cannot point at missing bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def _settle(stage: Path, target: Path) -> None:
    """Give all that is in ``stage`` its mode, and flush it."""
    if target.is_dir():
        stage.chmod(_mode(target))
    for path in stage.rglob("*"):
        if path.is_file():
            before = target / path.relative_to(stage)
            # safetensors writes 0600, which hides results from other users
            path.chmod(_mode(before) if before.is_file() else 0o666 & ~_umask())
        fsync(path)
    fsync(stage)


def _promote(stage: Path, target: Path) -> None:
    if not target.exists():
        stage.replace(target)
        fsync(target.parent)
        return
    old = _beside(target, "old")
    target.replace(old)
    try:
        stage.replace(target)
        fsync(target.parent)
    except OSError:
        if target.exists():
            target.replace(stage)
        old.replace(target)
        raise
    with contextlib.suppress(StorageError):  # the new one is in place: the old one's remains are for `tidy`
        discard(old)


def _beside(path: Path, kind: Literal["new", "old"]) -> Path:
    """A fresh name aside for ``path``, or for what ``path`` is itself aside of."""
    aside = _ASIDE.fullmatch(path.name)
    return path.with_name(f".lorakit-{kind}-{secrets.token_hex(4)}-{aside['target'] if aside else path.name}")


def _delete(path: Path) -> None:
    """As far as the disk allows: what is left has a name that `tidy` knows."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write {path}: {error.strerror or error}",
        remedy="free some space or choose another output_dir; what was there before is untouched",
    )
