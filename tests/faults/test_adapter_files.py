"""Broken, foreign and hostile adapter folders: refused with a reason, and the model is as it was."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.adapters.attach import adapter_layers, add_lora_to_model
from lorakit.checkpoint.manager import LoRAManager
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.errors import AdapterMismatchError, ConflictError, LorakitError, StorageError, TargetError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST_A = "base_model.model.0.lora_A.weight"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def filled(r: int = 2, name: str = "default") -> nn.Module:
    model = add_lora_to_model(net(), r=r, seed=1, adapter_name=name)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.adapter(name).lora_B)
    return model


X = torch.linspace(-1, 1, 18).view(3, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter for `net`, to be broken."""
    return save_adapter(filled(), tmp_path / "adapter")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path, kind: type[LorakitError] = AdapterMismatchError) -> str:
    """The message of a refused load, after checking that model and random state are untouched by it."""
    fresh, carrier = net(), filled(name="law")
    before, state = carrier(X), torch.get_rng_state()
    with pytest.raises(kind) as caught:
        load_adapter(fresh, folder)
    assert caught.value.exit_code == 4
    assert not adapter_layers(fresh)
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    for name in ("default", "law"):  # beside another adapter, and in the place of one
        with pytest.raises(kind):
            LoRAManager(carrier).load_lora_checkpoint(folder, name)
    assert LoRAManager(carrier).adapter_names == ("law",)
    assert torch.equal(carrier(X), before)
    assert torch.equal(torch.get_rng_state(), state)
    return str(caught.value)


def test_the_good_folder_loads(folder: Path) -> None:
    model = net()
    state = torch.get_rng_state()
    load_adapter(model, folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(X), filled()(X))


def test_loading_twice_replaces(folder: Path) -> None:
    model = filled(r=3)
    manager = LoRAManager(model)
    manager.load_lora_checkpoint(folder)
    assert manager.adapter_names == ("default",)
    assert torch.equal(model(X), filled()(X))


def test_loading_into_a_merged_model_is_refused(folder: Path) -> None:
    model = filled(name="law")
    manager = LoRAManager(model)
    manager.merge_lora_weights()
    before = model(X)
    with pytest.raises(ConflictError, match="the adapters are merged"):
        manager.load_lora_checkpoint(folder)
    assert torch.equal(model(X), before)
    assert manager.adapter_names == ("law",)


# ------------------------------------------------------------------------------------ adapter_config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read adapter_config.json: No such file or directory\nname an adapter folder"),
        ("", "not JSON: Expecting value"),
        ("{'r': 8}", "not JSON: Expecting property name"),
        ("[1, 2]", "not a JSON object"),
        ("null", "not a JSON object"),
        (b'{"r": "\xff"}', "not JSON: 'utf-8' codec can't decode"),
        ('{"x": "' + "a" * 5_000_000 + '"}', "larger than 1048576 bytes: not an adapter description"),
        ("[" * 100_000, "not JSON: "),
        ('{"a":' * 100_000, "not JSON: "),
        ('{"r": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("{}", "peft_type is None; LORA and ADALORA are supported"),
    ],
)
def test_what_is_no_description(folder: Path, content: str | bytes | None, message: str) -> None:
    path = folder / CONFIG
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(folder)
    assert str(folder) in refusal(folder)


UNKNOWN = "settings that lorakit does not know how to reproduce: "
UNUSABLE = "not a usable adapter description: "
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; LORA and ADALORA are supported"),
    ({"lora_bias": True}, UNKNOWN + "lora_bias = True"),
    ({"bias": "all"}, UNKNOWN + "bias = 'all'"),
    ({"rank_pattern": [4]}, UNUSABLE + "rank_pattern must be an object"),
    ({"rank_pattern": {"0": 0}}, UNUSABLE + "rank_pattern[0] must be a whole number of at least 1, not 0"),
    ({"alpha_pattern": {"0": "4"}}, UNUSABLE + "alpha_pattern[0] must be a positive number, not '4'"),
    ({"modules_to_save": [3]}, UNUSABLE + "modules_to_save must be a list of names"),
    ({"layers_to_transform": ["a"]}, UNUSABLE + "layers_to_transform cannot be ['a']"),
    ({"init_lora_weights": "loftq"}, UNKNOWN + "init_lora_weights = 'loftq'"),
    ({"layer_replication": [[0, 1]]}, UNKNOWN + "layer_replication = [[0, 1]]"),
    ({"from_the_future": 1}, UNKNOWN + "from_the_future = 1"),
    ({"lora_bias": True, "bias": "all"}, "bias = 'all'; lora_bias = True"),
    ({"target_modules": "(_proj"}, "'(_proj' is not a regular expression: "),
    ({"target_modules": None}, UNUSABLE + "target_modules must be given"),
    ({"target_modules": [1]}, UNUSABLE + "target_modules must be a list of names or a regular expression"),
    ({"target_modules": {"0": 1}}, UNUSABLE + "target_modules must be a list of names or a regular expression"),
    ({"target_modules": []}, UNUSABLE + "target_modules is empty"),
    ({"r": 10**9}, UNUSABLE + "r = 1000000000 is beyond 65536"),
    ({"r": None, "lora_alpha": None}, UNUSABLE + "r, lora_alpha must be given"),
    ({"r": 0}, UNUSABLE + "r must be a whole number of at least 1, not 0"),
    ({"r": "2"}, UNUSABLE + "r must be a whole number of at least 1, not '2'"),
    ({"r": 2.5}, UNUSABLE + "r must be a whole number of at least 1, not 2.5"),
    ({"lora_alpha": float("nan")}, "NaN"),
    ({"lora_alpha": 10**400}, UNUSABLE + "lora_alpha must be a positive number, not 1000"),
    ({"lora_alpha": [4]}, UNUSABLE + "lora_alpha must be a positive number, not [4]"),
    ({"lora_dropout": 2}, UNUSABLE + "lora_dropout must be at least 0 and below 1, not 2"),
    ({"lora_dropout": "no"}, UNUSABLE + "lora_dropout must be at least 0 and below 1, not 'no'"),
    ({"use_rslora": "yes"}, UNUSABLE + "use_rslora must be true or false, not 'yes'"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_settings_that_cannot_be_reproduced(folder: Path, changes: dict[str, Any], message: str) -> None:
    assert len(CHANGES) >= 25
    edit_config(folder, **changes)
    assert f"{folder / CONFIG}: " in refusal(folder)
    assert message in refusal(folder)


def test_modules_that_the_model_lacks(folder: Path) -> None:
    edit_config(folder, target_modules=["0", "q_proj"])
    assert refusal(folder, TargetError).startswith(
        "target 'q_proj' matches no module of the model\ndid you mean"
    )


# ------------------------------------------------------------------------------ adapter_model.safetensors


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda t: t.pop(FIRST_A), [("missing", FIRST_A, "(2, 6)", "-")]),
        (
            lambda t: t.update({"base_model.model.1.lora_A.weight": torch.zeros(2, 3)}),
            [("unexpected", "base_model.model.1.lora_A.weight", "-", "(2, 3)")],
        ),
        (lambda t: t.update({FIRST_A: torch.zeros(3, 6)}), [("wrong shape", FIRST_A, "(2, 6)", "(3, 6)")]),
        (lambda t: t.update({FIRST_A: torch.zeros(12)}), [("wrong shape", FIRST_A, "(2, 6)", "(12,)")]),
        (lambda t: t.update({FIRST_A: torch.zeros(())}), [("wrong shape", FIRST_A, "(2, 6)", "()")]),
        (
            lambda t: t.update({FIRST_A.replace("base_model.", ""): t.pop(FIRST_A)}),
            [
                ("missing", FIRST_A, "(2, 6)", "-"),
                ("unexpected", FIRST_A.replace("base_model.", ""), "-", "(2, 6)"),
            ],
        ),
    ],
)
def test_tensors_that_do_not_fit(
    folder: Path, change: Callable[[dict[str, Tensor]], object], rows: list[tuple[str, str, str, str]]
) -> None:
    edit_tensors(folder, change)
    table = "".join(f"\n  {kind:<11}  {key}  expected {e}, found {f}" for kind, key, e, f in rows)
    assert refusal(folder) == (
        f"{folder}: {len(rows)} tensors do not fit this model:{table}"
        "\nwas the adapter trained on another model? nothing was loaded"
    )


def test_a_long_table_is_cut(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({f"x{i:02}": torch.zeros(1) for i in range(20)}))
    message = refusal(folder)
    assert "20 tensors do not fit" in message
    assert message.count("unexpected") == 12
    assert "\n  … and 8 more\n" in message


def test_an_adapter_of_another_size(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = add_lora_to_model(nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4)), r=2)
    message = refusal(save_adapter(other, tmp_path / "other"))
    assert f"wrong shape  {FIRST_A}  expected (2, 6), found (2, 7)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(folder: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST_A][1, 3] = value
        tensors[FIRST_A] = tensors[FIRST_A].to(dtype)

    edit_tensors(folder, spoil)
    assert refusal(folder) == f"{folder / WEIGHTS}: NaN or infinity in {FIRST_A} (1 tensors)"


def test_half_precision_tensors_load(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({key: value.half() for key, value in t.items()}))
    model = net()
    load_adapter(model, folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(X), filled()(X), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(folder).startswith(f"{path}: cannot read the weights: ")


def test_a_header_that_promises_too_much(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert f"its header claims {2**62} bytes, the file has 10" in refusal(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert f"cannot read {WEIGHTS}: " in refusal(folder)
    (folder / WEIGHTS).mkdir()
    assert f"cannot read {WEIGHTS}: " in refusal(folder)


def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "opened"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (witness,)

    (folder / WEIGHTS).unlink()
    for name in ("adapter_model.bin", WEIGHTS):
        torch.save({FIRST_A: Bomb()}, folder / name)
        assert str(folder / name) in refusal(folder)
    assert not witness.exists()


# ------------------------------------------------------------------------------------------------- saving


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_nan_is_not_saved(folder: Path, value: float) -> None:
    before = contents(folder)
    model = filled(r=3)
    adapter_layers(model)["2"].adapter("default").lora_B.data[0, 0] = value
    with pytest.raises(AdapterMismatchError, match=r"NaN or infinity in base_model\.model\.2\.lora_B\.weight"):
        save_adapter(model, folder)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_saving_replaces_the_whole_folder(folder: Path) -> None:
    (folder / "stale.txt").write_text("old")
    model = filled(r=3)
    assert save_adapter(model, folder) == folder
    assert set(contents(folder)) == {CONFIG, WEIGHTS, "lorakit.json"}
    assert list(folder.parent.iterdir()) == [folder]
    again = net()
    assert load_adapter(again, folder).r == 3
    assert torch.equal(again(X), model(X))


def test_saving_is_repeatable(folder: Path, tmp_path: Path) -> None:
    assert contents(save_adapter(filled(), tmp_path / "again")) == contents(folder)


@pytest.mark.parametrize(("mask", "of_files", "of_folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, of_files: int, of_folder: int) -> None:
    before = os.umask(mask)
    try:
        folder = save_adapter(filled(), tmp_path / "adapter", notes={"system": "Hi"})
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == of_folder
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [of_files] * 3


def test_a_path_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"cannot write .*file/adapter: "):
        save_adapter(filled(), tmp_path / "file" / "adapter")
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="it is a file, not a folder"):
        save_adapter(filled(), tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 64 KiB: what a quota or a full disk does to a write half way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_half_way(folder: Path, small_disk: None) -> None:
    before = contents(folder)
    big = add_lora_to_model(nn.Sequential(nn.Linear(512, 512)), r=64)
    with pytest.raises(StorageError, match=r"cannot write .*File too large"):
        save_adapter(big, folder)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_merged_model_on_a_full_disk(tiny_llama: Path, tmp_path: Path, small_disk: None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakit.checkpoint.export import export_merged

    model = add_lora_to_model(AutoModelForCausalLM.from_pretrained(tiny_llama))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(StorageError, match=r"cannot write .*File too large"):
        export_merged(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_what_another_process_is_writing_is_left_alone(folder: Path) -> None:
    other = folder.with_name(f".tmp-{folder.name}-other")
    shutil.copytree(folder, other)
    save_adapter(filled(r=3), folder)
    assert set(folder.parent.iterdir()) == {folder, other}
