"""Rules about rows that were lost, memory that ran short, and time that was spent on nothing."""

from __future__ import annotations

import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from lorakit.doctor.evidence import Evidence
from lorakit.doctor.finding import Finding
from lorakit.doctor.lines import batch, less_memory
from lorakit.report.record import DataInfo

_LOST = 0.05  # share of the tokens, or of the rows
_MASKED = 0.02
_LITTLE_LOSS = 0.05  # share of the tokens with loss
_PADDING = 0.3
_WAITING = 0.3
_FULL = 0.9  # of the memory
_ROOM = 0.8
_SMALL_PASS, _GOOD_PASS = 256, 1024  # tokens
_SLOW = 0.25  # of the rate that the plan expects
_LEAST_POINTS = 3


def truncation(e: Evidence) -> Finding | None:
    """Rows that were cut to ``cutoff_len``, or dropped for their length (D08)."""
    data, cutoff = _data(e), int(e.number("cutoff_len", 2048))
    rows, cut, dropped = data.rows, data.truncated or 0, data.too_long or 0
    whole, kept = data.whole_tokens or 0, data.tokens or 0
    lost = 1 - kept / whole if whole and cut else 0.0
    if lost <= _LOST and dropped <= _LOST * (rows + dropped):
        return None
    return Finding(
        "truncation",
        "warning",
        f"{cut:,} of {rows + dropped:,} rows were cut to cutoff_len and {dropped:,} dropped",
        {"rows_cut": cut, "rows_dropped": dropped, "tokens_lost_share": lost, "cutoff_len": cutoff},
        (f"cutoff_len={2 * cutoff}", "long_rows=split"),
        "the model never sees the ends of these rows; `lorakit preview` shows the lengths of all",
    )


def masked_rows(e: Evidence) -> Finding | None:
    """Rows in which nothing carries loss (D08)."""
    data = _data(e)
    masked, rows = data.masked or 0, data.rows + (data.dropped or 0)
    if masked <= _MASKED * rows:
        return None
    return Finding(
        "masked-rows",
        "severe" if masked > 0.5 * rows else "warning",
        f"{masked:,} of {rows:,} rows were left out: nothing in them carries loss",
        {"rows_masked": masked, "rows": rows},
        ("mask_history=false",) if e.settings.get("mask_history") else ("train_on_prompt=true",),
        "an answer is missing, or marked as not to be trained (weight 0, train false); without such marks "
        "train_on_prompt lets the prompts carry loss; `lorakit preview` shows the rows",
    )


def little_loss(e: Evidence) -> Finding | None:
    """Tokens that nearly all belong to prompts (D08)."""
    data = _data(e)
    tokens, trained = data.tokens or 0, data.supervised_tokens or 0
    if not tokens or trained >= _LITTLE_LOSS * tokens:
        return None
    return Finding(
        "little-loss",
        "hint",
        f"{trained / tokens:.1%} of the tokens carry loss: nearly all of the work is on prompts",
        {"tokens": tokens, "tokens_with_loss": trained},
        ("train_on_prompt=true",),
        "right for long documents with short answers; else look at the rows with `lorakit preview`",
    )


def padding(e: Evidence) -> Finding | None:
    """Positions of a batch that hold padding (D05, D07)."""
    share = _data(e).padding or 0.0
    if share <= _PADDING:
        return None
    rows = int(e.number("per_device_train_batch_size", 1))
    return Finding(
        "padding",
        "hint",
        f"{share:.0%} of the computed positions are padding",
        {"padding_share": share, "longest_row": _data(e).longest or 0, "rows_in_a_pass": rows},
        ("group_by_length=true", batch(e, rows)),
        "this model takes no rows laid end to end; rows of like length share a pass instead",
    )


def slow_data(e: Evidence) -> Finding | None:
    """Updates that wait for their rows (D07)."""
    known = [(0.0, 0.0)]
    known += [
        (p.seconds, p.data_seconds) for p in e.train if p.seconds is not None and p.data_seconds is not None
    ]
    spans = [(end - start, waited) for (start, _), (end, waited) in pairwise(known)]
    shares = [waited / span for span, waited in spans if span > 0]
    if len(shares) < _LEAST_POINTS or (share := statistics.median(shares)) <= _WAITING:
        return None
    return Finding(
        "slow-data",
        "warning",
        f"{share:.0%} of the time went into fetching rows",
        {"share_of_time": share, "log_lines": len(shares)},
        (f"tokenized_path={Path(tempfile.gettempdir(), 'lorakit-rows')}",),
        "encoded rows are mapped from disk: keep them on a fast one; there are no workers to add",
    )


def out_of_memory(e: Evidence) -> Finding | None:
    """A run that ran out of memory, or had to divide its batches (D03, D06, D10)."""
    ended = [error for error in e.errors if error.code == "E-MEMORY"]
    notes = [note for note in e.record.notes if note.startswith("out of memory")]
    if not ended and not notes:
        return None
    fatal = bool(ended) and e.record.info.status is None
    return Finding(
        "out-of-memory",
        "severe" if fatal else "warning",
        "the run ended for lack of memory" if fatal else "memory ran short: passes were divided on the way",
        {"divided": len(notes), "last_update": e.train[-1].step if e.train else 0, **_peak(e)},
        less_memory(e),
        _levers(e),
    )


def head_room(e: Evidence) -> Finding | None:
    """A peak that leaves no room for a longer row (D03, D06)."""
    peak, limit = _memory(e)
    if not limit or peak <= _FULL * limit or out_of_memory(e):
        return None
    return Finding(
        "head-room",
        "warning",
        f"the peak took {peak / limit:.0%} of the memory: one longer row may end the next run",
        _peak(e),
        less_memory(e),
        _levers(e),
    )


def killed(e: Evidence) -> Finding | None:
    """A run without an end: nobody works on it, and it has said nothing (D03)."""
    if e.record.info.status is not None or e.running or e.errors:
        return None
    return Finding(
        "killed",
        "warning",
        "the run has no end and no error: its process was killed",
        {"last_update": e.train[-1].step if e.train else 0},
        ("resume_from_checkpoint=true", *less_memory(e)),
        "often by the system for lack of memory (see `dmesg`, or the log of the batch system); "
        "`lorakit plan` says what it takes",
    )


def small_passes(e: Evidence) -> Finding | None:
    """An update in many passes of few tokens (D05, D07)."""
    passes = int(e.number("gradient_accumulation_steps", 8))
    if passes < 2 or e.settings.get("max_tokens_per_batch") or out_of_memory(e) or not e.train:
        return None
    peak, limit = _memory(e)
    last = e.train[-1]
    tokens = (last.tokens or 0) / (last.step * passes)
    joined = max((n for n in range(1, passes + 1) if passes % n == 0 and n * tokens <= _GOOD_PASS), default=1)
    if not 0 < tokens < _SMALL_PASS or joined == 1 or (limit and peak > _ROOM * limit):
        return None
    rows = int(e.number("per_device_train_batch_size", 1))
    return Finding(
        "small-passes",
        "hint",
        f"an update takes {passes} passes of {tokens:.0f} tokens each",
        {"tokens_in_a_pass": tokens, "passes": passes, **_peak(e)},
        (f"per_device_train_batch_size={rows * joined} gradient_accumulation_steps={passes // joined}",),
        "the same rows in fewer passes give the same update sooner",
    )


def wide_numbers(e: Evidence) -> Finding | None:
    """fp32 on hardware that has bf16 (D05, D06)."""
    if e.settings.get("bf16") or e.settings.get("fp16") or e.settings.get("unfreeze_after"):
        return None
    if e.environment.get("best_precision") != "bf16":
        return None
    return Finding(
        "wide-numbers",
        "hint",
        "the run computed in fp32 on hardware that has bf16",
        {"best_precision": "bf16"},
        ("bf16=true",),
        "about half the memory of the base, and about twice the rate",
    )


def needless_checkpointing(e: Evidence) -> Finding | None:
    """Activations computed twice although memory would hold them (D05)."""
    _, limit = _memory(e)
    if not e.settings.get("gradient_checkpointing") or not limit or e.plan is None:
        return None
    needed = e.plan.without_checkpointing / 1e9
    if needed > _ROOM * limit:
        return None
    return Finding(
        "needless-checkpointing",
        "hint",
        "activations are computed twice, although there is memory to keep them",
        {"planned_without_gb": needed, **_peak(e)},
        ("gradient_checkpointing=false",),
        "about a quarter less time",
    )


def slow(e: Evidence) -> Finding | None:
    """Far fewer tokens a second than the machine's measured rate lets expect (D05, D07)."""
    speeds = [point.tokens_per_second for point in e.train if point.tokens_per_second]
    if e.plan is None or not e.plan.time.tokens_per_second or len(speeds) < _LEAST_POINTS:
        return None
    expected, seen = e.plan.time.tokens_per_second, max(speeds)  # the rest may be other work on the machine
    if e.plan.time.rates.threads is None or seen >= _SLOW * expected:
        return None
    # Products are not what takes a very small model's time, and how fast codes are decoded is not measured.
    if e.plan.facts.parameters < 10_000_000 or e.settings.get("quantization_bit"):
        return None
    return Finding(
        "slow",
        "hint",
        f"{seen:,.0f} tokens a second at best, where {expected:,.0f} are to be expected",
        {"tokens_per_second": seen, "expected": expected},
        ("torch_compile=true",),
        "is something else at work on the machine? passes of more tokens use it better; the attention is "
        "chosen by itself. Several processes: `lorakit train --nproc N`",
    )


def _data(e: Evidence) -> DataInfo:
    assert e.data is not None
    return e.data


def _memory(e: Evidence) -> tuple[float, float]:
    """Peak and limit in GB; 0 where the run does not tell."""
    peak, limit = (e.environment.get(key) for key in ("peak_memory_gb", "memory_limit_gb"))
    return float(peak or 0.0), float(limit or 0.0)


def _peak(e: Evidence) -> dict[str, float]:
    peak, limit = _memory(e)
    return {"peak_gb": peak, "limit_gb": limit} if peak and limit else {}


def _levers(e: Evidence) -> str:
    adapter = e.record.info.adapter
    small = f" (here it is {16 * adapter.trainable / 1e6:,.0f} MB in all)" if adapter else ""
    return f"in this order; a lower rank is a weak lever, adapters and their moments are small{small}"
