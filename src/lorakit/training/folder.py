"""The run directory: checked before any work, filled file by file, never mixed with another run's.

An earlier run's results are replaced only once this one is ready to train: a mistake in model, data or targets
costs nothing that was there. One run at a time holds the folder's lock.

config.resolved.yaml  metrics.jsonl  adapter/  checkpoint-<step>/  run.json  report.html  run.lock
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorakit.checkpoint.lock import only_one
from lorakit.checkpoint.snapshot import set_aside
from lorakit.errors import ConflictError, StorageError
from lorakit.files import discard, tidy, write_text, write_with

_FILES = ("config.resolved.yaml", "metrics.jsonl", "run.json", "report.html")
_FOLDERS = ("checkpoint-", "aside-checkpoint-")


@dataclass(frozen=True)
class RunFolder:
    """Paths inside one run directory."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.resolved.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def record(self) -> Path:
        """What the run says about itself."""
        return self.path / "run.json"

    @property
    def adapter(self) -> Path:
        """The trained adapter, a PEFT folder."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The whole model, if a second stage trained all of it."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    def result(self) -> Path:
        """What a finished run leaves: the whole model, or else the adapter."""
        return self.model if self.model.is_dir() else self.adapter

    def checkpoint(self, step: int) -> Path:
        """The run as it was after ``step`` updates: an adapter, and all that it needs to go on."""
        return self.path / f"checkpoint-{step}"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out within the block, and clear away what a killed one left half written.

        Raises:
            ConflictError: another run is at work here.
            StorageError: the directory cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        with only_one(self.path / "run.lock"):
            tidy(self.path)
            if self.adapter.is_dir():
                tidy(self.adapter)
            yield

    def check(self, *, overwrite: bool) -> None:
        """Refuse, before any work is spent, a directory that cannot or may not be used; changes nothing there.

        Raises:
            ConflictError: another run's results are there and ``overwrite`` is false.
            StorageError: the directory cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
            old = list(self._results())
        except OSError as error:
            raise self._unusable(error) from error
        if old and not overwrite:
            raise ConflictError(
                f"the results of another run are in {self.path} ({old[0].name} …)",
                remedy="choose another output_dir, or set overwrite_output_dir: true to replace them",
            )

    def begin(self, config: str, *, overwrite: bool) -> None:
        """Check again, then replace what an earlier run left by the resolved configuration of this one."""
        self.check(overwrite=overwrite)
        for result in list(self._results()):
            discard(result)
        write_text(self.config, config)

    def go_on(self, config: str, step: int, metrics_bytes: int) -> None:
        """Go back to what was here when the checkpoint of ``step`` was written.

        Later checkpoints and metrics are another history: they are kept under other names, not mixed with what
        comes now.
        """
        set_aside(self.path, step)
        for path in (self.record, self.report):  # of the other history: they say that it came to its end
            if path.exists():
                discard(path)
        write_text(self.config, config)
        data = self.metrics.read_bytes() if self.metrics.exists() else b""
        kept, later = data[:metrics_bytes], data[metrics_bytes:]
        if later:
            superseded = self.path / "metrics.superseded.jsonl"
            earlier = superseded.read_bytes() if superseded.exists() else b""
            write_with(superseded, lambda aside: aside.write_bytes(earlier + later))
            write_with(self.metrics, lambda aside: aside.write_bytes(kept))

    def has_weights(self) -> bool:
        """Whether anything was trained here."""
        return any(entry.is_dir() for entry in self._results()) if self.path.is_dir() else False

    def _results(self) -> Iterator[Path]:
        """What an earlier run wrote here; other files of the user's are not a run's business."""
        for entry in sorted(self.path.iterdir()):
            if entry.name in _FILES or entry.name in ("adapter", "model") or entry.name.startswith(_FOLDERS):
                yield entry

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(f"cannot use output_dir {self.path}: {error.strerror or error}")
