"""A finding: what is wrong, how bad it is, the numbers that say so, and the lines that would change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["severe", "warning", "hint"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        rule: its name; docs/doctor.md has a line on each.
        severity: ``severe``: the result cannot be used. ``warning``: it could be clearly better. ``hint``: it
            would cost less.
        title: the symptom, in one sentence.
        evidence: the numbers that it rests on, by name.
        remedies: lines for the command line, the most promising first; each is one or several ``key=value``.
        advice: why these.
    """

    rule: str
    severity: Severity
    title: str
    evidence: Mapping[str, float | int | str]
    remedies: tuple[str, ...] = ()
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Diagnosis:
    """What all rules said of one run: findings, the worst first, and rules that had nothing to go by."""

    run: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)  # rule -> what it would have needed
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run,
            "findings": [finding.to_dict() for finding in self.findings],
            "checked": list(self.checked),
            "skipped": dict(self.skipped),
            "exit_code": self.exit_code,
        }
