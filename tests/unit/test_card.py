from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lorakit.report.card import model_card
from lorakit.report.numbers import DASH
from lorakit.report.record import (
    AdapterInfo,
    DataInfo,
    DataSets,
    EvalPoint,
    ModelInfo,
    RunInfo,
    RunRecord,
    Sample,
    TargetInfo,
    TrainPoint,
)

RECORD = RunRecord(
    path=Path("run"),
    info=RunInfo(
        model=ModelInfo("org/tiny-model", "hub", "org/tiny-model", "apache-2.0"),
        lorakit="0.1.0",
        seconds=412.7,
        status="finished",
        adapter=AdapterInfo(
            8, 16, 2.0, 2442240, 136957248, 1.7832, (TargetInfo("q|proj", 30, (576, 192), 184320),)
        ),
        data=DataSets(
            DataInfo(1280, ("/home/someone/secret/train.jsonl",), 161234, 60211, 240, 2, 0),
            DataInfo(200, ("/home/someone/secret/test.jsonl",)),
        ),
        samples=(Sample("private prompt"),),
        base_unchanged=True,
    ),
    settings={
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "seed": 0,
        "max_steps": None,
        "hub_token": "t",
    },
    train=(TrainPoint(160, 0.2284),),
    evals=(EvalPoint(0, 200, 2.9, 18.17, 0.005, 0.1), EvalPoint(160, 200, 0.2, 1.22, 0.525, 0.781)),
)


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)---\n", card, re.DOTALL)
    assert match is not None
    return YAML(typ="safe", pure=True).load(match[1])


def with_model(**values: Any) -> RunRecord:
    return dataclasses.replace(RECORD, info=dataclasses.replace(RECORD.info, model=ModelInfo(**values)))


def test_front_matter_follows_the_hub() -> None:
    card = model_card(RECORD)
    assert front_matter(card) == {
        "library_name": "peft",
        "base_model": "org/tiny-model",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorakit"],
        "license": "apache-2.0",
    }
    assert card.startswith("---\nlibrary_name: peft\nbase_model: org/tiny-model\n")


def test_unknown_license_and_local_base_are_left_out() -> None:
    card = model_card(with_model(name="/home/someone/models/tiny", kind="folder"))
    assert set(front_matter(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "from_pretrained('path/to/the/base/model')" in card
    assert "/home" not in card


def test_hub_id_of_an_alias_is_what_others_load() -> None:
    card = model_card(with_model(name="tiny", kind="alias", hub_id="org/tiny-model"))
    assert front_matter(card)["base_model"] == "org/tiny-model"
    assert "AutoModelForCausalLM.from_pretrained('org/tiny-model')" in card


def test_hostile_values_cannot_leave_their_place() -> None:
    card = model_card(with_model(name="x`\n# Owned\n| a |", license="a: b\ntags: [evil]\n---\n# Owned"))
    values = front_matter(card)
    assert values["license"] == "a: b\ntags: [evil]\n---\n# Owned"
    assert values["tags"] == ["lora", "lorakit"]
    assert "base_model" not in values
    body = card.split("\n---\n\n", 1)[1]
    assert "\n# Owned" not in body
    assert "`q\\|proj`" in body


def test_prose_is_the_record() -> None:
    card = model_card(RECORD)
    assert "rank 8, alpha 16 (scaling 2), 2,442,240 trained weights, 1.78 % of 136,957,248." in card
    assert (
        "1,280 rows of `train.jsonl`, 161,234 tokens, 60,211 of them with loss; 2 rows were truncated." in card
    )
    assert "Steps: 160; the last logged training loss is 0.2284. The whole run took 6m53s." in card
    assert "| `learning_rate` | `0.001` |" in card
    assert "| `seed` | `0` |" in card
    assert "max_steps" not in card
    assert "Measured on 200 held-out rows of `test.jsonl`:" in card
    assert "| Exact match | 0.5% | 52.5% |" in card
    assert "| Field F1 | 0.100 | 0.781 |" in card
    assert "compared before and after training and are unchanged" in card
    assert "Not evaluated: anything beyond the rows and measures above" in card


def test_private_things_stay_private() -> None:
    card = model_card(RECORD)
    assert not re.search(r"/home|secret|private prompt|hub_token", card)


def test_an_unevaluated_interrupted_run_claims_nothing() -> None:
    info = RunInfo(model=ModelInfo("org/tiny-model"), status="interrupted")
    card = model_card(RunRecord(path=Path("run"), info=info))
    assert "This adapter was not evaluated." in card
    assert "The base model was not measured, so no gain can be stated." in card
    assert "**The run did not come to its end; its status is `interrupted`.**" in card
    assert "unchanged" not in card
    assert "Data:" not in card
    assert "None" not in card


def test_evaluation_after_only() -> None:
    card = model_card(dataclasses.replace(RECORD, evals=RECORD.evals[1:]))
    assert f"| Exact match | {DASH} | 52.5% |" in card
    assert "no gain can be stated" in card
