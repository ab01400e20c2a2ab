"""The keys of a ``config.json``, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.errors import ModelError

_LARGEST = 10**8  # no width or count of a real model is larger


class Keys:
    """A model's configuration. What it leaves out comes from ``defaults``, as in transformers."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], place: str) -> None:
        self._values = {**defaults, **{key: value for key, value in values.items() if value is not None}}
        self.place = place

    def number(self, *names: str) -> int:
        """The first of ``names`` that is there: a whole number of at least 1.

        Raises:
            ModelError: none is there, or it is something else.
        """
        found = self.optional(*names)
        if found is None:
            raise ModelError(
                f"the configuration has no {names[0]}", place=self.place, remedy="download config.json again"
            )
        return found

    def optional(self, *names: str) -> int | None:
        """As `number`; None if none is there."""
        for name in names:
            if name in self._values:
                value = self._values[name]
                if type(value) is not int or not 1 <= value <= _LARGEST:
                    raise ModelError(f"{name} of the configuration cannot be {value!r:.60}", place=self.place)
                return value
        return None

    def numbers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; none if it is not there."""
        value = self._values.get(name, ())
        if not isinstance(value, list | tuple) or any(type(item) is not int for item in value):
            raise ModelError(f"{name} of the configuration cannot be {value!r:.60}", place=self.place)
        return tuple(value)

    def flag(self, name: str) -> bool:
        """A switch; false if it is not there."""
        return bool(self._values.get(name, False))

    def share(self, name: str) -> float:
        """A probability; 0 if it is not there or none."""
        value = self._values.get(name)
        return float(value) if isinstance(value, int | float) else 0.0

    def text(self, name: str) -> str:
        """A word; empty if it is not there."""
        return str(self._values.get(name, ""))

    def part(self, name: str) -> Mapping[str, Any]:
        """A configuration inside this one; empty if it is not there."""
        value = self._values.get(name, {})
        if not isinstance(value, Mapping):
            raise ModelError(f"{name} of the configuration is not a mapping", place=self.place)
        return value

    def architecture(self) -> str:
        """The class that the weights were saved from, if it is told."""
        names = self._values.get("architectures") or [""]
        return str(names[0]) if isinstance(names, list | tuple) else ""
