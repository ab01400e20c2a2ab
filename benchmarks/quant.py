"""Training steps on quantised bases against the same step on a bf16 base, in alternating rounds.

    .venv/bin/python benchmarks/quant.py [--pairs 7] [--tokens 1024] [--layers 4] [--quick]

A Llama of TinyLlama's shapes (hidden size 2048, MLP 5632, 32 heads, 4 of them for keys) with fewer layers and
words, random weights, LoRA r=8 on every linear layer, packed rows of 256 tokens, half of them supervised, no
checkpointing. Each round runs one step of each base, in an order that turns by one from round to round, so that
a slow moment of the machine hits all alike; a ratio is the median over rounds of that round's time over bf16's.
Run it on a quiet machine: ratios of a busy one mean nothing. ``bitsandbytes`` rows are its own layers, where
installed. The table goes to ``results/quant.json`` and ``results/quant.md``; ``--quick`` writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorakit import add_lora_to_model, hardware
from lorakit.data.collate import Batch, pack
from lorakit.data.encode import Row
from lorakit.files import write_json, write_text
from lorakit.models.fast import fast, loss_head
from lorakit.models.patch import packed
from lorakit.optim.build import build_optimizer
from lorakit.optim.spec import OptimizerSpec
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.quant.blockwise import FourBit
from lorakit.quant.formats import Format
from lorakit.quant.int8 import Int8
from lorakit.quant.interop import bitsandbytes_linear
from lorakit.quant.kernels import installed
from lorakit.quant.modules import QuantLinear, quantized
from lorakit.training.step import train_step

ROW = 256  # tokens
WORDS = 8192


@dataclass(frozen=True)
class Base:
    """One way to keep the frozen weights."""

    form: Format | None = None
    bitsandbytes: bool = False


BASES = {
    "bf16": Base(),
    "nf4": Base(FourBit(double=False)),
    "nf4 double": Base(FourBit()),
    "int8": Base(Int8()),
    "int8 weights, bf16 products": Base(Int8(integer=False)),
    "bitsandbytes nf4": Base(FourBit(double=False), bitsandbytes=True),
    "bitsandbytes int8": Base(Int8(), bitsandbytes=True),
}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="rounds that count; one more warms up")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="one layer, two rounds, 256 tokens")
    options = parser.parse_args()
    pairs, layers, tokens = options.pairs, options.layers, options.tokens
    if options.quick:
        pairs, layers, tokens = 2, 1, 256
    dense = llama(layers)
    bases = {name: base for name, base in BASES.items() if installed() or not base.bitsandbytes}
    result = {
        "rows": race({name: adapted(dense, base) for name, base in bases.items()}, tokens, pairs),
        "tokens": tokens,
        "layers": layers,
        "rounds": pairs,
        "threads": torch.get_num_threads(),
        "processor": hardware.processor_name(),
    }
    if not options.quick:
        results = Path(__file__).parent / "results"
        write_json(results / "quant.json", result)
        write_text(results / "quant.md", table(result))
    print(table(result))


def llama(layers: int) -> PreTrainedModel:
    """A random model in bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=WORDS,
    )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def adapted(dense: PreTrainedModel, base: Base) -> PreTrainedModel:
    """A copy whose linear layers are kept as ``base`` says, with its adapter."""
    model: Any = copy.deepcopy(dense)
    form = base.form
    for path, layer in list(model.model.named_modules()):
        if form is not None and type(layer) is nn.Linear:
            small = quantized(layer, form)
            model.model.set_submodule(path, bitsandbytes_linear(small) if base.bitsandbytes else small)
    return add_lora_to_model(model, r=8, seed=0).train()


def race(models: dict[str, PreTrainedModel], tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and losses of all models on the same batches."""
    batches = [batch(tokens, seed) for seed in range(rounds + 1)]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as stack:
        steps = {name: stepper(stack, model) for name, model in models.items()}
        for number, rows in enumerate(batches):
            names = list(steps)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                start = time.perf_counter()
                losses[name].append(steps[name](rows))
                seconds[name].append(time.perf_counter() - start)
    measured = {name: times[1:] for name, times in seconds.items()}
    return {
        name: {
            "seconds": round(statistics.median(times), 3),
            "of_bf16": round(statistics.median(t / b for t, b in zip(times, measured["bf16"], strict=True)), 3),
            "last_loss": round(losses[name][-1], 4),
            "weights_mb": round(weights(models[name]) / 1e6, 1),
            "left_to_bf16": left_to_dense(models[name]),
        }
        for name, times in measured.items()
    }


def stepper(stack: contextlib.ExitStack, model: PreTrainedModel) -> Callable[[Batch], float]:
    """A function that trains one step and returns its loss."""
    stack.enter_context(fast(model, attention=True))
    stack.enter_context(loss_head(model))
    stack.enter_context(packed(model))
    strategy = Strategy(model, build_optimizer(model, OptimizerSpec("adamw_torch", 1e-3)), World())
    return lambda rows: train_step(strategy, [rows], 1.0).loss


def batch(tokens: int, seed: int) -> Batch:
    """Packed rows of random words; a word's successor is fixed, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(tokens // ROW):
        first = int(torch.randint(WORDS, (1,), generator=generator))
        ids = tuple((first + 7 * step) % WORDS for step in range(ROW))
        rows.append(Row(ids, (-100,) * (ROW // 2) + ids[ROW // 2 :]))
    return pack(rows)


def weights(model: nn.Module) -> int:
    """Bytes of the frozen tensors."""
    tensors = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def left_to_dense(model: nn.Module) -> float:
    """Share of the integer products that were left to the dense weight; 0 where there were none."""
    tallies = [layer.tally for layer in model.modules() if isinstance(layer, QuantLinear)]
    calls = sum(tally.calls for tally in tallies)
    return round(sum(tally.dense for tally in tallies) / calls, 4) if calls else 0.0


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"One training step, {result['tokens']} tokens, {result['layers']} layers of width 2048, "
        f"{result['threads']} threads, median of {result['rounds']} rounds.",
        "",
        "| base | seconds | of bf16 | last loss | frozen MB | products left to bf16 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | " + " | ".join(str(value) for value in row.values()) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
