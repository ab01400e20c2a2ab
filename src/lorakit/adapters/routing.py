"""A Route says which adapters a forward pass uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """The adapters whose updates are added, in order, on every row. Empty: the base model."""

    names: tuple[str, ...] = ()


BASE = Route()
