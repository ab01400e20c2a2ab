"""What this machine can do: devices, memory, instruction sets. The only file that asks.

Torch and psutil are imported inside the functions that need them, so that a configuration is checked without
them, and at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import shutil
import sys
from pathlib import Path
from typing import Literal

Device = Literal["cuda", "cpu"]
Precision = Literal["bf16", "fp16", "fp32"]

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 (two) and Arm
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}  # torch has no fast integer products on Arm


@functools.cache
def device() -> Device:
    """``cuda`` when a usable GPU is there, else ``cpu``."""
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the processor, lower case; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return frozenset(value.lower().split())
    return frozenset()


@functools.cache
def supports(precision: Precision) -> bool:
    """Whether matrix products in this precision run in hardware here.

    fp16 counts on GPUs only: CPUs emulate it at a hundredth of their fp32 rate.
    """
    if precision == "fp32":
        return True
    if device() == "cpu":
        return precision == "bf16" and bool(cpu_flags() & _BF16_FLAGS)
    import torch

    return precision == "fp16" or torch.cuda.is_bf16_supported()


@functools.cache
def integer_products() -> bool:
    """Whether products of 8-bit integers run in hardware here."""
    return device() == "cuda" or bool(cpu_flags() & _INT8_FLAGS)


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that ``torch.compile`` would use for the processor, if there is one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)


def matrix_units() -> bool:
    """Whether the processor has matrix units for bfloat16 and 8-bit integers (AMX)."""
    return {"amx_bf16", "amx_int8"} <= cpu_flags()


def pass_compiler() -> str | None:
    """The compiler of lorakit's C++ passes; None without one, or if ``LORAKIT_NATIVE=0`` switches them off."""
    return None if os.environ.get("LORAKIT_NATIVE") == "0" or sys.platform == "win32" else compiler()


def best_precision() -> Precision:
    """bf16 where the hardware has it, else fp32; fp16 would need loss scaling to train."""
    return "bf16" if supports("bf16") else "fp32"


def memory_used() -> int:
    """Bytes in use now: on a GPU the allocator's, else this process's resident set."""
    if device() == "cuda":
        import torch

        return int(torch.cuda.memory_allocated())
    return resident()


def memory_peak() -> int:
    """Bytes in use at the highest point of this process."""
    if device() == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resident_peak()


def memory_limit() -> int:
    """Bytes that `memory_peak` can come to: all of the GPU's, or what this machine gives the process."""
    if device() == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)
    return resident_limit()


def resident(pid: int | None = None) -> int:
    """Bytes of this machine's memory that a process has now, this one if none is named; 0 once it is gone."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def resident_files() -> int:
    """That part of `resident` which mirrors files, such as libraries and mapped weights (Linux)."""
    import psutil

    return int(psutil.Process().memory_info().shared)


def resident_peak() -> int:
    """Bytes of this machine's memory that this process had at its highest point; a fork starts anew."""
    with contextlib.suppress(OSError):  # on Linux, ru_maxrss counts the program that started this one, too
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def resident_limit() -> int:
    """Bytes that this process can come to have: its own, and what is free in the machine and its container."""
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # another system, or no limit ("max")
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used + int(statistics["file"]))  # cached files give way
    return resident() + free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a class of its own for a GPU, and a text for a CPU."""
    import torch

    texts = ("can't allocate memory", "not enough memory", "cannot allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc's ``malloc_trim``).

    Large blocks that come and go beside small ones that stay leave holes, which it would keep for later.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def lean_memory() -> None:
    """From now on return tensors of 3 MB and more to the system when they are freed (glibc's ``mallopt(3)``).

    By default glibc raises that limit to 32 MB as it goes, and holes between tensors of different sizes add up:
    to 1 GB in a training step of a 7B model. The price is page faults for every large tensor, a quarter of that
    step's time, so this is for models that hardly fit.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for parameter, size in ((_M_MMAP_THRESHOLD, 3 << 20), (_M_TRIM_THRESHOLD, 64 << 20)):
            library.mallopt(parameter, size)


def processor_name() -> str:
    """The processor as the system calls it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def summary() -> dict[str, str | int | float]:
    """What a report says about the machine."""
    import psutil

    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processor": processor_name(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": device(),
        "best_precision": best_precision(),
    }
