"""Training steps of lorakit against PEFT on transformers, same rows, same model, in alternating pairs.

    .venv/bin/python benchmarks/step.py [--pairs 5] [--rows 16]

Both train LoRA r=8 on every linear layer of SmolLM2-135M-Instruct in the machine's best precision, one batch of
address rows a step. PEFT's batch is padded, as a Trainer's is; padding does not count as tokens. The result
goes to ``results/step.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch

from lorakit import add_lora_to_model, hardware
from lorakit.data.collate import pad
from lorakit.data.encode import Row, encode_all
from lorakit.data.reading import read_samples
from lorakit.data.rendering import Policy
from lorakit.data.templates import find_template
from lorakit.demo.addresses import prepare
from lorakit.evals.objective import batching
from lorakit.files import cache_folder, write_json
from lorakit.modelinfo.demo import DEMO_MODEL
from lorakit.models.load import load_model, load_tokenizer
from lorakit.models.sources import locate
from lorakit.optim.build import build_optimizer
from lorakit.optim.spec import OptimizerSpec
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.training.step import train_step

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[list[Row]], object]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args()

    source = locate(DEMO_MODEL)
    tokenizer = load_tokenizer(source)
    train, _ = prepare(cache_folder() / "addresses")
    samples = read_samples([train]).samples
    rows, _ = encode_all(tokenizer, samples, Policy(2048), find_template(tokenizer, "auto"))
    precision = hardware.best_precision()

    ours = add_lora_to_model(load_model(source, precision=precision), r=8, seed=0).train()
    theirs = peft.get_peft_model(
        load_model(source, precision=precision), peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    ).train()
    strategy = Strategy(ours, build_optimizer(ours, OptimizerSpec("adamw_torch", 1e-3)), World())
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3)

    def peft_step(chosen: list[Row]) -> None:
        batch = pad(chosen, tokenizer.pad_token_id)
        labels = torch.full_like(batch.inputs["input_ids"], -100)
        for i, row in enumerate(chosen):
            labels[i, : len(row.labels)] = torch.tensor(row.labels)
        theirs(**batch.inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_optimizer.step()
        their_optimizer.zero_grad()

    with batching(ours, tokenizer, rows) as collate:

        def lorakit_step(chosen: list[Row]) -> None:
            train_step(strategy, [collate(chosen)], 1.0)

        result = compare(lorakit_step, peft_step, rows, options.pairs, options.rows)
    result |= {
        "model": DEMO_MODEL,
        "precision": precision,
        "rows_per_step": options.rows,
        "processor": hardware.processor_name(),
    }
    write_json(Path(__file__).parent / "results" / "step.json", result)
    print(json.dumps(result, indent=2))


def compare(ours: Step, theirs: Step, rows: list[Row], pairs: int, size: int) -> dict[str, object]:
    """Tokens/s of both in alternating pairs on the same rows, after one warm-up pair."""
    rates: dict[str, list[float]] = {"lorakit": [], "peft": []}
    for pair in range(pairs + 1):
        chosen = rows[pair * size : (pair + 1) * size]
        for name, step in (("lorakit", ours), ("peft", theirs)):
            start = time.perf_counter()
            step(chosen)
            if pair:
                rates[name].append(sum(len(row.ids) for row in chosen) / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(rates["lorakit"], rates["peft"], strict=True)]
    return {
        "lorakit_tokens_per_second": round(statistics.median(rates["lorakit"]), 1),
        "peft_tokens_per_second": round(statistics.median(rates["peft"]), 1),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
    }


if __name__ == "__main__":
    main()
