"""A Route says which adapters a forward pass uses, for all rows or row by row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """Which adapters' updates are added. The same immutable value is handed to every layer.

    Attributes:
        names: adapters used on every row, in order; empty: the base model.
        rows: instead, the adapters of each row of the batch (its first axis).
    """

    names: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] | None = None

    @classmethod
    def by_row(cls, rows: Sequence[str | Iterable[str] | None]) -> Route:
        """One name, several, or None (the base model) a row."""
        return cls(rows=tuple(() if r is None else (r,) if isinstance(r, str) else tuple(r) for r in rows))

    @property
    def used(self) -> tuple[str, ...]:
        """Every name in it, once."""
        return tuple(dict.fromkeys(self.names if self.rows is None else [n for row in self.rows for n in row]))

    def groups(self) -> dict[tuple[str, ...], list[int]]:
        """Rows by the adapters that they use."""
        found: dict[tuple[str, ...], list[int]] = {}
        for number, names in enumerate(self.rows or ()):
            found.setdefault(names, []).append(number)
        return found


BASE = Route()
