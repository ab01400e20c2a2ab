"""The table of rules, and `diagnose`, which asks them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorakit.doctor import cost, learning, weights
from lorakit.doctor.evidence import Evidence
from lorakit.doctor.finding import Diagnosis, Finding
from lorakit.errors import DataError, DivergedError, MemoryLimitError, ModelError

_ORDER = {"severe": 0, "warning": 1, "hint": 2}
_MISSING = {
    "curve": "at least four log lines (logging_steps)",
    "evals": "held-out rows (val_size or eval_dataset)",
    "data": "the run's end (run.json)",
    "environment": "the run's end (run.json)",
    "adapter": "the adapter, which is written at the end",
}


@dataclass(frozen=True)
class Rule:
    """One rule: its name, the question, what of `Evidence` it cannot do without, the exit code if severe."""

    name: str
    check: Callable[[Evidence], Finding | None]
    needs: str | None
    exit_code: int


_BAD, _DATA, _ADAPTER = DivergedError.exit_code, DataError.exit_code, ModelError.exit_code
_MEMORY = MemoryLimitError.exit_code

RULES = (
    Rule("not-finite", learning.not_finite, None, _BAD),
    Rule("running-away", learning.running_away, "curve", _BAD),
    Rule("rate-too-high", learning.rate_too_high, "curve", _BAD),
    Rule("spikes", learning.spikes, "curve", _BAD),
    Rule("flat-loss", learning.flat, "curve", _BAD),
    Rule("rate-too-low", learning.rate_too_low, "curve", _BAD),
    Rule("underfitting", learning.underfitting, "curve", _BAD),
    Rule("overfitting", learning.overfitting, "evals", _BAD),
    Rule("poor", learning.poor, "evals", _BAD),
    Rule("clipping", learning.clipping, "curve", _BAD),
    Rule("rough", learning.rough, "curve", _BAD),
    Rule("damaged", weights.damaged, "adapter", _ADAPTER),
    Rule("dead-adapters", weights.dead, "adapter", _ADAPTER),
    Rule("exploding-norms", weights.exploding, "adapter", _ADAPTER),
    Rule("rank-too-large", weights.rank_too_large, "adapter", _ADAPTER),
    Rule("rank-saturated", weights.rank_saturated, "adapter", _ADAPTER),
    Rule("truncation", cost.truncation, "data", _DATA),
    Rule("masked-rows", cost.masked_rows, "data", _DATA),
    Rule("little-loss", cost.little_loss, "data", _DATA),
    Rule("padding", cost.padding, "data", _DATA),
    Rule("slow-data", cost.slow_data, "curve", _DATA),
    Rule("out-of-memory", cost.out_of_memory, None, _MEMORY),
    Rule("head-room", cost.head_room, "environment", _MEMORY),
    Rule("killed", cost.killed, None, _MEMORY),
    Rule("small-passes", cost.small_passes, None, _MEMORY),
    Rule("wide-numbers", cost.wide_numbers, "environment", _MEMORY),
    Rule("needless-checkpointing", cost.needless_checkpointing, "environment", _MEMORY),
    Rule("slow", cost.slow, "environment", _MEMORY),
)


def diagnose(evidence: Evidence) -> Diagnosis:
    """Every rule's word, the worst first; a rule without what it needs is named among the skipped."""
    present = {
        "curve": evidence.curve,
        "evals": evidence.evals,
        "data": evidence.data,
        "environment": evidence.environment,
        "adapter": evidence.adapter,
    }
    findings: list[tuple[Finding, Rule]] = []
    checked, skipped = [], {}
    for rule in RULES:
        if rule.needs is not None and not present[rule.needs]:
            skipped[rule.name] = _MISSING[rule.needs]
            continue
        checked.append(rule.name)
        if finding := rule.check(evidence):
            findings.append((finding, rule))
    findings.sort(key=lambda pair: _ORDER[pair[0].severity])
    code = next((rule.exit_code for finding, rule in findings if finding.severity == "severe"), 0)
    return Diagnosis(
        str(evidence.record.path), tuple(finding for finding, _ in findings), tuple(checked), skipped, code
    )
