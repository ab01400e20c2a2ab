"""Advice: which settings to begin with, each with its reason and what that rests on.

Ranges are those of the guides (`lorakit.config.presets.GUIDES`: S2 is a guide, L130-134 its lines); what has to
do with memory is worked out by the plan. Of a range the cheap end is advised: low ranks, few epochs. Raising
one later costs a run; that a run was too large is rarely noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lorakit.config.yaml_text import scalar
from lorakit.modelinfo.facts import ModelFacts
from lorakit.planning.memory import memory
from lorakit.planning.setup import Setup

Task = Literal["classification", "summaries", "instructions", "code"]
TASKS: tuple[Task, ...] = get_args(Task)
Range = tuple[float, float]

HEAD_ROOM = 0.9  # of the memory that is there, as auto_find_batch_size does
BATCH = 8  # sequences in an update (S0:L288-300)
_SMALL = 1e9  # numbers in a model below which a higher rate was seen to serve
_SHORTEST, _STEP, _USUAL_LENGTH = 256, 64, 2048
_HELD_OUT_SHARE, _MOST_HELD_OUT, _FEWEST_ROWS = 0.1, 500, 50

_RANK_BY_TASK: dict[Task, Range] = {  # S2:L130-134
    "classification": (8, 16), "summaries": (16, 32), "instructions": (32, 64), "code": (32, 128),
}  # fmt: skip
_RANK_BY_SIZE: tuple[tuple[float, Range, str], ...] = (  # S2:L136-139; a "7B" model may have 6.5e9
    (6.5e9, (8, 32), "below 7B"), (30e9, (16, 64), "of 7B to 30B"), (float("inf"), (32, 128), "above 30B"),
)  # fmt: skip
_EPOCHS_BY_ROWS: tuple[tuple[float, Range, str], ...] = (  # S0:L308-315
    (1_000, (5, 10), "fewer than 1,000"), (10_000, (3, 5), "1,000 to 10,000"),
    (100_000, (2, 3), "10,000 to 100,000"), (float("inf"), (1, 2), "more than 100,000"),
)  # fmt: skip


@dataclass(frozen=True)
class Advice:
    """A value for a key.

    Attributes:
        key, value: as a configuration has them.
        reason: why, in a sentence.
        source: guide and lines, a file of this repository, or ``plan``: worked out for this model and machine.
    """

    key: str
    value: Any
    reason: str
    source: str

    @property
    def setting(self) -> str:
        """``key=value``, as the command line takes it."""
        return f"{self.key}={scalar(self.value)}"


COURSE = (
    Advice("lr_scheduler_type", "cosine", "the rate falls along half a cosine", "S0:L268-279"),
    Advice("warmup_ratio", 0.1, "the rate rises in the first tenth of the updates", "S0:L272, S2:L277-281"),
)


def rank_advice(parameters: int, task: Task | None = None) -> Advice:
    """The lowest rank that suits both the task and the size of the model; where they disagree the task wins."""
    (low, high), size = _row(_RANK_BY_SIZE, parameters)
    if task is None:
        reason = f"models {size}: {low:g} to {high:g}; begin low, raise it if answers are not good enough"
        return Advice("lora_rank", int(low), reason, "S2:L136-139, S0:L68-71")
    wanted = _RANK_BY_TASK[task]
    rank = min(max(low, wanted[0]), wanted[1])
    reason = f"{task}: {wanted[0]:g} to {wanted[1]:g}; models {size}: {low:g} to {high:g}"
    return Advice("lora_rank", int(rank), reason, "S2:L130-139")


def rate_advice(parameters: int, bits: int) -> Advice:
    """The highest learning rate of the schedule, for adapters."""
    low, high, source = _rates(parameters, bits)
    rate = low if bits < 16 else 1e-3 if parameters < _SMALL else 2e-4
    of = "on a quantised base" if bits < 16 else "of a small model" if parameters < _SMALL else "of adapters"
    return Advice("learning_rate", rate, f"rates {of}: {low:g} to {high:g}", source)


def _rates(parameters: int, bits: int) -> tuple[float, float, str]:
    if parameters < _SMALL:
        return 1e-4, 1e-3, "S0:L254-266, configs/addresses.yaml"
    return (1e-4, 2e-4, "S0:L254-266") if bits < 16 else (1e-4, 3e-4, "S0:L254-266, S1:L404")


def epochs_advice(rows: int) -> Advice:
    """Passes over so many rows."""
    (low, high), band = _row(_EPOCHS_BY_ROWS, rows)
    few = "; held-out loss that rises ends it" if rows < _EPOCHS_BY_ROWS[0][0] else ""
    reason = f"{band} rows: {low:g} to {high:g} passes{few}"
    return Advice("num_train_epochs", float(low), reason, "S0:L308-315")


def length_advice(longest: int, most: int, context: int | None) -> Advice:
    """Tokens that a row may have: as many as the longest has up to 2,048, else as 99 rows in 100 (``most``)."""
    wanted = longest if longest <= _USUAL_LENGTH else max(most, _USUAL_LENGTH)
    length = min(-(-wanted // _STEP) * _STEP, context or wanted + _STEP)
    held = "all rows" if length >= longest else "99 rows in 100" if length >= most else "what the model reads"
    reason = f"{held}: the longest has about {longest} tokens, 99 in 100 have up to {most}"
    return Advice("cutoff_len", length, reason, "rows of the data")


def held_out_advice(rows: int) -> list[Advice]:
    """Rows to watch over-fitting with, if there are enough to spare some."""
    if rows < _FEWEST_ROWS:
        return []
    size = _HELD_OUT_SHARE if rows * _HELD_OUT_SHARE <= _MOST_HELD_OUT else float(_MOST_HELD_OUT)
    return [
        Advice("val_size", size, "held-out loss tells when to stop", "S0:L592"),
        Advice("eval_strategy", "epoch", "once for every pass over the rows", "S0:L592"),
    ]


def memory_advice(facts: ModelFacts, setup: Setup, limit: int) -> tuple[list[Advice], Setup | None]:
    """Batch, recomputation, bits and length with which ``setup`` fits into nine tenths of ``limit`` bytes.

    Returns:
        Advice for what must change, the batch always included, and the changed setup; none if nothing helps.
    """
    for changed, reason in _sparing(setup):
        kept = changed.batch * changed.accumulation
        for batch in _halved(changed.batch):
            fitting = replace(changed, batch=batch, accumulation=-(-kept // batch))
            total = memory(facts, fitting).total
            if total <= HEAD_ROOM * limit:
                return list(_changes(setup, fitting, total, limit, reason)), fitting
    return [], None


def _sparing(setup: Setup) -> Iterator[tuple[Setup, str]]:
    """The setup, and what it can become to need less: first what costs only time."""
    yield setup, ""
    now = replace(setup, checkpointing=True)
    yield now, "without it does not fit"
    if setup.bits > 4 and not setup.trains_base:
        now = replace(now, bits=4)
        yield now, "with more bits it does not fit"
    while now.length >= 2 * _SHORTEST:
        now = replace(now, length=now.length // 2)
        yield now, "longer rows do not fit"


def _halved(batch: int) -> list[int]:
    return [batch >> n for n in range(batch.bit_length())]


def _changes(before: Setup, after: Setup, total: int, limit: int, reason: str) -> Iterator[Advice]:
    if after.bits != before.bits:
        yield Advice("quantization_bit", after.bits, "with more bits it does not fit", "plan")
    if after.checkpointing != before.checkpointing:
        yield Advice("gradient_checkpointing", True, "without it does not fit; a third more time", "plan")
    if after.length != before.length:
        yield Advice("cutoff_len", after.length, reason, "plan")
    takes = f"{total / 1e9:.1f} GB of {limit / 1e9:.1f} GB with rows of {after.length} tokens"
    yield Advice("per_device_train_batch_size", after.batch, takes, "plan")
    together = f"{after.batch} × {after.accumulation} = {after.effective_batch} rows in an update"
    yield Advice("gradient_accumulation_steps", after.accumulation, together, "S0:L288-300")


def review(facts: ModelFacts, setup: Setup, rate: float) -> tuple[Advice, ...]:
    """Advice where the rank or the learning rate of a configuration is outside what the guides give."""
    (low, _), size = _row(_RANK_BY_SIZE, facts.parameters)
    high = max(most for _, most in (*_RANK_BY_TASK.values(), _row(_RANK_BY_SIZE, facts.parameters)[0]))
    found = []
    if setup.method != "full" and not min(low, 4) <= setup.rank <= high:
        reason = f"{setup.rank} is outside of what is usual for models {size}: {low:g} to {high:g}"
        found.append(replace(rank_advice(facts.parameters), reason=reason))
    lowest, highest, source = _rates(facts.parameters, setup.bits)
    if setup.method != "full" and not lowest / 2 <= rate <= 2 * highest:
        advised = rate_advice(facts.parameters, setup.bits)
        reason = f"{rate:g} is far from what is usual: {lowest:g} to {highest:g}"
        found.append(Advice("learning_rate", advised.value, reason, source))
    return tuple(found)


def _row(table: Sequence[tuple[float, Range, str]], value: float) -> tuple[Range, str]:
    """Range and words of the first row that ``value`` is below."""
    return next((found, words) for below, found, words in table if value < below)
