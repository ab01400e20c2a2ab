"""Files of PyPI releases: fetched through the real pip, checked, kept, and never left half done."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import ModelError, StorageError
from lorakit.files import cache_folder, exclusive
from lorakit.models.pypi import fetch

WHEEL = "lorakit_probe-1.0-py3-none-any.whl"
SDIST = "lorakit_probe-1.0.tar.gz"
METADATA = "Metadata-Version: 2.1\nName: lorakit-probe\nVersion: 1.0\n"
BACKEND = f"""
import pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / "lorakit_probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text({METADATA!r})
    return info.name
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the package index pip sees, with a wheel and a source archive in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("lorakit_probe/data.txt", "payload")
        wheel.writestr("lorakit_probe-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("lorakit_probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("lorakit_probe-1.0.dist-info/RECORD", "")
    files = {
        "PKG-INFO": METADATA,
        "backend.py": BACKEND,
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    }
    with tarfile.open(folder / SDIST, "w:gz") as sdist:
        for name, text in files.items():
            member = tarfile.TarInfo(f"lorakit_probe-1.0/{name}")
            member.size = len(text.encode())
            sdist.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once_and_kept(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = digest(index / WHEEL)
    path = fetch("lorakit-probe==1.0", WHEEL, expected, folder=tmp_path / "kept")
    assert path == tmp_path / "kept" / WHEEL
    assert digest(path) == expected
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch("lorakit-probe==1.0", WHEEL, expected, folder=tmp_path / "kept") == path


def test_a_source_archive_is_fetched_where_a_wheel_exists_too(index: Path, tmp_path: Path) -> None:
    expected = digest(index / SDIST)
    path = fetch("lorakit-probe==1.0", SDIST, expected, folder=tmp_path / "kept", source_only=True)
    assert path.name == SDIST
    assert digest(path) == expected


def test_nothing_but_the_file_is_left(index: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    killed = kept / f".{WHEEL}.partial"
    killed.mkdir(parents=True)
    (killed / WHEEL).write_text("half a file, left by a killed process")
    fetch("lorakit-probe==1.0", WHEEL, digest(index / WHEEL), folder=kept)
    assert sorted(path.name for path in kept.iterdir()) == [f".{WHEEL}.lock", WHEEL]


def test_wrong_content_from_the_index(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        fetch("lorakit-probe==1.0", WHEEL, "0" * 64, folder=tmp_path / "kept")
    assert f"expected sha256 {'0' * 64}, found {digest(index / WHEEL)}" in caught.value.message
    assert not (tmp_path / "kept" / WHEEL).exists()


def test_a_damaged_kept_file_is_removed(index: Path, tmp_path: Path) -> None:
    kept = tmp_path / WHEEL
    kept.write_text("not a wheel")
    with pytest.raises(ModelError, match="not the file it should be") as caught:
        fetch("lorakit-probe==1.0", WHEEL, digest(index / WHEEL), folder=tmp_path)
    assert "the file was removed; try again" in str(caught.value.remedy)
    assert fetch("lorakit-probe==1.0", WHEEL, digest(index / WHEEL), folder=tmp_path) == kept


def test_offline_says_what_to_do(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        fetch("lorakit-probe==1.0", SDIST, "0" * 64, folder=tmp_path / "kept", source_only=True)
    assert caught.value.message.startswith("cannot fetch lorakit-probe==1.0 from the package index: Could not")
    assert caught.value.remedy == (
        "check the connection, or run `pip download --no-deps --no-binary lorakit-probe lorakit-probe==1.0` "
        f"where there is one and put {SDIST} into {tmp_path / 'kept'} "
        "(the variable LORAKIT_CACHE moves this cache)"
    )


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="which this Python does not have") as caught:
        fetch("lorakit-probe==1.0", WHEEL, "0" * 64, folder=tmp_path)
    assert str(caught.value.remedy).endswith("-m ensurepip")


def test_of_two_at_once_one_downloads(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return real_run(command, **options)

    real_run = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    expected = digest(index / WHEEL)
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(fetch, "lorakit-probe==1.0", WHEEL, expected, folder=tmp_path / "kept") for _ in "ab"
        ]
        assert {digest(call.result()) for call in calls} == {expected}
    assert len(commands) == 1


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("LORAKIT_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "lorakit"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="cannot use the cache") as caught,
        exclusive(tmp_path / "file" / "x"),
    ):
        pass
    assert caught.value.remedy == "set LORAKIT_CACHE to a folder that can be written"
