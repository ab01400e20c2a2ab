"""What this machine is and can do: versions, devices, instruction sets, which ops run and why, memory, disk."""

from __future__ import annotations

import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import psutil
import torch

from lorakit import __version__, hardware
from lorakit.files import cache_folder
from lorakit.ops import native

_PACKAGES = (
    "torch", "transformers", "safetensors", "tokenizers", "datasets", "accelerate", "peft",
    "bitsandbytes", "deepspeed", "flash-attn", "tensorboard", "wandb", "mlflow",
)  # fmt: skip
_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
_FLOOR = re.compile(r"([\w.-]+)>=([\d.]+)")
# What fine-tuning with adapters is commonly said to ask for: GB of GPU memory, of memory, of disk.
_HARDWARE = (
    ("models of 13B and more", 24, 64, 100),
    ("models of 7B, comfortably", 16, 32, 50),
    ("models of 7B, in 4 bits", 8, 16, 20),
)


def machine() -> dict[str, Any]:
    """Everything but rates, as plain values by topic."""
    memory, cache = psutil.virtual_memory(), cache_folder()
    formats = [name for name in ("fp32", "bf16", "fp16") if hardware.supports(name)]
    place = cache
    while not place.exists():
        place = place.parent
    disk = shutil.disk_usage(place)
    return {
        **hardware.summary(),
        "computes_in": ", ".join(formats),
        "instruction_sets": [flag for flag in _FLAGS if flag in hardware.cpu_flags()],
        "integer_products": hardware.integer_products(),
        "compiler": hardware.compiler(),
        "gpus": gpus(),
        "memory_free_gb": round(memory.available / 1e9, 1),
        "memory_limit_gb": round(hardware.memory_limit() / 1e9, 1),
        "cache": str(cache),
        "disk_free_gb": round(disk.free / 1e9, 1),
        "ops": ops(),
        "enough_for": enough_for(disk.free / 1e9),
        "lorakit": __version__,
        **{name: _version(name) for name in _PACKAGES},
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each GPU that torch can use. Not run on one yet."""
    if hardware.device() == "cpu":
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": each.name, "memory_gb": round(each.total_memory / 1e9, 1),
         "capability": f"{each.major}.{each.minor}", "processors": each.multi_processor_count}
        for each in found
    ]  # fmt: skip


def ops() -> dict[str, dict[str, str]]:
    """For each op with several ways to run: the one taken here, and why."""
    integers, passes = hardware.integer_products(), native.library() is not None
    bitsandbytes = _version("bitsandbytes") != "not installed"
    compiled, units = "C++" if passes else "PyTorch", native.matrix_units()
    fused = passes and native.multiplies(torch.bfloat16)
    attention = "one C++ pass" if fused else "dense products by length"
    if hardware.device() != "cpu":
        attention = "FlashAttention from compute capability 8.0 on, else dense products by length"
    return {
        "linear": {
            "runs": f"one autograd node, {hardware.best_precision()}; frozen products by "
            f"{'matrix units (AMX)' if units else 'PyTorch'}, thin products and dropout in {compiled}",
            "why": "saves x and x Aᵀ alone; the plain formula where autocast or a trained weight asks for it",
        },
        "attention": {
            "runs": f"packed rows, {attention} (ten families); else torch's SDPA",
            "why": "no padding, and on a CPU a faster backward pass than the fused one",
        },
        "norm, gated, rotary": {
            "runs": f"one pass each, {compiled}",
            "why": "PyTorch reads the same memory several times",
        },
        "loss": {
            "runs": "in pieces, its gradient in the forward pass",
            "why": "only labelled positions get logits",
        },
        "4 bits": {
            "runs": "bitsandbytes' kernels decode" if bitsandbytes else "PyTorch decodes",
            "why": "they are installed" if bitsandbytes else "bitsandbytes is not installed",
        },
        "8 bits": {
            "runs": ("integer products, one C++ pass" if units else "integer products")
            if integers
            else "dense products",
            "why": "the hardware has them" if integers else "no integer products in hardware",
        },
        "C++ passes": {
            "runs": "compiled into the cache" if passes else "off: PyTorch computes",
            "why": f"with {hardware.compiler()}; LORAKIT_NATIVE=0 switches them off" if passes
            else "LORAKIT_NATIVE=0, or no C++ compiler",
        },
    }  # fmt: skip


def enough_for(disk_gb: float) -> dict[str, Any]:
    """The common advice on hardware against what is here; `lorakit plan` knows better."""
    memory = psutil.virtual_memory().total / 1e9
    gpu = max((each["memory_gb"] for each in gpus()), default=0.0)
    rows = {}
    for name, *wanted in _HARDWARE:
        have = (("GPU memory", gpu), ("memory", memory), ("disk", disk_gb))
        lacks = [
            f"{what} {there:.0f} of {need} GB"
            for (what, there), need in zip(have, wanted, strict=True)
            if there < 0.95 * need  # a card of 24 GB says 23.6
        ]
        rows[name] = f"lacks {', '.join(lacks)}" if lacks else "yes"
    return rows


def old_packages() -> list[str]:
    """Requirements that the installed packages do not meet, as ``name>=version``."""
    found = []
    for line in requires("lorakit") or () if _version("lorakit") != "not installed" else ():
        floor = _FLOOR.match(line)
        if floor and "extra ==" not in line and not _reaches(_version(floor[1]), floor[2]):
            found.append(f"{floor[1]}>={floor[2]}")
    return found


def _reaches(have: str, floor: str) -> bool:
    return have != "not installed" and _numbers(have) >= _numbers(floor)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
