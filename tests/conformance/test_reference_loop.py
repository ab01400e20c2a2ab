"""`lorakit train` beside a loop written by hand: the same losses, norms, rates and weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import reference_loop
import torch
from reference_loop import Seen, Settings, read, train_by_hand
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorakit.adapters.attach import attach
from lorakit.adapters.spec import LoRAConfig
from lorakit.checkpoint.peft_format import load_adapter
from lorakit.data.collate import Batch, pack, pad
from lorakit.data.encode import Row
from lorakit.data.order import Grouping
from lorakit.models.patch import packed
from lorakit.optim.build import build_optimizer
from lorakit.optim.schedule import Schedule
from lorakit.optim.spec import OptimizerSpec
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.training.loop import Hooks, Loop, Plan
from lorakit.training.progress import Progress
from lorakit.training.recipe import train
from lorakit.training.signals import StopRequest

ROWS = 22
RATE, DECAY, SEED = 5e-3, 0.01, 42


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [
        {
            "instruction": f"{rng.randint(1, 999)} " + "the lazy dog " * rng.randint(0, 5),
            "output": "Main St. " * rng.randint(1, 4) + str(rng.randint(1, 99)),
        }
        for _ in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def adapted(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attach(model, LoRAConfig(r=4, lora_alpha=8), seed=SEED)
    return model.to(dtype).train()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


CASES: dict[str, dict[str, Any]] = {
    "one row a pass, a last window of 2": {"size": 1, "accumulation": 4},
    "three rows a pass, a last one of 1": {"size": 3, "accumulation": 2},
    "no accumulation, never clipped": {"size": 4, "accumulation": 1, "clip": 1e6},
    "packed": {"size": 1, "accumulation": 2, "capacity": 160},
    "two bins a pass": {"size": 2, "accumulation": 2, "capacity": 128},
    "clipped hard": {"size": 2, "accumulation": 3, "clip": 0.05},
}


def test_the_reference_is_short_and_knows_nothing_of_lorakit() -> None:
    text = Path(reference_loop.__file__).read_text()
    assert "lorakit" not in text
    assert len(text.splitlines()) <= 120


@pytest.mark.parametrize("name", CASES)
def test_the_same_run_as_by_hand(name: str, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    numbers = {"capacity": None, "clip": 1.0} | CASES[name]
    run = Settings(steps=8, seed=SEED, rate=RATE, warmup=3, decay=DECAY, **numbers)
    result = train(
        {
            "model_name_or_path": str(tiny_llama), "dataset": str(data), "output_dir": str(tmp_path / "run"),
            "tokenized_path": str(tmp_path / "rows"), "bf16": False, "lora_rank": 4, "learning_rate": RATE,
            "weight_decay": DECAY, "warmup_steps": 3, "lr_scheduler_type": "cosine", "max_steps": run.steps,
            "per_device_train_batch_size": run.size, "gradient_accumulation_steps": run.accumulation,
            "max_grad_norm": run.clip, "packing": run.capacity is not None, "seed": SEED,
            "cutoff_len": run.capacity or 2048, "logging_steps": 1, "save_strategy": "no",
            "preprocessing_num_workers": 1,
        }
    )  # fmt: skip
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ours = [Seen(**{k: e[k] for k in Seen.__annotations__}) for e in events if e["event"] == "train"]

    model = adapted(tiny_llama)
    start = weights(model)
    theirs = train_by_hand(model, read(data, tiny_llama), run)
    assert len(ours) == len(theirs) == run.steps
    assert [seen.tokens for seen in ours] == [seen.tokens for seen in theirs]
    for key, tolerance in (("learning_rate", 1e-12), ("loss", 2e-6), ("grad_norm", 5e-6)):
        expected = [getattr(seen, key) for seen in theirs]
        assert [getattr(seen, key) for seen in ours] == pytest.approx(expected, rel=tolerance), key
    assert theirs[-1].loss < 0.95 * theirs[0].loss  # it did train
    found = adapter_weights(tiny_llama, result.adapter)
    for key, value in weights(model).items():
        moved = (value - start[key]).norm()
        assert moved > 0 and (found[key] - value).norm() <= 2e-4 * moved, key


def adapter_weights(base: Path, adapter: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    load_adapter(model, adapter)
    return {name: p.detach() for name, p in model.named_parameters() if ".adapters." in name}


# ------------------------------------------------------------------------------- whatever the batches are


def looped(
    folder: Path, rows: Sequence[Row], run: Settings, *, pad_rows: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of the engine's loop in float64."""
    model, losses, progress = adapted(folder, torch.float64), [], Progress()
    hooks = Hooks(
        on_step=lambda step, loss: losses.append(loss),
        on_log=lambda entry: None, on_note=losses.clear, save=losses.clear, evaluate=lambda step: None,
        on_refused=lambda known: None, roll_back=losses.clear, unfreeze=losses.clear,
    )  # fmt: skip
    plan = Plan(
        steps=run.steps, grouping=Grouping(run.size, run.accumulation), updates_per_epoch=6,
        schedule=Schedule("cosine", run.rate, run.steps, run.warmup), max_grad_norm=run.clip, seed=run.seed,
        logging_steps=99,
    )  # fmt: skip
    optimizer = build_optimizer(model, OptimizerSpec("adamw_torch", run.rate, weight_decay=run.decay))
    strategy = Strategy(model, optimizer, World())

    def go(collate: Callable[[Sequence[Row]], Batch]) -> None:
        Loop(strategy, rows, plan, progress, collate=collate, hooks=hooks, stop=StopRequest()).run()

    if pad_rows:
        go(lambda chosen: pad(chosen, pad_id=0))
    else:
        with packed(model):
            go(pack)
    return losses, weights(model)


def test_batches_do_not_matter_over_many_updates(tiny_llama: Path, data: Path) -> None:
    """(batch 4×1) = (1×4) = packed = padded, and all of them as by hand: to 1e-6 in float64."""
    pairs = read(data, tiny_llama)
    rows = [Row(tuple(ids), tuple(labels)) for ids, labels in pairs]
    numbers: dict[str, Any] = {"capacity": None, "clip": 0.5, "steps": 9, "rate": RATE, "warmup": 2}
    numbers |= {"decay": DECAY, "seed": SEED}
    model = adapted(tiny_llama, torch.float64)
    expected = [s.loss for s in train_by_hand(model, pairs, Settings(size=4, accumulation=1, **numbers))]
    final = weights(model)
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        for pad_rows in (True, False):
            run = Settings(size=size, accumulation=accumulation, **numbers)
            losses, found = looped(tiny_llama, rows, run, pad_rows=pad_rows)
            assert losses == pytest.approx(expected, rel=1e-6)
            for key, value in final.items():
                torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-9)
