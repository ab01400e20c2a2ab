"""Seconds of an update, from the arithmetic it takes and the rate at which a machine does it.

A product of N tokens with a weight of P numbers takes 2·P·N operations forward. Backward, a frozen weight takes
as many once more (the gradient of its input), one that trains twice as many. Attention takes 4·H·d·N·L for rows
of L tokens, half of it where a fused kernel leaves out what is masked, and twice that backward. Checkpointing
runs the blocks forward once more. Embeddings, norms and activations are a few percent and not counted.

No machine does all that at the rate of its matrix products: lorakit's steps were measured to take 1.6 to 2.3
times as long (benchmarks/step.py), so `EFFICIENCY` is a half. Weights in a few bits are decoded once in each
direction, which on a CPU takes as long as the products of some hundred tokens.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from lorakit import hardware
from lorakit.errors import UsageError
from lorakit.files import cache_folder
from lorakit.hardware import Device
from lorakit.modelinfo.facts import ModelFacts, share
from lorakit.planning.adapters import adapted, numbers
from lorakit.planning.setup import Setup

EFFICIENCY = 0.5
RATES_FILE = "rates.json"  # in the cache: {"gflops": {"bf16": 430.0, …}, "threads": 2, …}
_CORE = {"fp32": 50.0, "bf16": 25.0, "fp16": 1.0}  # GFLOP/s of a core nobody measured: 256-bit FMA at 3 GHz
_BF16 = 100.0  # with bf16 instructions
# Numbers decoded a second: 15 ms for 4096 × 4096, as bitsandbytes on two cores; a GPU's memory, not measured.
_DECODED: dict[Device, float] = {"cpu": 1.0e9, "cuda": 2.0e11}


@dataclass(frozen=True)
class Rates:
    """How fast a machine multiplies, and where that is known from; None if it is not.

    ``threads``: with how many threads, where it was measured.
    """

    gflops: float | None
    origin: str
    threads: int | None = None


@dataclass(frozen=True)
class Time:
    """Of one update on all devices: operations on one, seconds, tokens a second of all; None without a rate."""

    flops: int
    seconds: float | None
    tokens_per_second: float | None
    rates: Rates


def time(facts: ModelFacts, setup: Setup, rates: Rates) -> Time:
    """What one update takes."""
    flops = setup.accumulation * pass_flops(facts, setup)
    if rates.gflops is None:
        return Time(flops, None, None, rates)
    seconds = flops / (rates.gflops * 1e9 * EFFICIENCY)
    if setup.bits < 16:
        quantised = sum(m.size * m.count for m in facts.modules if m.kind == "linear" and m.path != facts.head)
        seconds += setup.accumulation * (3 if setup.checkpointing else 2) * quantised / _DECODED[setup.device]
    tokens = setup.accumulation * setup.tokens * setup.ranks
    return Time(flops, seconds, tokens / seconds, rates)


def pass_flops(facts: ModelFacts, setup: Setup) -> int:
    """Operations of one pass, forward and backward, on one device."""
    tokens = setup.tokens
    body = head = 0
    for module in facts.modules:
        met = share(module, facts.blocks) * module.count
        if module.path == facts.head:
            head = met
        elif module.kind in ("linear", "experts"):
            body += tokens * met
        elif module.kind == "conv":
            body += setup.batch * met * module.positions
    packed = setup.attention_of(facts) == "packed"
    head *= round(tokens * setup.labelled) if packed else tokens
    forward = 2 * body + _attention(facts, setup)
    backward = forward + _attention(facts, setup)  # attention's takes twice as much
    again = forward if setup.checkpointing else 0
    if setup.method == "full":
        trained = 2 * (body + head)
    else:
        trained = 6 * tokens * numbers(adapted(facts, setup), setup)[0]
    return forward + backward + again + 4 * head + trained


def _attention(facts: ModelFacts, setup: Setup) -> int:
    """Scores and weighted values of all blocks."""
    blocks = facts.blocks
    if blocks is None:
        return 0
    kind = setup.attention_of(facts)
    row = setup.row if kind == "packed" and setup.row else setup.length
    whole = 4 * blocks.layers * blocks.heads * blocks.head_dim * setup.tokens * row
    return whole // 2 if kind == "sdpa" and blocks.causal else whole


def find_rates(setup: Setup, gflops: float | None = None) -> Rates:
    """The rate that is given, that was measured here, or, on a CPU, a guess that says so.

    Raises:
        UsageError: a rate that is none, or a file of rates that cannot be read.
    """
    if gflops is not None:
        if not (math.isfinite(gflops) and gflops > 0):
            raise UsageError(f"a rate of {gflops} GFLOP/s is none", remedy="give a positive number")
        return Rates(gflops, "as given")
    measured, threads = _measured() if setup.device == hardware.device() else ({}, 1)
    if setup.precision in measured:
        rate, origin = measured[setup.precision], "measured on this machine"
        if setup.device == "cuda":
            return Rates(rate, origin, threads)
        here = _threads() or threads
        told = f"{origin} with {threads} thread{'s' * (threads > 1)}"
        return Rates(
            rate * here / threads, told if here == threads else f"{told}, for {here} in proportion", here
        )
    if setup.device == "cuda":
        return Rates(None, "not known: run `lorakit env` on the machine with the GPU, or give a rate")
    core = _BF16 if setup.precision == "bf16" and hardware.supports("bf16") else _CORE[setup.precision]
    cores = os.cpu_count() or 1
    return Rates(core * cores, f"a guess ({core:g} for each of {cores} cores): `lorakit env` measures it")


def _threads() -> int | None:
    """With how many threads a training that is started from here would run, where that is said."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) > 0 else None


def _measured() -> tuple[dict[str, float], int]:
    """Rates by number format, and with how many threads they were measured."""
    path = cache_folder() / RATES_FILE
    try:
        value: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, 1
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the measured rates cannot be read: {error}", place=str(path), remedy="delete it"
        ) from error
    try:
        found = {str(name): float(rate) for name, rate in value["gflops"].items()}
        threads = int(value["threads"])
        if not all(number > 0 for number in (*found.values(), threads)):
            raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            "the measured rates make no sense", place=str(path), remedy="delete it and run `lorakit env`"
        ) from error
    return found, threads
