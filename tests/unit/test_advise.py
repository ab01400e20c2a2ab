"""Advice: the guides' ranges, and that what is said to fit fits by the plan."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

import lorakit
from lorakit.config.load import load_mapping
from lorakit.config.presets import GUIDES
from lorakit.config.resolve import resolve
from lorakit.modelinfo.find import find_facts
from lorakit.planning import advise
from lorakit.planning.advise import HEAD_ROOM, TASKS, Advice, Task
from lorakit.planning.memory import memory
from lorakit.planning.setup import Setup

GB = 10**9
OWN = {"model_name_or_path": "gpt2", "dataset": "rows.jsonl", "output_dir": "run"}


@pytest.mark.parametrize(
    ("task", "ranks"),
    [
        # below 7B (8-32), 7B to 30B (16-64), above (32-128): P05; tasks: P04
        (None, (8, 16, 32)), ("classification", (8, 16, 16)), ("summaries", (16, 16, 32)),
        ("instructions", (32, 32, 32)), ("code", (32, 32, 32)),
    ],
)  # fmt: skip
def test_p02_p04_p05_rank_by_task_and_size(task: Task | None, ranks: tuple[int, ...]) -> None:
    found = [advise.rank_advice(int(size), task) for size in (135e6, 6.74e9, 70e9)]
    assert tuple(each.value for each in found) == ranks
    assert all("S2:L13" in each.source for each in found)


@pytest.mark.parametrize(
    ("rows", "epochs"), [(1, 5), (999, 5), (1000, 3), (9_999, 3), (10_000, 2), (99_999, 2), (10**7, 1)]
)
def test_t13_epochs_by_rows(rows: int, epochs: int) -> None:
    found = advise.epochs_advice(rows)
    assert (found.value, found.source) == (epochs, "S0:L308-315")


def test_t01_rate_by_base() -> None:
    rates = [advise.rate_advice(int(size), bits).value for size, bits in ((7e9, 16), (7e9, 4), (135e6, 16))]
    assert rates == [2e-4, 1e-4, 1e-3]


def test_t14_length_holds_the_rows() -> None:
    rng = random.Random(3)
    for _ in range(200):
        longest = rng.randint(1, 20_000)
        most = rng.randint(1, longest)
        context = rng.choice([None, 512, 2048, 131_072])
        found = advise.length_advice(longest, most, context)
        assert found.value <= (context or 20_064)
        if context is None or context >= longest + 64:
            assert found.value >= most
            assert found.value >= min(longest, 2048)
        held = "all rows" if found.value >= longest else "99 rows" if found.value >= most else "what the model"
        assert found.reason.startswith(held)


def test_e02_held_out_rows() -> None:
    assert advise.held_out_advice(49) == []
    assert [each.value for each in advise.held_out_advice(50)] == [0.1, "epoch"]
    assert advise.held_out_advice(10**6)[0].value == 500.0


MODELS = ("smollm2-135m", "llama-3.2-1b", "llama-2-7b", "llama-2-70b")


@pytest.mark.parametrize(("model", "limit"), list(itertools.product(MODELS, (2, 6, 16, 80))))
def test_t10_what_is_advised_fits(model: str, limit: int) -> None:
    facts = find_facts(model)
    setup = Setup(batch=8, accumulation=1, length=2048, device="cuda")
    changes, fitting = advise.memory_advice(facts, setup, limit * GB)
    if fitting is None:
        least = replace(setup, batch=1, bits=4, checkpointing=True, length=256)
        assert memory(facts, least).total > HEAD_ROOM * limit * GB
        assert changes == []
        return
    assert memory(facts, fitting).total <= HEAD_ROOM * limit * GB
    assert fitting.effective_batch == 8
    told = {each.key: each.value for each in changes}
    assert told["per_device_train_batch_size"] == fitting.batch
    assert told.get("quantization_bit", 16) == fitting.bits
    assert told.get("gradient_checkpointing", False) == fitting.checkpointing
    assert told.get("cutoff_len", 2048) == fitting.length
    larger = replace(fitting, batch=2 * fitting.batch)
    assert fitting.batch == 8 or memory(facts, larger).total > HEAD_ROOM * limit * GB
    if fitting.bits == 4:  # nothing cheaper would do
        dense = replace(fitting, bits=16, batch=1, length=2048)
        assert memory(facts, dense).total > HEAD_ROOM * limit * GB


def test_advice_is_accepted_by_the_configuration() -> None:
    facts = find_facts("llama-2-7b")
    changes, _ = advise.memory_advice(facts, Setup(batch=8, device="cuda", length=512), 12 * GB)
    every: list[Advice] = [*changes, *advise.COURSE, advise.rank_advice(1), advise.epochs_advice(10)]
    every += [advise.length_advice(100, 90, None), *advise.held_out_advice(100), advise.rate_advice(1, 4)]
    run = load_mapping(OWN, Path("/base"), [each.setting for each in every])
    values = dict(resolve(run))
    assert {each.key: values[each.key] for each in every} == {each.key: each.value for each in every}
    for each in every:
        cited = re.findall(r"(S\d):L\d+", each.source)
        assert set(cited) <= GUIDES.keys()
        assert cited or each.source in ("plan", "rows of the data")


def test_review_speaks_up_outside_of_the_ranges() -> None:
    quiet = lorakit.plan({**OWN, "learning_rate": 2e-4})
    assert quiet.advice == ()
    loud = lorakit.plan({**OWN, "learning_rate": 5e-3, "lora_rank": 512})
    assert [each.key for each in loud.advice] == ["lora_rank", "learning_rate"]
    assert "512 is outside" in loud.advice[0].reason
    assert loud.to_dict()["advice"][1]["value"] == 1e-3
    assert lorakit.plan(model="gpt2", rank=512).advice == ()  # there is no configuration to speak of
    for task in TASKS:
        for size in (1e8, 7e9, 7e10):
            rank = advise.rank_advice(int(size), task).value
            facts = find_facts("llama-2-7b")
            assert not advise.review(facts, Setup(rank=rank), 2e-4)
