"""Targets: the modules an adapter goes on, by name, expression, layer number and pattern; what is refused."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.attach import (
    activate,
    adapter_layers,
    add_lora_to_model,
    attach,
    carriers,
    count_parameters,
    detach,
    merge,
    unmerge,
)
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.export import export_merged
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.errors import AdapterMismatchError, ConflictError, TargetError, UsageError


class Blocks(nn.Module):
    """Four blocks with repeated names, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(6, 6), "v_proj": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})
            for _ in range(4)
        )
        self.lm_head = nn.Linear(6, 12, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["v_proj"](torch.tanh(layer["q_proj"](layer["norm"](x))))
        return self.lm_head(x)


IDS = torch.tensor([[0, 3, 5], [11, 1, 1]])


def attached(model: nn.Module, **settings: Any) -> list[str]:
    add_lora_to_model(model, seed=0, **settings)
    return list(adapter_layers(model))


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for carrier in carriers(model).values():
            for parameter in carrier.adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def paths(name: str, *numbers: int) -> list[str]:
    return [f"layers.{number}.{name}" for number in numbers]


# ---------------------------------------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"target_modules": r"layers\.[01]\.q_proj"}, paths("q_proj", 0, 1)),
        (
            {"target_modules": r".*\.(q|v)_proj", "layers_to_transform": 3},
            [*paths("q_proj", 3), *paths("v_proj", 3)],
        ),
        ({"target_modules": r"embed|lm_.*"}, ["embed", "lm_head"]),
        (
            {"target_modules": r".*q_proj", "exclude_modules": ["0.q_proj", "layers.2.q_proj"]},
            paths("q_proj", 1, 3),
        ),
        ({"target_modules": "q_proj", "exclude_modules": r".*\.[1-3]\..*"}, paths("q_proj", 0)),
        ({"target_modules": "q_proj", "layers_to_transform": "0-1,3"}, paths("q_proj", 0, 1, 3)),
        ({"target_modules": "q_proj", "layers_to_transform": [2, 0]}, paths("q_proj", 0, 2)),
        ({"target_modules": "^layers.1.q_proj"}, paths("q_proj", 1)),
        ({"exclude_modules": "v_proj"}, paths("q_proj", 0, 1, 2, 3)),
        ({"target_modules": "embed", "exclude_modules": "lm_head"}, ["embed"]),
    ],
)  # fmt: skip
def test_what_is_selected(settings: dict[str, Any], found: list[str]) -> None:
    assert attached(Blocks(), **settings) == found


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"target_modules": r"q_proj.+"}, TargetError, r"target 'q_proj.+' matches no module of the model"),
        ({"target_modules": r"q_pro[j"}, UsageError, "is not a regular expression"),
        ({"target_modules": r"(" * 3000}, UsageError, "is too large"),
        ({"target_modules": r".*norm"}, TargetError, "a LayerNorm cannot carry an adapter"),
        ({"exclude_modules": "q_porj"}, TargetError, r"exclude_modules 'q_porj' matches no module.*\n.*q_proj"),
        ({"exclude_modules": r".*proj"}, TargetError, "no module is left to adapt"),
        ({"layers_to_transform": "2-6"}, TargetError, r"names layer 4, which has no target\nlayers there: 0-3"),
        (
            {"target_modules": "lm_head", "layers_to_transform": 0},
            TargetError,
            r"names layer 0, .*\nlayers there: none",
        ),
        ({"rank_pattern": {"k_proj": 4}}, TargetError, r"rank_pattern\[k_proj\] matches none of the adapted"),
        ({"rank_pattern": {"lm_head": 4}}, TargetError, r"rank_pattern\[lm_head\] matches none of the adapted"),
        ({"alpha_pattern": {"k.*": 4}}, TargetError, r"alpha_pattern\[k\.\*\] matches none of the adapted"),
        ({"modules_to_save": "head"}, TargetError, r"modules_to_save 'head' matches no module"),
        ({"modules_to_save": "layers.0,layers.0.norm"}, TargetError, "lies inside another of modules_to_save"),
    ],
)
def test_what_cannot_be_selected(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Blocks()
    with pytest.raises(error, match=message):
        attached(model, **settings)
    assert not carriers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "modules_to_save", "rank_pattern"])
def test_an_expression_that_never_ends_is_an_error(key: str) -> None:
    model = nn.ModuleDict({"a" * 60 + "_": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    expression: Any = "(a|aa)+"
    start = time.monotonic()
    with pytest.raises(UsageError, match=r"'.*\(a\|aa\)\+.*' takes longer than 0.5 s"):
        attached(model, **{key: {expression: 4} if key == "rank_pattern" else expression})
    assert time.monotonic() - start < 2.0
    assert not carriers(model)


def test_the_expression_that_python_never_ends_is_answered() -> None:
    start = time.monotonic()
    with pytest.raises(TargetError, match="matches no module"):
        attached(nn.ModuleDict({"a" * 60 + "_": nn.Linear(2, 2)}), target_modules="(a+)+$")
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [f"layers.{i}.q_proj" for i in range(1_000_000)]},
        {"target_modules": ",".join(["x"] * 1_000_000)},
        {"exclude_modules": ["a.b"] * 1_000_000},
        {"rank_pattern": {f"q_proj{i}": 4 for i in range(1_000_000)}},
    ],
)
def test_a_million_names_do_not_hang(settings: dict[str, Any]) -> None:
    start = time.monotonic()
    with pytest.raises(TargetError, match="matches no"):
        attached(Blocks(), **settings)
    assert time.monotonic() - start < 10.0


def test_thousands_of_expressions_do_not_hang() -> None:
    start = time.monotonic()
    found = attached(Blocks(), r=4, rank_pattern={f"layers.{i % 4}.q_proj|x{i}": 2 for i in range(1000)})
    assert len(found) == 8
    assert time.monotonic() - start < 10.0


# ------------------------------------------------------------------------------------------------- patterns


def test_ranks_and_alphas_by_module(tmp_path: Path) -> None:
    model = Blocks()
    attached(
        model,
        r=4,
        lora_alpha=8,
        rank_pattern={"layers.0.q_proj": 1, "q_proj": 2},
        alpha_pattern={r"layers\.[23]\.v_proj": 2},
    )
    found = {
        path: (a.rank, a.scaling)
        for path, layer in adapter_layers(model).items()
        for a in [layer.adapter("default")]
    }
    assert found["layers.0.q_proj"] == (1, 8.0)
    assert found["layers.3.q_proj"] == (2, 4.0)
    assert found["layers.0.v_proj"] == (4, 2.0)
    assert found["layers.3.v_proj"] == (4, 0.5)
    fill(model)
    again = Blocks()
    load_adapter(again, save_adapter(model, tmp_path / "a"))
    assert torch.equal(again(IDS), model(IDS))
    other = {
        path: (a.rank, a.scaling)
        for path, layer in adapter_layers(again).items()
        for a in [layer.adapter("default")]
    }
    assert other == found


@pytest.mark.filterwarnings("ignore")
def test_patterns_mean_the_same_in_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ranks, alphas = {"layers.0.q_proj": 1, "q_proj": 2}, {"layers.[23].v_proj": 2}
    ours = Blocks()
    attached(ours, r=4, lora_alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    fill(ours)
    theirs = PeftModel.from_pretrained(Blocks(), save_adapter(ours, tmp_path / "a"))
    torch.testing.assert_close(theirs(IDS), ours(IDS), rtol=1e-5, atol=1e-5)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern=ranks, alpha_pattern=alphas,
        layers_to_transform=[0, 2], layers_pattern="layers", init_lora_weights=False,
    )  # fmt: skip
    theirs = get_peft_model(Blocks(), settings)
    theirs.save_pretrained(tmp_path / "b")
    ours = Blocks()
    load_adapter(ours, tmp_path / "b")
    assert len(adapter_layers(ours)) == 4
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- modules_to_save


def test_whole_modules_are_trained_saved_merged_and_given_back(tmp_path: Path) -> None:
    model = Blocks()
    head, weight = model.lm_head, model.lm_head.weight
    base = model(IDS)
    attached(model, r=2, target_modules="q_proj", modules_to_save=["lm_head", "layers.3.norm"])
    assert set(carriers(model)) == {*paths("q_proj", 0, 1, 2, 3), "layers.3.norm", "lm_head"}
    assert torch.equal(model(IDS), base)
    assert count_parameters(model)["trainable"] == 4 * 2 * 12 + 12 * 6 + 12
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
        optimizer.step()
    assert weight.grad is None
    trained = model(IDS)
    assert (trained - base).abs().max() > 0.01
    for name in ("adapter", "adapter.pth"):
        again = Blocks()
        load_adapter(again, save_adapter(model, tmp_path / name))
        assert torch.equal(again(IDS), trained)
    merge(model)
    torch.testing.assert_close(model(IDS), trained, rtol=1e-5, atol=1e-5)
    plain = Blocks()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(IDS), model(IDS))
    unmerge(model)
    assert torch.equal(model(IDS), trained)
    detach(model)
    assert model.lm_head is head
    assert model.lm_head.weight is weight
    assert torch.equal(model(IDS), base)


@pytest.mark.filterwarnings("ignore")
def test_whole_modules_in_peft_and_back(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ours = Blocks()
    attached(ours, r=2, target_modules="q_proj", modules_to_save="lm_head")
    fill(ours)
    theirs = PeftModel.from_pretrained(Blocks(), save_adapter(ours, tmp_path / "a"))
    torch.testing.assert_close(theirs(IDS), ours(IDS), rtol=1e-5, atol=1e-5)
    theirs = get_peft_model(
        Blocks(),
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.5
    theirs.save_pretrained(tmp_path / "b")
    ours = Blocks()
    base = ours(IDS)
    load_adapter(ours, tmp_path / "b")
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)
    assert (ours(IDS) - base).abs().max() > 0.1


def test_two_adapters_with_whole_copies_of_one_module() -> None:
    model = Blocks()
    for name in ("law", "med"):
        attach(model, LoRAConfig(r=2, target_modules="q_proj", modules_to_save="lm_head"), name)
    activate(model, "law", "med")
    with pytest.raises(ConflictError, match="law, med each bring a whole copy of one module"):
        model(IDS)
    activate(model, "law")
    with pytest.raises(ConflictError, match="another adapter trains it whole"):
        attach(model, LoRAConfig(target_modules="lm_head"), "head")
    with pytest.raises(ConflictError, match="another adapter sits on this module"):
        attach(model, LoRAConfig(target_modules="v_proj", modules_to_save="0.q_proj"), "whole")
    assert set(carriers(model)) == {*paths("q_proj", 0, 1, 2, 3), "lm_head"}


def test_a_file_without_its_whole_module_is_refused(tmp_path: Path) -> None:
    model = Blocks()
    attached(model, r=2, target_modules="q_proj", modules_to_save="lm_head")
    folder = save_adapter(model, tmp_path / "a")
    description = (folder / "adapter_config.json").read_text()
    changed = description.replace('"lm_head"', '"layers.0.norm"')
    assert changed != description
    (folder / "adapter_config.json").write_text(changed)
    again = Blocks()
    with pytest.raises(AdapterMismatchError, match=r"missing +base_model\.model\.layers\.0\.norm\.weight"):
        load_adapter(again, folder)
    assert not carriers(again)


# --------------------------------------------------------------------------- tied weights and odd modules


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_a_tied_weight_unties_it(tiny_llama: Path, tmp_path: Path, target: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    weight = embedding.weight.detach().clone()
    attached(model, r=2, target_modules=target)
    fill(model)
    other = embedding if target == "lm_head" else head
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merge(model)
        assert torch.equal(other.weight, weight)
        assert head.weight is not embedding.weight
        assert (model(input_ids=ids).logits - expected).abs().max() <= 1e-4
        unmerge(model)
        assert head.weight is embedding.weight
        assert torch.equal(head.weight, weight)
        folder = export_merged(
            model, AutoTokenizer.from_pretrained(tiny_llama), tmp_path / "m", dtype=torch.float32
        )
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert again.config.tie_word_embeddings is False
        assert (again(input_ids=ids).logits - expected).abs().max() <= 1e-4
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
        assert (base(input_ids=ids).logits - expected).abs().max() > 0.01


def test_attention_of_torch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        logging.getLogger("lorakit").propagate = True
        assert attached(nn.TransformerEncoderLayer(8, 2, 16), target_modules="all") == ["linear1", "linear2"]
    assert (
        "'all' leaves out 1 modules that cannot carry an adapter, such as self_attn (MultiheadAttention)"
        in caplog.text
    )
    for target, kind in (("self_attn", "MultiheadAttention"), ("out_proj", "NonDynamicallyQuantizableLinear")):
        with pytest.raises(TargetError, match=rf"a {kind} cannot carry an adapter\n.*without calling them"):
            attached(nn.TransformerEncoderLayer(8, 2, 16), target_modules=target)


def test_stacked_experts(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    for target in ("experts", "mlp.experts"):
        with pytest.raises(
            TargetError, match=r"a MixtralExperts cannot.*\n.*stacked in the 3-D parameters gate_up_proj"
        ):
            attached(model, target_modules=target)
    with pytest.raises(
        TargetError, match=r"'down_proj' matches no module.*\nit is a parameter of module .*mlp\.experts"
    ):
        attached(model, target_modules="down_proj")
    assert not carriers(model)
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        logging.getLogger("lorakit").propagate = True
        found = attached(model, target_modules="all")
    assert len(found) == 8
    assert (
        "leaves out 2 modules that cannot carry an adapter, such as model.layers.0.mlp.experts" in caplog.text
    )


def test_an_embedding_that_renormalises_is_refused() -> None:
    with pytest.raises(TargetError, match="max_norm changes the weight as it runs"):
        attached(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), target_modules="0")


def test_subclasses_are_not_taken_for_what_they_extend() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TargetError, match="a Scaled cannot carry an adapter"):
        attached(nn.Sequential(Scaled(4, 4)), target_modules="0")
