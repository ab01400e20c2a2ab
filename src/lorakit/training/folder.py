"""The run directory: checked before any work, filled file by file, never mixed with another run's.

An earlier run's results are replaced only once this one is ready to train: a mistake in model, data or targets
costs nothing that was there.

config.resolved.yaml  metrics.jsonl  adapter/  checkpoint-<step>/  run.json  report.html
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ConflictError, StorageError
from lorakit.files import write_text

_FILES = ("config.resolved.yaml", "metrics.jsonl", "run.json", "report.html")


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

    def checkpoint(self, step: int) -> Path:
        """The adapter as it was after ``step`` updates."""
        return self.path / f"checkpoint-{step}"

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
            raise StorageError(f"cannot use output_dir {self.path}: {error.strerror}") from error
        if old and not overwrite:
            raise ConflictError(
                f"the results of another run are in {self.path} ({old[0].name} …)",
                remedy="choose another output_dir, or set overwrite_output_dir: true to replace them",
            )

    def begin(self, config: str, *, overwrite: bool) -> None:
        """Check again, then replace what an earlier run left by the resolved configuration of this one."""
        self.check(overwrite=overwrite)
        for result in list(self._results()):
            shutil.rmtree(result) if result.is_dir() else result.unlink()
        write_text(self.config, config)

    def _results(self) -> Iterator[Path]:
        """What an earlier run wrote here; other files of the user's are not a run's business."""
        for entry in sorted(self.path.iterdir()):
            if entry.name in _FILES or entry.name == "adapter" or entry.name.startswith("checkpoint-"):
                yield entry
