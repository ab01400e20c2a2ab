"""Rank and forgetting: against dense decompositions, and against losses of plain transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import LoRAManager, add_lora_to_model
from lorakit.adapters.attach import adapter_layers
from lorakit.checkpoint.compress import compress
from lorakit.checkpoint.inspect import energy_rank, inspect, probe_ranks
from lorakit.checkpoint.peft_format import load_adapter, save_adapter
from lorakit.data.templates import find_template
from lorakit.errors import DataError, LorakitError, TargetError, UsageError
from lorakit.evals.probes import base_alone, neutral_text, probe_forgetting
from lorakit.models.load import load_model, load_tokenizer
from lorakit.models.sources import locate
from lorakit.training.recipe import train


def network(decay: float = 0.5, **settings: Any) -> nn.Sequential:
    """Two layers whose updates have singular values that fall by ``decay``."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 20))
    add_lora_to_model(model, r=6, lora_alpha=9, target_modules="0,1", seed=1, **settings)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            B = layer.adapter("default").lora_B
            B.copy_(torch.randn_like(B) * decay ** torch.arange(B.shape[1]))
    return model


def deltas(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    layers = adapter_layers(model, name)
    return {p: (layer.merged_weight((name,)) - layer.base.weight).detach() for p, layer in layers.items()}


# ----------------------------------------------------------------------------------------------- rank probe


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_energy_rank_is_the_least(share: float) -> None:
    values = sorted(torch.rand(9).tolist(), reverse=True)
    k = energy_rank(values, share)
    total = sum(v * v for v in values)
    assert sum(v * v for v in values[:k]) >= share * total * (1 - 1e-12)
    assert sum(v * v for v in values[: k - 1]) < share * total


def test_energy_rank_of_nothing() -> None:
    assert energy_rank([0.0, 0.0], 0.9) == energy_rank([], 0.9) == 0
    assert energy_rank([2.0, 0.0, 0.0], 1.0) == 1


def test_spectra_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    model = network()
    found = {u.module: u for u in inspect(save_adapter(model, tmp_path / "a")).updates}
    dense = {path: torch.linalg.svdvals(delta.double()) for path, delta in deltas(model).items()}
    assert found.keys() == dense.keys()
    for path, values in dense.items():
        assert found[path].spectrum == pytest.approx(values[:6].tolist(), rel=1e-4, abs=1e-6)
        assert found[path].rank_90 == energy_rank(values.tolist(), 0.9)
        assert found[path].rank_99 == energy_rank(values.tolist(), 0.99)


def test_one_rank_for_all_modules(tmp_path: Path) -> None:
    """The recommended rank keeps 90 % of the energy of all updates together, one less does not."""
    model = network()
    probe = probe_ranks(inspect(save_adapter(model, tmp_path / "a")).updates)
    assert probe is not None
    assert (probe.modules, probe.dead, probe.r) == (2, 0, 6)
    spectra = [torch.linalg.svdvals(delta.double()).square() for delta in deltas(model).values()]
    total = float(sum(values.sum() for values in spectra))

    def kept(k: int) -> float:
        return float(sum(values[:k].sum() for values in spectra)) / total

    assert kept(probe.recommended) >= 0.9 > kept(probe.recommended - 1)
    assert kept(probe.rank_99) >= 0.99 > kept(probe.rank_99 - 1)
    assert 1 < probe.effective < 6


def test_dead_modules_do_not_count(tmp_path: Path) -> None:
    model = network()
    adapter_layers(model)["0"].adapter("default").lora_B.data.zero_()
    probe = probe_ranks(inspect(save_adapter(model, tmp_path / "a")).updates)
    assert probe is not None
    assert probe.dead == 1 and probe.recommended >= 1
    assert probe_ranks([]) is None


# ------------------------------------------------------------------------------------------------- compress


def test_each_module_gets_the_rank_that_it_needs() -> None:
    model = network()
    wanted = deltas(model)
    made = compress(model, "default", "small", energy=0.95)
    assert made.before == {"0": 6, "1": 6}
    for path, delta in deltas(model, "small").items():
        values = torch.linalg.svdvals(wanted[path].double()).square()
        assert made.after[path] == energy_rank(values.sqrt().tolist(), 0.95) < 6
        error = float((delta - wanted[path]).norm() / wanted[path].norm())
        assert error == pytest.approx(float((values[made.after[path] :].sum() / values.sum()).sqrt()), abs=1e-4)
        assert error == pytest.approx(made.errors[path], abs=1e-4)
        assert error <= math.sqrt(0.05)
    assert 0 < made.numbers_kept < 1


@pytest.mark.parametrize(
    "settings", [{}, {"method": "adalora"}, {"init_lora_weights": "pissa"}, {"use_rslora": True}]
)
def test_a_written_small_adapter_answers_alike(settings: dict[str, Any], tmp_path: Path) -> None:
    """All that stored PEFT files need: all energy is kept, so the outputs are the same."""
    model = network(**settings)
    x = torch.randn(5, 24)
    wanted = model(x)
    compress(model, "default", "small", energy=1.0)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    notes = {"start": "pissa"} if "init_lora_weights" in settings else {}
    folder = save_adapter(model, tmp_path / "small", "small", notes=notes)
    torch.manual_seed(3)
    fresh = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 20))
    load_adapter(fresh, folder)
    torch.testing.assert_close(fresh(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_rank_cuts_only_what_is_above_it() -> None:
    model = network(rank_pattern={"1": 2})
    made = compress(model, "default", "small", rank=3)
    assert made.after == {"0": 3, "1": 2}
    assert made.errors["1"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "wanted", "error", "message"),
    [
        ({}, {}, UsageError, "a rank or a share"),
        ({}, {"rank": 2, "energy": 0.9}, UsageError, "a rank or a share"),
        ({}, {"rank": 6}, UsageError, "the largest rank of the adapter is 6: nothing is above 6"),
        ({"use_dora": True}, {"rank": 2}, UsageError, "is a DoRA adapter"),
        ({"modules_to_save": "1"}, {"rank": 2}, LorakitError, "trains whole modules"),
    ],
)
def test_what_cannot_be_compressed_is_refused(
    settings: dict[str, Any], wanted: dict[str, Any], error: type[LorakitError], message: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    add_lora_to_model(model, r=6, target_modules="0", **settings)
    with pytest.raises(error, match=message):
        compress(model, "default", "small", **wanted)
    assert LoRAManager(model).adapter_names == ("default",)


def test_grouped_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    add_lora_to_model(model, r=2, target_modules="0")
    with pytest.raises(TargetError, match="groups"):
        compress(model, "default", "small", rank=1)


# --------------------------------------------------------------------------------------------- forgetting


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, and people watch it. " * 50)
    return file


def test_perplexities_are_those_of_plain_transformers(tiny_llama: Path, story: Path, one_thread: None) -> None:
    source = locate(str(tiny_llama))
    tokenizer, model = load_tokenizer(source), load_model(source, precision="fp32")
    text = neutral_text(str(story), tokenizer, find_template(tokenizer))
    assert text.name == "story.txt" and len(text.rows) > 1
    assert max(len(row.ids) for row in text.rows) <= 512

    def plain() -> float:
        total, count = 0.0, 0
        for row in text.rows:
            ids = torch.tensor([row.ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += len(row.ids) - 1
        assert count == sum(row.supervised for row in text.rows)
        return math.exp(total / count)

    base = plain()
    add_lora_to_model(model, r=4, seed=0)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.adapter("default").lora_B.normal_(0, 0.1)
    found = probe_forgetting(model, tokenizer, text, batch_size=2)
    assert (found.base, found.adapter) == pytest.approx((base, plain()), rel=1e-4)
    assert found.adapter != pytest.approx(found.base, rel=1e-3)
    assert found.tokens == sum(row.supervised for row in text.rows)
    assert found.to_json()["text"] == "story.txt"


def test_every_token_of_the_text_is_predicted_once(tiny_llama: Path, story: Path) -> None:
    tokenizer = load_tokenizer(locate(str(tiny_llama)))
    text = neutral_text(str(story), tokenizer, find_template(tokenizer))
    ids = tokenizer(story.read_text())["input_ids"]
    assert sum(row.supervised for row in text.rows) == len(ids)  # all but the first, and the end of the text


def test_the_base_is_alone_only_within_the_block() -> None:
    model = network()
    x = torch.randn(3, 24)
    adapted = model(x)
    with pytest.raises(KeyError), base_alone(model):
        alone = model(x)
        raise KeyError
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 20))
    assert torch.equal(alone, plain(x)) and not torch.equal(alone, adapted)
    assert torch.equal(model(x), adapted)


def test_python_brings_a_text(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(locate(str(tiny_llama)))
    text = neutral_text("python", tokenizer, find_template(tokenizer))
    assert text.name == "python" and len(text.sha256) == 64
    assert sum(row.supervised for row in text.rows) > 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the text: No such file"), (b" \n", "is empty"), (b"\xff\xfe\xfa", "not UTF-8 text")],
)
def test_texts_that_are_none(tiny_llama: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    tokenizer = load_tokenizer(locate(str(tiny_llama)))
    with pytest.raises(DataError, match=message):
        neutral_text(str(file), tokenizer, find_template(tokenizer))


def test_a_run_tells_what_it_forgot_and_which_ranks_it_used(
    tiny_llama: Path, story: Path, tmp_path: Path, one_thread: None
) -> None:
    rows = [{"instruction": f"add {i} and {i}", "output": str(2 * i)} for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "neutral.txt").write_text(story.read_text())
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_llama}\ndataset: rows.json\noutput_dir: out\ntokenized_path: encoded\n"
        "max_steps: 4\nlearning_rate: 5e-2\nforgetting_text: neutral.txt\nsave_strategy: 'no'\n"
    )
    result = train(config)
    told = json.loads((result.folder / "run.json").read_text())
    found = told["forgetting"]
    assert found["text"] == "neutral.txt" and found["tokens"] > 500
    assert found["base"] > 1 and found["adapter"] != pytest.approx(found["base"], rel=1e-3)
    assert told["ranks"]["r"] == 8 and 1 <= told["ranks"]["recommended"] <= told["ranks"]["rank_99"] <= 8
    card = (result.adapter / "README.md").read_text()
    told_text = f"(`neutral.txt`, {found['tokens']:,} tokens)"
    assert f"Perplexity on a text that has nothing to do with the task {told_text}: " in card
    page = result.report.read_text()
    assert "neutral.txt" in page and f"Of 8 stored ranks, {told['ranks']['recommended']} keep 90 %" in page


def test_a_missing_text_is_told_before_training(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    keys = {"model_name_or_path": str(tiny_llama), "dataset": str(tmp_path / "rows.json")}
    keys |= {"output_dir": str(tmp_path / "out"), "forgetting_text": str(tmp_path / "missing.txt")}
    with pytest.raises(DataError, match="cannot read the text"):
        train(keys)
    with pytest.raises(UsageError, match="compares with the base"):
        train({**keys, "unfreeze_after": 0.5})
