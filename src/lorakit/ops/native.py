"""C++ passes (the .cpp files here): compiled once on this machine, called with the addresses of tensors.

PyTorch computes ``x * rsqrt(mean(x²) + ε) * w`` in five passes over memory, on a CPU at a tenth of the speed
that one pass has; decisions/0019 shows what that costs in a step. Whoever calls has a plain PyTorch version
of the same, for tensors that are not `fits`: on a GPU, in other dtypes, under ``torch.compile``, or where
there is no compiler.

The library lies in the cache folder under a name made of its source, its flags and this processor's
instructions. ``LORAKIT_NATIVE=0`` in the environment switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import hardware
from lorakit.errors import StorageError
from lorakit.files import cache_folder, write_with
from lorakit.log import logger

_FOLDER = Path(__file__).parent
_SOURCES = [
    _FOLDER / "kernels.cpp",
    _FOLDER / "lora.cpp",
    _FOLDER / "attention.cpp",
    _FOLDER / "integers.cpp",
    _FOLDER / "products.cpp",
    _FOLDER / "projections.cpp",
    _FOLDER / "block.cpp",
]
_HEADERS = [_FOLDER / f"{name}.h" for name in ("vectors", "masks", "tiles", "products", "projections")]
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fvisibility=hidden")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SECONDS = 120  # of a compilation


def fits(*tensors: Tensor | None) -> bool:
    """Whether the passes take these tensors: contiguous, on the CPU, all float32 or all bfloat16."""
    given = [tensor for tensor in tensors if tensor is not None]
    same = len({tensor.dtype for tensor in given}) == 1 and given[0].dtype in _DTYPES
    plain = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in given)
    return same and plain and not torch.compiler.is_compiling() and library() is not None


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has the vectors for which matrix products in C++ pay."""
    wanted = "avx512_bf16" if dtype == torch.bfloat16 else "avx512f"
    return wanted in hardware.cpu_flags()


def matrix_units() -> bool:
    """Whether matrix units for bfloat16 and 8-bit integers may be used here (AMX)."""
    found = library()
    return found is not None and bool(found.lorakit_matrix_units())


def run(name: str, dtype: torch.dtype, *arguments: Tensor | float | int | ctypes.Array[Any] | None) -> None:
    """Call ``lorakit_<name>`` for tensors that `fits`; a float is passed as float, an int as long."""
    found = library()
    assert found is not None
    pass_: Callable[..., None] = getattr(found, f"lorakit_{name}")
    pass_(_DTYPES[dtype], *map(_argument, arguments), torch.get_num_threads())


def longs(values: Iterable[int | float]) -> ctypes.Array[Any]:
    """A C++ struct whose fields take 64 bits each; a float is passed as double."""
    found = tuple(values)
    kinds = "".join("d" if isinstance(value, float) else "q" for value in found)
    return ctypes.create_string_buffer(struct.pack(kinds, *found), 8 * len(found))


def _argument(value: Tensor | float | int | ctypes.Array[Any] | None) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_long(value)
    return ctypes.c_void_p(None) if value is None else value


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; None where they are switched off or cannot be compiled, which is logged once."""
    compiler = hardware.pass_compiler()
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, StorageError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        logger.warning("the C++ passes cannot be compiled, steps are slower without them: %.300s", said)
        return None


def _built(compiler: str) -> Path:
    """The library's file, made if it is not there; several processes may do so at once."""
    described = [
        *(path.read_text() for path in _SOURCES + _HEADERS),
        *_FLAGS,
        compiler,
        *sorted(hardware.cpu_flags()),
    ]
    name = hashlib.sha256("\0".join(described).encode()).hexdigest()[:16]
    target = cache_folder() / "native" / f"{name}.so"
    if not target.exists():
        command = [compiler, *_FLAGS, *map(str, _SOURCES), "-o"]
        limits: dict[str, Any] = {"check": True, "capture_output": True, "text": True, "timeout": _SECONDS}
        write_with(target, lambda aside: subprocess.run([*command, str(aside)], **limits))
    return target
