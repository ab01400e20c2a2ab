"""A checkpoint gives back what was put into it, or says what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorakit import __version__
from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.checkpoint.peft_format import fill_adapter, load_adapter, save_adapter
from lorakit.checkpoint.snapshot import (
    newest_good,
    prune,
    read_snapshot,
    set_aside,
    snapshot_bytes,
    snapshots,
    verify_snapshot,
    write_snapshot,
)
from lorakit.checkpoint.state import State
from lorakit.errors import DamagedError, DivergedError, LorakitError, ModelError, StorageError

FILES = {
    "adapter_config.json", "adapter_model.safetensors", "config.resolved.yaml", "lorakit.json",
    "manifest.json", "state.json", "state.safetensors",
}  # fmt: skip

# What lorakit 0.1.0 wrote for `STATE_1`.
FORMAT_1 = {
    "manifest.json": b"""\
{
  "format": 1,
  "lorakit": "0.1.0",
  "step": 3,
  "files": {
    "state.json": {
      "size": 43,
      "sha256": "387c82502c094b5e893ca6d0d6a687d5151a35d9c9d4c11d42c858629724869b"
    },
    "state.safetensors": {
      "size": 178,
      "sha256": "30a095ccac38687207a7a8ebeb799d837526feed59cd2a9b63301a8ade4f8a1d"
    }
  },
  "sha256": "e9f90ff748430c06a3362f1e118709b5be49e4b0d7aa9c6f1c7484e5b53d8b78"
}
""",
    "state.json": b'{"progress": {"step": 3, "losses": [0.25]}}',
    "state.safetensors": (
        b"\xa0\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"lorakit_state":"1"},"model/a":{"dtype":"F32","shape":[2],"data_offsets":'
        b'[0,8]},"rng/0/cpu":{"dtype":"U8","shape":[2],"data_offsets":[8,10]}}  '
        b"\x00\x00\xc0?\x00\x00\x00\xc0\x07\x08"
    ),
}
STATE_1 = State(
    {"model/a": torch.tensor([1.5, -2.0]), "rng/0/cpu": torch.tensor([7, 8], dtype=torch.uint8)},
    {"progress": {"step": 3, "losses": [0.25]}},
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def trained() -> nn.Module:
    model = add_lora_to_model(net(), r=2, seed=1)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.adapter("default").lora_B)
    return model


def fill(stage: Path) -> None:
    fill_adapter(trained(), stage, notes={"system": "Hi"})
    (stage / "config.resolved.yaml").write_text("seed: 1\n")


def some_state(seed: int = 0) -> State:
    random = torch.Generator().manual_seed(seed)
    tensors = {
        "model/0.lora_A": torch.randn(2, 6, generator=random),
        "optimizer/0.lora_A/exp_avg": torch.randn(2, 6, generator=random).bfloat16(),
        "rng/0/cpu": torch.randint(0, 256, (16,), generator=random, dtype=torch.uint8),
    }
    return State(tensors, {"progress": {"step": seed, "best": None, "losses": [0.1, -0.0, 1e-300]}})


def same(found: State, expected: State) -> None:
    assert found.values == expected.values
    assert json.dumps(found.values) == json.dumps(expected.values)  # -0.0, and the order
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        other = found.tensors[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert bits(other) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint, to be broken."""
    write_snapshot(tmp_path / "checkpoint-7", some_state(), fill)
    return tmp_path / "checkpoint-7"


class TestRoundTrip:
    VALUES = st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=12,
    )
    DTYPES = (
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8,
        torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64,
    )  # fmt: skip

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        values=st.dictionaries(st.text(), VALUES, max_size=4),
        shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
        seed=st.integers(0, 10**6),
    )
    def test_bit_for_bit(
        self, tmp_path_factory: pytest.TempPathFactory, values: Any, shapes: list[list[int]], seed: int
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        tensors = {}
        for i, shape in enumerate(shapes):
            dtype = self.DTYPES[(seed + i) % len(self.DTYPES)]
            tensors[f"other/{i} é\n.x"] = (10 * torch.randn(shape, generator=random)).to(dtype)
        run = tmp_path_factory.mktemp("run")
        write_snapshot(run / "checkpoint-1", State(tensors, values), lambda stage: None)
        same(read_snapshot(run / "checkpoint-1"), State(tensors, values))

    def test_tensors_as_they_come(self, tmp_path: Path) -> None:
        whole = torch.arange(24.0).view(4, 6)
        parameter = nn.Parameter(torch.randn(3))
        tensors = {
            "a": whole, "b": whole, "transposed": whole.T, "row": whole[2], "spread": whole[:, ::2],
            "expanded": whole[0].expand(5, 6), "parameter": parameter, "number": torch.tensor(7),
            "none": torch.empty(0, 3), "none too": torch.empty(0), "nan": torch.tensor([float("nan")]),
        }  # fmt: skip
        write_snapshot(tmp_path / "checkpoint-1", State(tensors), lambda stage: None)
        found = read_snapshot(tmp_path / "checkpoint-1")
        same(found, State(tensors))
        found.tensors["a"].add_(1)  # they belong to the reader
        same(read_snapshot(tmp_path / "checkpoint-1"), State(tensors))

    def test_the_same_bytes_every_time(self, tmp_path: Path) -> None:
        for run in ("one", "two"):
            (tmp_path / run).mkdir()
            write_snapshot(tmp_path / run / "checkpoint-1", some_state(), fill)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        write_snapshot(tmp_path / "checkpoint-3", STATE_1, lambda stage: None)
        written = contents(tmp_path / "checkpoint-3")
        assert {n: written[n] for n in ("state.json", "state.safetensors")}.items() <= FORMAT_1.items()

    def test_what_is_in_it(self, folder: Path) -> None:
        assert set(contents(folder)) == FILES
        manifest = verify_snapshot(folder)
        assert (manifest.lorakit, manifest.step, set(manifest.files)) == (
            __version__,
            7,
            FILES - {"manifest.json"},
        )
        for name, (size, digest) in manifest.files.items():
            data = (folder / name).read_bytes()
            assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())

    def test_it_is_an_adapter(self, folder: Path) -> None:
        x = torch.randn(3, 6)
        model = net()
        load_adapter(model, folder)
        assert torch.equal(model(x), trained()(x))
        alone = save_adapter(trained(), folder.parent / "adapter", notes={"system": "Hi"})
        assert contents(alone).items() <= contents(folder).items()

    def test_it_may_be_copied_anywhere(self, folder: Path, tmp_path: Path) -> None:
        elsewhere = shutil.copytree(folder, tmp_path / "else where é" / "best one")
        (elsewhere / ".DS_Store").write_text("what systems leave")
        shutil.rmtree(folder)
        same(read_snapshot(elsewhere), some_state())
        assert not any(os.fsencode(tmp_path) in data for data in contents(elsewhere).values())

    def test_about_how_large(self, tmp_path: Path) -> None:
        state = State({"model/a": torch.randn(500, 100), "optimizer/a/m": torch.randn(500, 100)})

        def adapter(stage: Path) -> None:
            (stage / "adapter_model.safetensors").write_bytes(bits(state.tensors["model/a"]))

        write_snapshot(tmp_path / "checkpoint-1", state, adapter)
        size = sum(map(len, contents(tmp_path).values()))
        assert snapshot_bytes(state) == pytest.approx(size, rel=0.01)


class TestWriting:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("model/a", torch.float32),
            ("optimizer/a/exp_avg", torch.bfloat16),
            ("optimizer/a/b", torch.float8_e5m2),
            ("model/c", torch.complex64),
        ],
    )
    def test_what_is_not_finite_is_never_saved(
        self, folder: Path, name: str, dtype: torch.dtype, value: float
    ) -> None:
        before = contents(folder.parent)
        bad = torch.zeros(3, 3, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        bad[1, 2] = value
        state = some_state()
        state.tensors[name] = bad.to(dtype)
        with pytest.raises(DivergedError, match=re.escape(f"NaN or infinity in {name} (1 tensors)")) as caught:
            write_snapshot(folder, state, fill)
        assert caught.value.exit_code == 5
        assert contents(folder.parent) == before

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nor_is_a_number(self, tmp_path: Path, value: float) -> None:
        with pytest.raises(DivergedError, match="a number of the run's state is not finite"):
            write_snapshot(tmp_path / "checkpoint-1", State(values={"best": {"loss": [value]}}), fill)
        assert names(tmp_path) == []

    @pytest.mark.parametrize("values", [{"a": (1, 2)}, {"a": {1: 2}}])
    def test_what_would_come_back_changed(self, tmp_path: Path, values: Any) -> None:
        with pytest.raises(LorakitError, match="a value that JSON changes"):
            write_snapshot(tmp_path / "checkpoint-1", State(values=values), fill)
        assert names(tmp_path) == []

    def test_the_one_that_was_there_is_replaced_as_a_whole(self, folder: Path) -> None:
        (folder / "stale").touch()
        write_snapshot(folder, some_state(3), fill)
        assert set(contents(folder)) == FILES
        same(read_snapshot(folder), some_state(3))
        assert names(folder.parent) == ["checkpoint-7"]

    @pytest.mark.parametrize("failure", [KeyboardInterrupt, DivergedError("x")])
    def test_a_failure_while_filling(self, folder: Path, failure: Any) -> None:
        def stop(stage: Path) -> None:
            fill(stage)
            raise failure

        before = contents(folder.parent)
        with pytest.raises((KeyboardInterrupt, DivergedError)):
            write_snapshot(folder, some_state(3), stop)
        assert contents(folder.parent) == before

    def test_a_run_whose_folder_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="its folder is gone"):
            write_snapshot(tmp_path / "gone" / "checkpoint-1", some_state(), fill)
        assert names(tmp_path) == []

    def test_a_name_without_a_step(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not checkpoint-<step>"):
            write_snapshot(tmp_path / "checkpoint-last", some_state(), fill)


def seal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, with a digest that is right again, as somebody would who means harm."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    change(fields)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**fields, "sha256": digest}))


class TestReading:
    def refusal(self, folder: Path) -> str:
        """The message of a refused checkpoint, which is the same for all who read it."""
        with pytest.raises(DamagedError) as caught:
            read_snapshot(folder)
        assert (caught.value.exit_code, caught.value.place) == (4, str(folder))
        return caught.value.message

    @pytest.mark.parametrize("name", sorted(FILES))
    def test_any_byte_that_changed(self, folder: Path, name: str) -> None:
        path = folder / name
        data = path.read_bytes()
        for place in range(0, len(data), 3 if name == "manifest.json" else 11):
            for bit in (place % 8, 5):  # bit 5 turns a letter into its capital
                path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
                with pytest.raises(DamagedError):
                    verify_snapshot(folder)
        path.write_bytes(data)
        same(read_snapshot(folder), some_state())

    @pytest.mark.parametrize("name", sorted(FILES))
    def test_a_file_that_is_cut_short_or_missing(self, folder: Path, name: str) -> None:
        path = folder / name
        data = path.read_bytes()
        for size in {*range(0, len(data), 13), len(data) - 2}:
            path.write_bytes(data[:size])
            assert name in self.refusal(folder)
        path.unlink()
        assert name in self.refusal(folder)
        path.mkdir()
        assert name in self.refusal(folder)

    def test_a_file_that_grew(self, folder: Path) -> None:
        with (folder / "state.safetensors").open("ab") as stream:
            stream.write(b"\0")
        assert re.fullmatch(r"state.safetensors has \d+ bytes, not \d+", self.refusal(folder))

    def test_a_newer_format_is_not_damage(self, folder: Path) -> None:
        write_snapshot(folder.parent / "checkpoint-1", some_state(), fill)
        seal(folder, lambda manifest: (manifest.clear(), manifest.update(format=2, lorakit="9.1", new=1)))
        for read in (read_snapshot, verify_snapshot, lambda path: newest_good(path.parent)):
            with pytest.raises(ModelError, match=r"has format 2, written by lorakit 9.1") as caught:
                read(folder)
            assert not isinstance(caught.value, DamagedError)
            assert caught.value.exit_code == 4

    @pytest.mark.parametrize(
        ("change", "cause"),
        [
            (lambda m: m.pop("files"), "lacks what a checkpoint needs: 'files'"),
            (lambda m: m.update(files=["state.json"]), "lacks what a checkpoint needs"),
            (lambda m: m.update(files={"state.json": 5}), "lacks what a checkpoint needs"),
            (lambda m: m.update(step="x"), "lacks what a checkpoint needs"),
            (lambda m: m["files"].pop("state.json"), "does not list state.json"),
            (lambda m: m["files"].pop("state.safetensors"), "does not list state.safetensors"),
            *(
                (
                    lambda m, name=name: m["files"].update({name: {"size": 1, "sha256": ""}}),
                    "which is no file of a checkpoint",
                )
                for name in ("/etc/passwd", "../x", "a/../../x", "a\\..\\b", "C:x", "", "a//b", "x\0", ".")
            ),
        ],
    )
    def test_a_manifest_with_ideas_of_its_own(
        self, folder: Path, change: Callable[[dict[str, Any]], object], cause: str
    ) -> None:
        seal(folder, change)
        assert cause in self.refusal(folder)

    @pytest.mark.parametrize(
        "text", ["", "null", "[]", "{", '{"format": 1, "format": 1}', "[" * 10**5, "é" * 10**6]
    )
    def test_a_manifest_that_is_none(self, folder: Path, text: str) -> None:
        (folder / "manifest.json").write_text(text)
        assert "manifest.json" in self.refusal(folder)

    def test_pipes_are_not_waited_for(self, folder: Path) -> None:
        for name in ("state.json", "manifest.json"):
            (folder / name).unlink()
            os.mkfifo(folder / name)
            assert name in self.refusal(folder)

    def test_a_pickle_is_never_opened(self, folder: Path, tmp_path: Path) -> None:
        witness = tmp_path / "opened"

        class Bomb:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (witness,)

        torch.save({"model/0.lora_A": Bomb()}, folder / "state.safetensors")
        assert "state.safetensors has" in self.refusal(folder)
        data = (folder / "state.safetensors").read_bytes()
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        seal(folder, lambda manifest: manifest["files"].update({"state.safetensors": entry}))
        assert "cannot read the weights" in self.refusal(folder)
        assert not witness.exists()

    def test_what_other_trainers_write(self, tmp_path: Path) -> None:
        folder = save_adapter(trained(), tmp_path / "checkpoint-500")
        torch.save({}, folder / "optimizer.pt")
        assert "was not written as a checkpoint of lorakit" in self.refusal(folder)

    def test_no_such_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "gone", tmp_path / "file"):
            with pytest.raises(ModelError, match="no such checkpoint"):
                read_snapshot(path)

    def test_format_1_stays_readable(self, tmp_path: Path) -> None:
        for name, data in FORMAT_1.items():
            (tmp_path / name).write_bytes(data)
        same(read_snapshot(tmp_path), STATE_1)


class TestOfOneRun:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        for step in (5, 10, 100, 20):
            write_snapshot(tmp_path / f"checkpoint-{step}", some_state(step), lambda stage: None)
        for other in ("checkpoint-best", "checkpoint-", "checkpoint-3x", "adapter", "xcheckpoint-4"):
            (tmp_path / other).mkdir()
        (tmp_path / "checkpoint-999").touch()
        return tmp_path

    def steps(self, run: Path) -> list[int]:
        return [int(path.name.removeprefix("checkpoint-")) for path in snapshots(run)]

    def test_newest_first(self, run: Path) -> None:
        assert self.steps(run) == [100, 20, 10, 5]
        assert snapshots(run / "missing") == snapshots(run / "adapter") == []
        assert newest_good(run) == (run / "checkpoint-100", [])
        assert newest_good(run / "missing") == (None, [])

    def test_damaged_ones_are_passed_over_and_named(self, run: Path) -> None:
        (run / "checkpoint-100" / "state.json").write_text("{}")
        (run / "checkpoint-20" / "manifest.json").unlink()
        found, damage = newest_good(run)
        assert found == run / "checkpoint-10"
        assert [note.split(" cannot be used: ")[0] for note in damage] == ["checkpoint-100", "checkpoint-20"]
        for step in (10, 5):
            shutil.rmtree(run / f"checkpoint-{step}")
        found, damage = newest_good(run)
        assert (found, len(damage)) == (None, 2)

    @pytest.mark.parametrize(
        ("keep", "pinned", "left"),
        [
            (None, [], [100, 20, 10, 5]),
            (9, [], [100, 20, 10, 5]),
            (2, [], [100, 20]),
            (1, [5], [100, 5]),
            (0, [10, 77], [100, 10]),
        ],
    )
    def test_pruning(self, run: Path, keep: int | None, pinned: list[int], left: list[int]) -> None:
        others = set(names(run)) - {f"checkpoint-{step}" for step in (5, 10, 20, 100)}
        prune(run, keep, [run / "adapter" / ".." / f"checkpoint-{step}" for step in pinned])
        assert self.steps(run) == left
        assert set(names(run)) == others | {f"checkpoint-{step}" for step in left}

    def test_what_is_no_checkpoint_of_ours_is_neither_pruned_nor_counted(self, run: Path) -> None:
        (run / "checkpoint-2000").mkdir()
        (run / "checkpoint-1").mkdir()
        prune(run, 1)
        assert self.steps(run) == [2000, 100, 1]

    def test_going_back(self, run: Path) -> None:
        (run / "aside-checkpoint-100").mkdir()
        moved = set_aside(run, 10)
        assert {path.name for path in moved} == {"aside-checkpoint-100", "aside-checkpoint-20"}
        assert self.steps(run) == [10, 5]
        for path in moved:
            same(read_snapshot(path), some_state(int(path.name.rpartition("-")[2])))
        assert set_aside(run, 10) == []
