"""Tensors from files nobody vouches for: ``.safetensors`` and plain PyTorch files.

Everything a file claims is compared with the bytes it has before a tensor is made, so that a lying one costs
neither time nor memory, and nothing in it is ever executed. Values are not looked at here: NaN may be one.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.checkpoint.strict_json import parse_object, read_bytes
from lorakit.errors import AdapterMismatchError

NOTES_KEY = "lorakit"
PLAIN = (".pth", ".pt", ".bin")
Index = dict[str, tuple[tuple[int, ...], str]]  # name -> shape, number format

_MAX_HEADER = 16 << 20
_MAX_HEADER_VALUES = 1_000_000
_MAX_PICKLE = 2 << 20
_MAX_STEPS = 250_000  # of the pickle; a tensor takes about 40
_MAX_DIMENSIONS = 16
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# All that a dictionary of tensors names in its pickle. PyTorch's own list is longer: its `bytearray` can ask
# for any amount of memory, and its sets compute hashes.
_STORAGES = (
    "Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double", "ComplexFloat",
    "Float8_e4m3fn", "Float8_e5m2",
)  # fmt: skip
_ALLOWED = {
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch.storage UntypedStorage", "torch device",
    *(f"torch {name}Storage" for name in _STORAGES),
    *(str(dtype).replace(".", " ") for dtype in _DTYPES.values()),
}  # fmt: skip
# What the reader behind torch.load raises for a pickle that is not one.
_NO_PICKLE = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    EOFError, AssertionError, struct.error,
)  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file, on the CPU, by name.

    They may be views of the file on disk: copy them before the file changes.

    Raises:
        AdapterMismatchError: no such file, another kind of file, or one whose contents are not what it claims.
    """
    return dict(stream_tensors(path))


def stream_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """As `read_tensors`, one tensor after the other."""
    if path.suffix in PLAIN:
        yield from read_plain(path)[0].items()
        return
    names = tensor_index(path)
    try:
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _unusable(path, str(error)) from error


def tensor_index(path: Path) -> Index:
    """Shape and number format (``float32``) of every tensor, without reading a value."""
    if path.suffix in PLAIN:
        return {name: (tuple(t.shape), dtype_name(t)) for name, t in read_plain(path)[0].items()}
    if path.suffix != ".safetensors":
        read_bytes(path, 1)
        kinds = ", ".join((".safetensors", *PLAIN))
        raise AdapterMismatchError(
            f"a file of kind {path.suffix or 'none'!r} cannot hold weights here",
            place=str(path),
            remedy=f"the kinds are {kinds}",
        )
    return _safetensors_index(path)


def dtype_name(tensor: Tensor) -> str:
    """``float32`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------- .safetensors


def _safetensors_index(path: Path) -> Index:
    length = int.from_bytes(read_bytes(path, 8), "little")
    size = path.stat().st_size
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise _unusable(path, f"its header claims {length} bytes, the file has {size}")
    header = parse_object(read_bytes(path, 8 + length)[8:], str(path), max_values=_MAX_HEADER_VALUES)
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        fault = _entry_fault(entry)
        if fault:
            raise _unusable(path, f"tensor {name[:200]!r}: {fault}")
        spans.append(tuple(entry["data_offsets"]))
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise _unusable(path, f"its tensors overlap or leave a gap at byte {min(begin, end)}")
        end = stop
    if end != size - 8 - length:
        raise _unusable(path, f"its tensors claim {end} bytes, the file has {size - 8 - length} for them")
    return {
        name: (tuple(entry["shape"]), str(_DTYPES[entry["dtype"]]).removeprefix("torch."))
        for name, entry in header.items()
    }


def _entry_fault(entry: Any) -> str | None:
    """What is wrong with one tensor's row of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return "its entry needs exactly dtype, shape and data_offsets"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if str(entry["dtype"]) not in _DTYPES:
        return f"unknown number format {entry['dtype']!r:.80}"
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2 and len(shape) <= _MAX_DIMENSIONS):
        return f"shape {shape!r:.80}, data_offsets {offsets!r:.80}"
    if max(shape, default=0) >= 2**63:
        return f"shape {shape!r:.80}"
    needed = math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
    if offsets[1] - offsets[0] != needed:
        return f"shape {shape!r:.80} needs {needed} bytes, it has {offsets[1] - offsets[0]}"
    return None


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


# ---------------------------------------------------------------------------------------------------- .pth


def read_plain(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file that ``torch.save`` wrote, and the description under the key ``lorakit`` or ``{}``.

    The file must hold a dictionary of tensors. One that holds such a dictionary under ``state_dict`` stands for
    that; what lies beside it is left out.

    Raises:
        AdapterMismatchError: anything else, above all what more than weights would be needed for.
    """
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:  # its text recommends to switch the protection off
        raise _unusable(path, "its description is not one of tensors") from error
    except _NO_PICKLE as error:
        raise _unusable(path, (str(error).strip() or type(error).__name__).splitlines()[0][:200]) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict):
        raise _unusable(path, f"it holds a {type(loaded).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in loaded.items() if name != NOTES_KEY}
    notes = loaded.get(NOTES_KEY, {})
    if not isinstance(notes, dict):
        raise _unusable(path, f"under {NOTES_KEY!r} it holds a {type(notes).__name__}")
    for name, value in tensors.items():
        fault = _value_fault(name, value)
        if fault:
            raise _unusable(path, f"{name!r:.200}: {fault}")
    return {name: tensor.detach() for name, tensor in tensors.items()}, notes


def _value_fault(name: object, value: object) -> str | None:
    if not isinstance(name, str):
        return "the name is not a text"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} where only tensors belong"
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        return "not a plain dense tensor"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"shape {tuple(value.shape)} claims more values than the file has"
    return None


def _check_archive(path: Path) -> None:
    """Refuse what is not the stored archive of a dictionary of tensors, from its table of contents alone."""
    if read_bytes(path, 4) != b"PK\x03\x04":
        raise _unusable(
            path,
            "it is not an archive of torch.save",
            "save it again with today's torch.save(state_dict, path)",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            roots = {name.split("/")[0] for name in names}
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            script = any(name.endswith("/constants.pkl") for name in names)  # TorchScript
            if len(names) < len(entries) or len(roots) > 1 or len(pickles) != 1 or script:
                raise _unusable(path, "it is not an archive of torch.save")
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise _unusable(path, "it is compressed or encrypted, which torch.save does not do")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise _unusable(path, "its entries claim more bytes than the file has")
            if pickles[0].file_size > _MAX_PICKLE:
                raise _unusable(path, f"its description is larger than {_MAX_PICKLE} bytes")
            _check_pickle(archive.read(pickles[0]), path)
    except (OSError, zipfile.BadZipFile, *_NO_PICKLE) as error:
        raise _unusable(path, f"it is truncated or damaged: {error}") from error


def _check_pickle(data: bytes, path: Path) -> None:
    """Refuse a pickle that names more than tensors need, or uses one tuple twice.

    ``t1 = (t0, t0)``, ``t2 = (t1, t1)`` … as a key takes 2ⁿ steps to hash: 200 bytes are enough for a day.
    """
    tuples: set[int] = set()
    on_top = False  # whether the value made last is a tuple
    for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if step == _MAX_STEPS or (opcode.name == "PROTO" and argument != 2):
            raise _unusable(path, "its description is not one that torch.save writes for tensors")
        if opcode.name == "GLOBAL" and argument not in _ALLOWED:
            raise _unusable(
                path,
                f"it needs more than weights: it names {argument!r:.200}",
                "nothing of it was run; ask for the weights alone, as safetensors",
            )
        if opcode.name in {"BINPUT", "LONG_BINPUT"}:
            (tuples.add if on_top else tuples.discard)(int(argument or 0))
            continue
        on_top = opcode.name.startswith("TUPLE")
        if opcode.name in {"BINGET", "LONG_BINGET"} and argument in tuples:
            raise _unusable(path, "its description uses one tuple in several places")


def _unusable(
    path: Path, cause: str, remedy: str = "save or download the file again; nothing was loaded"
) -> AdapterMismatchError:
    return AdapterMismatchError(f"cannot read the weights: {cause}", place=str(path), remedy=remedy)
