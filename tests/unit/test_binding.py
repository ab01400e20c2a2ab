"""Which base an adapter belongs to: the same model in another dress is the same, any other is not."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.adapters.attach import adapter_layers, add_lora_to_model, detach
from lorakit.checkpoint.binding import base_parameters, check, check_text, fingerprint, text_fingerprint
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.errors import AdapterMismatchError, ConflictError

SEEDS = range(3)


class Net(nn.Module):
    """Every kind of parameter: matrix, vector, scalar, empty, kernel, tied."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(30, 8)
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight
        self.kernel = nn.Parameter(torch.randn(2, 3, 5, 7))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.norm(self.first(self.embed(ids))).relu()) * self.scale)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_number_format_is_the_same_base(seed: int, dtype: torch.dtype) -> None:
    model = Net(seed)
    there_and_back = copy.deepcopy(model).to(dtype)
    assert fingerprint(there_and_back) == fingerprint(model)
    assert fingerprint(there_and_back.float()) == fingerprint(model)


def test_what_is_recorded() -> None:
    model = Net()
    found = fingerprint(model)
    assert found.keys() == {"parameters", "shapes", "weights"}
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert all(len(found[key]) == 64 for key in ("shapes", "weights"))


def test_a_fine_tune_of_one_tensor_is_another_base() -> None:
    model = Net()
    before = fingerprint(model)
    optimizer = torch.optim.AdamW([model.first.weight], lr=1e-4)
    ids = torch.randint(30, (4, 6))
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    after = fingerprint(model)
    assert after["weights"] != before["weights"]
    assert after["shapes"] == before["shapes"]
    with pytest.raises(AdapterMismatchError, match="another base model: its weights differ"):
        check(before, model)


def test_other_names_or_shapes_are_another_base() -> None:
    before = fingerprint(Net())
    renamed, reshaped, swapped = Net(), Net(), Net()
    renamed.second = renamed.last
    del renamed.last
    reshaped.kernel = nn.Parameter(reshaped.kernel.reshape(6, 35))
    for model in (renamed, reshaped):
        assert fingerprint(model)["shapes"] != before["shapes"]
        with pytest.raises(AdapterMismatchError, match="another base model: its layers differ") as caught:
            check(before, model)
        assert caught.value.remedy is not None
    swapped.first.weight, swapped.last.weight = (
        nn.Parameter(swapped.last.weight.T.contiguous()),
        nn.Parameter(swapped.first.weight.T.contiguous()),
    )
    assert fingerprint(swapped)["shapes"] == before["shapes"]
    assert fingerprint(swapped)["weights"] != before["weights"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "first,last"},
        {"target_modules": "first", "use_dora": True},
        {"target_modules": "embed"},
        {"target_modules": "first", "modules_to_save": "norm"},
        {"target_modules": "first,last", "init_lora_weights": "pissa"},
    ],
)
def test_adapters_do_not_change_it(settings: dict[str, Any]) -> None:
    model = Net()
    before, names = fingerprint(model), dict(base_parameters(model))
    add_lora_to_model(model, r=2, **settings)
    add_lora_to_model(model, r=4, adapter_name="second", target_modules="last")
    assert fingerprint(model) == before
    assert dict(base_parameters(model)).keys() == names.keys()
    check(before, model)
    assert fingerprint(detach(model)) == before


def test_a_shared_module_and_an_untied_copy() -> None:
    model = Net()
    before = fingerprint(model)
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(untied.embed.weight.clone())
    assert {**fingerprint(untied), "parameters": before["parameters"]} == before
    model.again = model.first
    before = fingerprint(model)
    add_lora_to_model(model, target_modules="first")
    assert fingerprint(model) == before


def test_a_merged_base_has_no_fingerprint() -> None:
    model = add_lora_to_model(Net(), target_modules="first,last")
    before = fingerprint(model)
    layer = adapter_layers(model)["first"]
    layer.merge()
    with pytest.raises(ConflictError, match="the adapters are merged"):
        fingerprint(model)
    layer.unmerge()
    assert fingerprint(model) == before


def reason_of(caplog: pytest.LogCaptureFixture, recorded: dict[str, Any], model: nn.Module) -> str:
    logging.getLogger("lorakit").propagate = True
    caplog.clear()
    with caplog.at_level(logging.INFO, "lorakit"):
        check(recorded, model)
    return "\n".join(caplog.messages)


def test_what_cannot_be_compared_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    full = fingerprint(model)
    quantised = Net()
    quantised.first.weight = nn.Parameter(torch.zeros(16, 4, dtype=torch.uint8), requires_grad=False)
    said = "not compared with the adapter's base: "
    assert reason_of(caplog, full, model) == ""
    assert reason_of(caplog, full, copy.deepcopy(model).half()) == said + "the base is in torch.float16"
    assert reason_of(caplog, full, quantised) == said + "the base is quantised"
    assert reason_of(caplog, fingerprint(quantised), model) == said + "the base is quantised"
    assert reason_of(caplog, full, copy.deepcopy(model).to("meta")) == said + "the base is not loaded"
    assert reason_of(caplog, {}, model) == said + "the adapter does not say which it was"
    assert reason_of(caplog, {"shapes": 3}, model) == said + "the adapter does not say which it was"
    with pytest.raises(AdapterMismatchError, match="its layers differ"):
        check(fingerprint(nn.Linear(3, 3)), model.half())


def test_an_adapter_is_refused_on_another_base(tmp_path: Path) -> None:
    folder = save_adapter(add_lora_to_model(Net(0), target_modules="first,last"), tmp_path / "adapter")
    load_adapter(Net(0).bfloat16(), folder)
    other = Net(1)
    with pytest.raises(AdapterMismatchError, match="another base model: its weights differ"):
        load_adapter(other, folder)
    assert not adapter_layers(other)
    load_adapter(other, folder, check_base=False)
    assert set(adapter_layers(other)) == {"first", "last"}


class Words:
    """A tokenizer, as far as it matters."""

    def __init__(self, vocabulary: dict[str, int], chat_template: Any = None) -> None:
        self.vocabulary, self.chat_template = vocabulary, chat_template

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_text() -> None:
    base = Words({"a": 0, "é": 1}, "{{ x }}")
    recorded = text_fingerprint(base)
    assert text_fingerprint(Words({"é": 1, "a": 0}, "{{ x }}")) == recorded
    assert text_fingerprint(Words({"a": 0, "é": 1}))["chat_template"] is None
    assert text_fingerprint(Words({}, {"default": "x", "tools": "y"}))["chat_template"] is not None
    check_text(recorded, base)
    with pytest.raises(AdapterMismatchError, match="trained with another vocabulary"):
        check_text(recorded, Words({"a": 1, "é": 0}, "{{ x }}"))
    with pytest.raises(AdapterMismatchError, match="trained with another chat template"):
        check_text(recorded, Words({"a": 0, "é": 1}, "{{ y }}"))


def test_adapters_do_not_change_that_of_the_real_model(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    before = fingerprint(model)
    assert fingerprint(add_lora_to_model(model, r=4)) == before
