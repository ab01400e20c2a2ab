"""How fast this machine multiplies: measured in a second, kept in the cache, where the planner reads it.

The best of several rounds counts: whatever else the machine is doing only ever makes a product slower.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from lorakit import hardware
from lorakit.files import cache_folder, write_json
from lorakit.planning.time import RATES_FILE

_SIZE = {"cpu": 1024, "cuda": 4096}  # of square matrices
_SECONDS = 0.25  # for each number format
_FEWEST = 3


@dataclass(frozen=True)
class MeasuredRates:
    """GFLOP/s of square products by number format (int8: integer operations), and where they were measured."""

    gflops: dict[str, float]
    processor: str
    device: str
    threads: int
    size: int
    measured: str  # ISO 8601


def rates(*, fresh: bool = False) -> MeasuredRates:
    """The rates in the cache, or, if there are none of this machine or ``fresh`` is true, new ones.

    Raises:
        StorageError: the cache cannot be written.
    """
    path = cache_folder() / RATES_FILE
    known = None if fresh else _known(path)
    if known is not None:
        return known
    found = measure()
    write_json(path, asdict(found))
    return found


def measure() -> MeasuredRates:
    """Measure now. float16 is left out on a CPU, which only emulates it."""
    device = hardware.device()
    size = _SIZE[device]
    a = torch.randn(size, size, device=device)
    whole = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    gflops = {}
    for name, dtype in formats.items():
        if name != "fp16" or device == "cuda":
            x = a.to(dtype)
            gflops[name] = _rate(lambda x=x: x @ x, size)  # type: ignore[misc]
    if hardware.integer_products():
        gflops["int8"] = _rate(lambda: torch._int_mm(whole, whole.T), size)
    threads = torch.get_num_threads()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return MeasuredRates(gflops, hardware.processor_name(), device, threads, size, now)


def _rate(product: Callable[[], torch.Tensor], size: int) -> float:
    product()  # the first one prepares
    best, rounds, end = float("inf"), 0, time.perf_counter() + _SECONDS
    while rounds < _FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        product()
        if hardware.device() == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        rounds += 1
    return round(2 * size**3 / best / 1e9, 1)


def _known(path: Path) -> MeasuredRates | None:
    """The rates of the file, if they are whole and of this machine with as many threads."""
    try:
        value = json.loads(path.read_bytes())
        found = MeasuredRates(**value)
    except (OSError, ValueError, TypeError):
        return None
    here = (hardware.processor_name(), hardware.device(), torch.get_num_threads())
    return found if (found.processor, found.device, found.threads) == here else None
