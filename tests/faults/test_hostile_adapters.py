"""Files made to hurt: each is refused at once, with nothing large allocated, run or written."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.checkpoint.strict_json import read_object
from lorakit.checkpoint.tensor_files import read_plain, read_tensors, tensor_index
from lorakit.errors import AdapterMismatchError, LorakitError

SECONDS = 1.0
MEGABYTE = 1 << 20


def refused(path: Path, read: Callable[[Path], object] = read_tensors) -> str:
    """The message of the refusal, which names the place, a remedy, and comes within a second."""
    start = time.process_time()
    with pytest.raises(AdapterMismatchError) as caught:
        read(path)
    assert time.process_time() - start < SECONDS
    assert caught.value.place == str(path)
    assert caught.value.remedy
    return caught.value.message


# ---------------------------------------------------------------------------------------------------- JSON

JSON: list[tuple[str | bytes, str]] = [
    ("", "not JSON: Expecting value"),
    ("[1]", "not a JSON object"),
    ("3", "not a JSON object"),
    ('{"r": 1, "x": 2, "r": 3}', "not JSON: the key 'r' is given twice"),
    ('{"a": [{"b": {"c": 1, "c": 1}}]}', "not JSON: the key 'c' is given twice"),
    ('{"a": NaN}', "not JSON: NaN is not a number that JSON knows"),
    ('{"a": [-Infinity]}', "not JSON: -Infinity is not a number that JSON knows"),
    ('{"a": 1e999}', "not JSON: 1e999 is not a number that JSON knows"),
    ('{"a": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
    (
        '{"a": ' + "[" * 63 + "1" + "]" * 63 + ', "b": [' + "[" * 63 + "]" * 64 + "}",
        "nested deeper than 64 levels",
    ),
    ('{"a": ' + "[" * 40_000, "not JSON: nested too deeply"),
    ('{"a":' * 40_000, "not JSON: nested too deeply"),
    ('{"a": [' + "0," * 500_000 + "0]}", "not JSON: more than 50000 values"),
    ('{"a": "' + "x" * MEGABYTE + '"}', "larger than 1048576 bytes"),
    (b'{"a": "\xff"}', "not JSON: 'utf-8' codec can't decode"),
    ('{"a": 1}'.encode("utf-16"), "not JSON: 'utf-8' codec can't decode"),
]


@pytest.mark.parametrize(("content", "message"), JSON, ids=range(len(JSON)))
def test_json_that_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(path, read_object)


def test_json_that_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe", read_object) == "cannot read pipe: it is not a regular file"
    assert refused(tmp_path, read_object).endswith(": it is a folder")
    assert refused(tmp_path / "a\0b", read_object) == "cannot read a\0b: embedded null byte"
    assert refused(tmp_path / "none", read_object) == "cannot read none: No such file or directory"
    assert refused(Path("/dev/zero"), read_object) == "cannot read zero: it is not a regular file"


@pytest.mark.parametrize(
    "content",
    [
        '{"a": [' + "0.0," * 49_000 + "0]}",
        '{"a": [' + "{}," * 24_000 + "0]}",
        '{"a": [' + "9" * 4299 + ("," + "9" * 4299) * 240 + "]}",
        "{" + ",".join(f'"{i:06x}":0' for i in range(49_000)) + "}",
        '{"a": "' + "\\u00e9" * 174_000 + '"}',
        '{"a": ' + "[" * 63 + "]" * 63 + "}",
    ],
    ids=["numbers", "objects", "long numbers", "keys", "escapes", "deep"],
)
def test_the_worst_json_that_is_read_takes_a_moment(tmp_path: Path, content: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(content)
    assert path.stat().st_size <= MEGABYTE
    spent = []
    for _ in range(5):
        start = time.process_time()
        assert read_object(path) == json.loads(content)
        spent.append(time.process_time() - start)
        if min(spent) < 0.5:
            return
    pytest.fail(f"{min(spent):.3f} s")


# --------------------------------------------------------------------------------------------- safetensors


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LIES: list[tuple[bytes, str]] = [
    (b"", "its header claims 0 bytes, the file has 0"),
    (b"\x01\x02", "its header claims 513 bytes, the file has 2"),
    (safetensors({}, length=2**63), "its header claims 9223372036854775808 bytes"),
    (safetensors({}, length=11), "its header claims 11 bytes, the file has 18"),
    (safetensors(b" " * (17 * MEGABYTE)), "its header claims 17825792 bytes"),
    (safetensors(b"{"), "not JSON"),
    (safetensors(b"[]"), "not a JSON object"),
    (safetensors(b'{"a": {"dtype": "F32"}, "a": 1}'), "the key 'a' is given twice"),
    (safetensors(b'{"a":' * 100_000), "not JSON: nested too deeply"),
    (safetensors({}), "its tensors claim 0 bytes, the file has 8 for them"),
    (safetensors({"a": 3}), "tensor 'a': its entry needs exactly dtype, shape and data_offsets"),
    (safetensors({"a": {**entry(), "run": "me"}}), "its entry needs exactly dtype, shape and data_offsets"),
    (safetensors({"a": entry(dtype="F33")}), "unknown number format 'F33'"),
    (safetensors({"a": entry(dtype=["F32"])}), "unknown number format ['F32']"),
    (safetensors({"a": entry(offsets=(0, 80))}), "shape [2] needs 8 bytes, it has 80"),
    (safetensors({"a": entry(shape=(10**9,), offsets=(0, 4 * 10**9))}), "its tensors claim 4000000000 bytes"),
    (safetensors({"a": entry(shape=(2**40, 2**40))}), "needs 4835703278458516698824704 bytes, it has 8"),
    (safetensors({"a": entry(shape=(-2, -1))}), "shape [-2, -1], data_offsets [0, 8]"),
    (safetensors({"a": entry(shape=(2.0,))}), "shape [2.0], data_offsets [0, 8]"),
    (safetensors({"a": entry(shape=(True,))}), "shape [True], data_offsets [0, 8]"),
    (safetensors({"a": entry(shape=[1] * 1000)}), "data_offsets [0, 8]"),
    (safetensors({"a": entry(shape=(0, 2**64), offsets=(0, 0))}), "shape [0, 18446744073709551616]"),
    (safetensors({"a": entry(offsets=(0, 8, 8))}), "data_offsets [0, 8, 8]"),
    (safetensors({"a": entry(offsets=(8, 0))}), "it has -8"),
    (safetensors({"a": entry(), "b": entry()}), "its tensors overlap or leave a gap at byte 0"),
    (safetensors({"a": entry(offsets=(4, 12))}, bytes(12)), "its tensors overlap or leave a gap at byte 0"),
    (safetensors({"a": entry()}, bytes(12)), "its tensors claim 8 bytes, the file has 12 for them"),
    (save({"a": torch.ones(4)})[:-1], "its tensors claim 16 bytes, the file has 15 for them"),
]


@pytest.mark.parametrize(("content", "message"), LIES, ids=range(len(LIES)))
@pytest.mark.parametrize("read", [read_tensors, tensor_index])
def test_safetensors_that_lie(
    tmp_path: Path, content: bytes, message: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    assert message in refused(path, read)


def test_an_honest_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.ones(2, 3),
        "b": torch.zeros(0, 5).half(),
        "../c": torch.tensor(7),
        "é": torch.ones(1).bool(),
    }
    path.write_bytes(save(tensors, {"format": "pt"}))
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert tensor_index(path) == {
        "a": ((2, 3), "float32"),
        "b": ((0, 5), "float16"),
        "../c": ((), "int64"),
        "é": ((1,), "bool"),
    }


# ------------------------------------------------------------------------------------------ PyTorch files
# Pickles are written by hand here, as no honest program writes them.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    numel: int = 4, offset: int = 0, size: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1)
) -> bytes:
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(numel) + b"tQ"
    )
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    arguments = storage + number(offset) + numbers(*size) + numbers(*stride) + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def holding(value: bytes, key: bytes = text("w")) -> bytes:
    return b"\x80\x02}(" + key + value + b"u."


def archive(
    description: bytes, path: Path, *, method: int = zipfile.ZIP_STORED, data: bytes = bytes(16), **extra: bytes
) -> Path:
    with zipfile.ZipFile(path, "w", method) as target:
        entries = {"a/data.pkl": description, "a/byteorder": b"little", "a/version": b"3\n", "a/data/0": data}
        for name, content in {**entries, **extra}.items():
            target.writestr(name, content)
    return path


# A tuple of two equal tuples of two equal tuples …: its hash takes 2^30 steps.
TOWER = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(30))
MORE = "cannot read the weights: it needs more than weights: it names "
CUNNING: dict[str, tuple[bytes, str]] = {
    "system": (holding(b"cos\nsystem\n" + text("touch witness") + b"\x85R"), MORE + "'os system'"),
    "posix": (holding(b"cposix\nsystem\n" + text("touch witness") + b"\x85R"), MORE + "'posix system'"),
    "no global": (b"\x80\x02(ios\nsystem\n.", "its description is not one of tensors"),
    "bytearray": (
        holding(b"cbuiltins\nbytearray\n" + number(10**10) + b"\x85R"),
        MORE + "'builtins bytearray'",
    ),
    "new tensor": (holding(b"ctorch\nTensor\n" + numbers(10**5, 10**5) + b"R"), MORE + "'torch Tensor'"),
    "set": (holding(b"cbuiltins\nset\n]\x85R"), MORE + "'builtins set'"),
    "hash": (holding(number(1), key=TOWER), "its description uses one tuple in several places"),
    "protocol": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "its description is not one that torch.save writes"),
    "steps": (b"\x80\x02" + b"N" * 600_000 + b".", "its description is not one that torch.save writes"),
    "long": (b"\x80\x02" + text("x" * (3 * MEGABYTE)) + b".", "its description is larger than 2097152 bytes"),
    "no pickle": (b"hello", "it is truncated or damaged"),
    "nothing": (b"", "it is truncated or damaged"),
    "endless text": (b"\x80\x02X\xff\xff\xff\xff.", "it is truncated or damaged"),
    "storage": (holding(tensor(10**12, size=(10**6, 10**6), stride=(10**6, 1))), "cannot read the weights: "),
    "expanded": (
        holding(tensor(size=(10**6, 10**6), stride=(0, 0))),
        "'w': shape (1000000, 1000000) claims more values than the file has",
    ),
    "beyond": (holding(tensor(size=(4, 4), stride=(4, 1))), "cannot read the weights: "),
    "before": (holding(tensor(offset=-100)), "cannot read the weights: "),
    "overflow": (holding(tensor(size=(2**62, 4), stride=(4, 1))), "cannot read the weights: "),
    "backwards": (holding(tensor(offset=3, stride=(-2, -1))), "cannot read the weights: "),
    "number": (holding(number(3)), "'w': a int where only tensors belong"),
    "key": (holding(tensor(), key=number(3)), "3: the name is not a text"),
    "list": (b"\x80\x02].", "it holds a list, not a dictionary of tensors"),
    "notes": (holding(number(3), key=text("lorakit")), "under 'lorakit' it holds a int"),
}


@pytest.mark.parametrize("case", CUNNING)
def test_pytorch_files_that_lie(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    description, message = CUNNING[case]
    assert message in refused(archive(description, Path("x.pth")))
    assert "weights_only" not in refused(Path("x.pth"))  # never an advice to switch the protection off
    assert [path.name for path in Path().iterdir()] == ["x.pth"]


def test_the_handwriting_is_right(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    path = archive(holding(tensor()), tmp_path / "x.pth", data=struct.pack("<4f", 1, 2, 3, 4))
    assert torch.equal(read_tensors(path)["w"], values)
    assert torch.equal(torch.load(path, weights_only=True)["w"], values)


def test_nothing_large_is_allocated(tmp_path: Path) -> None:
    """All of them in one process, whose memory at the end is little above that at the start."""
    bomb = archive(holding(tensor()), tmp_path / "bomb.pth", method=zipfile.ZIP_DEFLATED, data=bytes(1 << 28))
    assert bomb.stat().st_size < MEGABYTE
    for case, (description, _) in CUNNING.items():
        archive(description, tmp_path / f"{case}.pth")
    for index, (content, _) in enumerate(LIES):
        (tmp_path / f"{index}.safetensors").write_bytes(content)
    code = (
        "import resource, sys, torch, pathlib\n"
        "from lorakit.checkpoint.tensor_files import read_tensors\n"
        "from lorakit.errors import AdapterMismatchError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before, refused = peak(), 0\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: read_tensors(path)\n"
        "    except AdapterMismatchError: refused += 1\n"
        "print(refused, peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120, check=True
    )
    count, grown = map(int, result.stdout.split())
    assert count == len(CUNNING) + len(LIES) + 1
    assert grown < 100  # MB; most of it is what torch.load imports


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: archive(holding(tensor()), p, method=zipfile.ZIP_DEFLATED), "it is compressed or encrypted"),
        (lambda p: archive(holding(tensor()), p, **{"b/data.pkl": b"."}), "it is not an archive of torch.save"),
        (
            lambda p: archive(holding(tensor()), p, **{"a/x/data.pkl": b"."}),
            "it is not an archive of torch.save",
        ),
        (lambda p: archive(holding(tensor()), p, **{"../../data": b"x"}), "it is not an archive of torch.save"),
        (
            lambda p: archive(holding(tensor()), p, **{"a/constants.pkl": b"."}),
            "it is not an archive of torch.save",
        ),
        (lambda p: p.write_bytes(pickle.dumps({"w": 1})), "it is not an archive of torch.save"),
        (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)), "it is truncated or damaged"),
        (lambda p: torch.save({"w": 1}, p, _use_new_zipfile_serialization=False), "it is not an archive"),
        (lambda p: p.mkdir(), "it is a folder"),
        (os.mkfifo, "it is not a regular file"),
        (lambda p: None, "No such file or directory"),
    ],
)
def test_archives_that_are_none(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "x.pth")
    assert message in refused(tmp_path / "x.pth")


def test_entries_that_claim_too_much(tmp_path: Path) -> None:
    path = archive(holding(tensor()), tmp_path / "x.pth")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")  # the last row of the table of contents: the values
    data[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    assert "its entries claim more bytes than the file has" in refused(path)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    for name in ("x.pth", "x.safetensors"):
        path, tensors = tmp_path / name, {"a": torch.ones(100), "b": torch.ones(50)}
        if name == "x.pth":
            torch.save(tensors, path)
        else:
            path.write_bytes(save(tensors))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        assert "cannot read the weights: " in refused(path)


def test_honest_pytorch_files(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(3, 3))
    model[2].weight.data = model[2].weight.data.bfloat16()
    state = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "x.pth"
    files: list[tuple[Any, dict[str, Any]]] = [
        (state, {}),
        (dict(model.named_parameters()), {}),
        ({"state_dict": state, "epoch": 3, "optimizer": optimizer.state_dict()}, {}),
        ({**state, "lorakit": {"r": 4, "names": ["a"]}}, {"r": 4, "names": ["a"]}),
        ({"x": torch.arange(6).view(2, 3).T, "y": torch.arange(6)[2:]}, {}),
    ]
    for content, notes in files:
        torch.save(content, path)
        tensors, about = read_plain(path)
        expected = content.get("state_dict", content)
        assert about == notes
        assert tensors.keys() == expected.keys() - {"lorakit"}
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
        assert not any(found.requires_grad for found in tensors.values())
        assert tensor_index(path).keys() == tensors.keys()


@pytest.mark.parametrize(
    "content",
    [
        nn.Linear(2, 2),
        {"w": torch.ones(2).to_sparse()},
        {"w": torch.ones(2, device="meta")},
        {"w": {"deeper": torch.ones(2)}},
        torch.ones(2),
        {"w": io.BytesIO()},
    ],
    ids=["module", "sparse", "meta", "nested", "tensor", "object"],
)
def test_other_things_that_pytorch_saves(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert "cannot read the weights: " in refused(tmp_path / "x.pt")


# --------------------------------------------------------------------------------------------- whole folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(add_lora_to_model(nn.Sequential(nn.Linear(4, 4)), r=2), tmp_path / "adapter")


@pytest.fixture(autouse=True)
def nothing_is_written_outside(tmp_path: Path) -> Iterator[None]:
    """No test of this file leaves anything beside its own folder."""
    before = set(tmp_path.parent.iterdir())
    yield
    assert set(tmp_path.parent.iterdir()) == before


SETTINGS: list[dict[str, Any]] = [
    {"r": 10**9},
    {"r": 10**400},
    {"r": -1},
    {"lora_alpha": 10**400},
    {"lora_alpha": -1},
    {"target_modules": "(a+)+$"},
    {"target_modules": "(.*)*x"},
    {"target_modules": "(" * 1000},
    {"target_modules": "0{65535}"},
    {"target_modules": [f"m{i}" for i in range(49_000)]},
    {"target_modules": ["../../0"]},
    {"exclude_modules": "(((0*)*)*)*x"},
    {"rank_pattern": {"(((.*)*)*)*x": 10**9}},
    {"rank_pattern": {"0": 10**9}},
    {"rank_pattern": {f"m{i}": 3 for i in range(24_000)}},
    {"alpha_pattern": {"0": 1e308}, "lora_alpha": "x"},
    {"modules_to_save": ["../0"]},
    {"layers_to_transform": list(range(24_000))},
    {"peft_type": "../LORA"},
    {"auto_mapping": {"parent_library": "os"}, "peft_type": "OS"},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=range(len(SETTINGS)))
def test_settings_that_hurt(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    model = nn.Sequential(nn.Linear(4, 4))
    start = time.process_time()
    with pytest.raises(LorakitError) as caught:
        load_adapter(model, folder)
    assert time.process_time() - start < SECONDS
    assert caught.value.exit_code == 4
    assert len(str(caught.value)) < 3000
    assert not adapter_layers(model)


def test_an_expression_that_grows_when_compiled(folder: Path) -> None:
    """A billion repeats in twenty characters: gigabytes, unless it is refused before it is compiled."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "((0{999}){999}){999}"}))
    code = (
        "import resource, sys, pathlib, torch\n"
        "from lorakit.checkpoint.peft_format import load_adapter\n"
        "from lorakit.errors import LorakitError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "before = peak()\n"
        "try: load_adapter(torch.nn.Sequential(torch.nn.Linear(4, 4)), pathlib.Path(sys.argv[1]))\n"
        "except LorakitError: print(peak() - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(result.stdout) < 100  # MB


def test_names_of_tensors_are_only_names(folder: Path) -> None:
    tensors = {"../../escaped": torch.ones(1), "/etc/escaped": torch.ones(1), "a\0b": torch.ones(1)}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    with pytest.raises(AdapterMismatchError, match="tensors do not fit this model"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), folder)
    assert not list(folder.parent.rglob("escaped"))


def test_enough_is_tried() -> None:
    assert len(JSON) >= 16
    assert len(LIES) >= 25
    assert len(CUNNING) >= 20
    assert len(SETTINGS) >= 20
