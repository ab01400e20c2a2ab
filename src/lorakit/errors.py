"""The whole exception tree. Every error names a place, a cause and a remedy, and fixes the exit code.

* LorakitError             1  a bug in lorakit
  - UsageError             2  a wrong command line or argument
    · ConfigError          2  a configuration that cannot be run, with every problem found in it
  - DataError              3  rows that cannot be read or trained on
  - ModelError             4  a model, adapter or checkpoint that cannot be used
    · TargetError          4  adapter targets that match nothing, or what cannot carry an adapter
    · AdapterMismatchError 4  adapter tensors that do not fit the model
    · DamagedError         4  a checkpoint that is not what was written
  - DivergedError          5  loss or gradient is no longer finite
  - StorageError           6  a file cannot be written
  - MemoryLimitError       7  out of memory
  - ConflictError          8  somebody else's results or run stand in the way
  - RankError              *  another rank failed first (its exit code; 137 if it vanished)
  - Interrupted          130  stopped by SIGINT (143: SIGTERM) with the state saved
"""

from __future__ import annotations

from typing import Any, ClassVar


class LorakitError(Exception):
    """Base of all errors that lorakit raises on purpose.

    Args:
        message: what is wrong, in one sentence.
        place: where: ``file:line:column``, a row, a module path.
        remedy: what to do about it.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "E-BUG"

    def __init__(self, message: str, *, place: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def render(self) -> str:
        """The text a person sees: ``error[CODE]: message``, then the place, then the remedy."""
        lines = [f"error[{self.code}]: {self.message}"]
        if self.place:
            lines.append(f"  --> {self.place}")
        if self.remedy:
            lines.append(f"  = help: {self.remedy}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same fields for ``--json``."""
        return {"code": self.code, "message": self.message, "place": self.place, "remedy": self.remedy}

    def __str__(self) -> str:
        parts = [f"{self.place}: {self.message}" if self.place else self.message]
        if self.remedy:
            parts.append(self.remedy)
        return "\n".join(parts)


class UsageError(LorakitError):
    """A wrong command line or argument."""

    exit_code = 2
    code = "E-USAGE"


class ConfigError(UsageError):
    """A configuration that cannot be run; ``text`` is the rendering of every problem found in it."""

    code = "E-CONFIG"

    def __init__(self, message: str, *, text: str | None = None, problems: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.text = text
        self.problems = problems

    def render(self) -> str:
        """Every problem with its line and caret, then the count."""
        return super().render() if self.text is None else f"{self.text}\n\nerror[{self.code}]: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Adds the list of problems."""
        return {**super().to_dict(), "problems": [problem.to_dict() for problem in self.problems]}

    def __str__(self) -> str:
        return self.render()


class DataError(LorakitError):
    """Rows that cannot be read or trained on."""

    exit_code = 3
    code = "E-DATA"


class ModelError(LorakitError):
    """A model, adapter or checkpoint that cannot be used."""

    exit_code = 4
    code = "E-MODEL"


class TargetError(ModelError):
    """Adapter targets that match nothing, or a module that cannot carry an adapter."""

    code = "E-TARGET"


class AdapterMismatchError(ModelError):
    """Adapter tensors that do not fit the model; nothing was loaded."""

    code = "E-ADAPTER"


class DamagedError(ModelError):
    """A checkpoint that is not what was written: an earlier one may do."""

    code = "E-DAMAGED"


class DivergedError(LorakitError):
    """Loss or gradient is no longer finite."""

    exit_code = 5
    code = "E-DIVERGED"


class StorageError(LorakitError):
    """A file cannot be written."""

    exit_code = 6
    code = "E-STORAGE"


class MemoryLimitError(LorakitError):
    """Out of memory."""

    exit_code = 7
    code = "E-MEMORY"


class ConflictError(LorakitError):
    """Somebody else's results or run stand in the way."""

    exit_code = 8
    code = "E-CONFLICT"


class RankError(LorakitError):
    """Another rank of the run failed first, so that this one cannot go on."""

    code = "E-RANK"

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # that of the first cause


class Interrupted(LorakitError):  # noqa: N818 - the user's wish, not a fault
    """Stopped by a signal, with the state saved."""

    code = "INTERRUPTED"

    def __init__(self, message: str, *, signum: int, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.exit_code = 128 + signum  # type: ignore[misc]  # 130 for SIGINT, 143 for SIGTERM
