"""The way from a plain LoRA training to one that fits: each measure on top of those before, with its gigabytes.

Measures do not add up in percent of the start, as guides draw it: each acts on one part of the memory, and how
large that is depends on the model, the length and the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lorakit.modelinfo.facts import ModelFacts
from lorakit.planning.memory import Memory, memory
from lorakit.planning.setup import Setup

_BATCH = 4  # of the start, if the setup has a smaller one


@dataclass(frozen=True)
class Step:
    """One measure: its name, the setup with it, and the memory of that."""

    name: str
    setup: Setup
    memory: Memory


def waterfall(facts: ModelFacts, setup: Setup) -> tuple[Step, ...]:
    """Seven steps for the adapters, the length and the effective batch of ``setup``.

    The start is what a plain loop does: a 16-bit base, attention by plain products over padded rows, and
    cross-entropy over all positions in float32.
    """
    batch = max(setup.batch, _BATCH)
    kept = setup.batch * setup.accumulation
    start = replace(
        setup, bits=16, precision="fp16" if setup.precision == "fp16" else "bf16", batch=batch,
        accumulation=-(-kept // batch), checkpointing=False, attention="eager", loss="plain", row=None,
        method="lora" if setup.method == "full" else setup.method, unfreezes=False, passes=False,
    )  # fmt: skip
    packed = replace(start, attention=None).attention_of(facts) == "packed"
    measures: tuple[tuple[str, dict[str, object]], ...] = (
        ("16-bit base, plain LoRA", {}),
        ("+ 4-bit base (QLoRA)", {"bits": 4}),
        ("+ checkpointing", {"checkpointing": True}),
        (
            f"+ {'packed' if packed else 'fused'} attention{', C++ passes' if setup.compiled else ''}",
            {"attention": None, "row": setup.row, "passes": setup.passes},
        ),
        ("+ chunked loss", {"loss": "chunked"}),
        ("+ batch 1", {"batch": 1, "accumulation": kept}),
    )
    steps, now = [], start
    for name, change in measures:
        now = replace(now, **change)  # type: ignore[arg-type]
        steps.append(Step(name, now, memory(facts, now)))
    return tuple(steps)
