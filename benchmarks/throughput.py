"""Tokens a second of a training update: lorakit against PEFT, and against its own matrix products.

    .venv/bin/python benchmarks/throughput.py --data alpaca.json [--pairs 7]          # the table
    ... --data alpaca.json --model smollm2-135m-instruct --against peft --json

An update has 8 rows of an alpaca file. ``lorakit`` packs them into passes of up to 1,024 tokens, as training
does. ``peft`` is PEFT on transformers as its Trainer runs it by default, one row at a time and eight
accumulations; ``peft-padded`` all eight rows at once, padded to the longest, which is faster or slower with
the spread of lengths; both with the same rank, targets, dropout, number format and AdamW, and with logits of
all positions, as the Trainer has them. The ratio is against the faster of the two. In each round everyone
trains the same rows once, in an order that turns, and every matrix product of lorakit's update is computed
alone, in the same number format and shapes: the roofline. Ratios and shares are medians over rounds.
Only a quiet machine gives numbers that mean something.

``peak_rss`` is measured in a process of its own for each. ``random-1b`` has the shapes of TinyLlama-1.1B, six
of its 22 layers, and random weights. The table goes to ``results/throughput.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorakit import add_lora_to_model, hardware
from lorakit.config.resolve import PASS_TOKENS
from lorakit.data.collate import pad
from lorakit.data.encode import Row, encode_all
from lorakit.data.packing import passes
from lorakit.data.reading import read_samples
from lorakit.data.rendering import Policy
from lorakit.data.templates import find_template
from lorakit.demo.addresses import prepare
from lorakit.evals.objective import batching
from lorakit.files import cache_folder, write_json, write_text
from lorakit.modelinfo.demo import DEMO_MODEL
from lorakit.models.load import load_model, load_tokenizer
from lorakit.models.quantized import quantize_model
from lorakit.models.sources import locate
from lorakit.ops.loss import _PRODUCT
from lorakit.optim.build import build_optimizer
from lorakit.optim.spec import OptimizerSpec
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.training.step import train_step

ROWS, RANK, RATE = 8, 8, 1e-4
LONGEST = 8 * 2048  # tokens of an update
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODELS = (DEMO_MODEL, "random-1b")
PEERS = {"peft": 1, "peft-padded": ROWS}  # rows in a micro-batch
CASES = [  # model, format, targets, dropout
    (DEMO_MODEL, "bf16", "attention", 0.1), (DEMO_MODEL, "bf16", "attention", 0.0),
    (DEMO_MODEL, "bf16", "all", 0.1),
    (DEMO_MODEL, "fp32", "attention", 0.1), (DEMO_MODEL, "nf4", "attention", 0.1),
    ("random-1b", "bf16", "attention", 0.1), ("random-1b", "nf4", "attention", 0.1),
    ("random-1b", "int8", "attention", 0.1),
]  # fmt: skip

Step = Callable[[list[Row]], object]


def main() -> None:
    """One case, or the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an alpaca file; the demo's addresses if left out")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--format", choices=(*DTYPES, "nf4", "int8"), default="bf16")
    parser.add_argument("--targets", choices=("attention", "all"), default="attention")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--against", choices=("peft",), default="peft")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", choices=("lorakit", *PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data or prepare(cache_folder() / "addresses")[0]
    one = (options.model or DEMO_MODEL, options.format, options.targets, options.dropout)
    if options.peak:
        print(peak(options.peak, options.data, *one))
        return
    if options.model:
        row = measure(options.data, options.pairs, *one)
        print(json.dumps(row) if options.json else table([row]))
        return
    rows = [measure(options.data, options.pairs, *case) for case in CASES]
    result = {"rows": rows, "processor": hardware.processor_name(), "threads": torch.get_num_threads()}
    results = Path(__file__).parent / "results"
    write_json(results / "throughput.json", result)
    write_text(results / "throughput.md", table(rows))
    print(table(rows))


def measure(data: Path, pairs: int, model: str, form: str, targets: str, dropout: float) -> dict[str, Any]:
    """All contestants in turns on the same rows."""
    rows = encoded(data)
    with contextlib.ExitStack() as stack:
        steps = {"lorakit": lorakit_step(stack, rows, model, form, targets, dropout)}
        peers = PEERS if form in DTYPES else {}
        for name, size in peers.items():
            steps[name] = peft_step(size, model, form, targets, dropout)
        products = gemms(model, DTYPES.get(form, torch.bfloat16))
        seconds: dict[str, list[float]] = {name: [] for name in (*steps, "roofline")}
        tokens = []
        for turn in range(pairs + 1):
            chosen = rows[turn * ROWS : (turn + 1) * ROWS]
            tokens.append(sum(len(row.ids) for row in chosen))
            names = list(seconds)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                (products if name == "roofline" else steps[name])(chosen)
                seconds[name].append(time.perf_counter() - start)
    rates = {name: [t / s for t, s in zip(tokens[1:], took[1:], strict=True)] for name, took in seconds.items()}
    middle = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    best = max(peers, key=lambda name: middle[name], default=None)
    peaks = {name: resident(name, data, model, form, targets, dropout) for name in steps}
    return {
        "model": model, "format": form, "targets": targets, "dropout": dropout,
        "lorakit_tokens_per_second": middle["lorakit"],
        **{f"{name}_tokens_per_second": middle[name] for name in peers},
        "ratio_default": ratio(rates, "peft") if peers else None,
        "ratio_median": ratio(rates, best) if best else None,
        "roofline_tokens_per_second": middle["roofline"],
        "roofline_share": ratio(rates, "roofline"),
        **{f"{name}_peak_gb": each for name, each in peaks.items()},
    }  # fmt: skip


def ratio(rates: dict[str, list[float]], other: str) -> float:
    """Of lorakit's rate to another's, round by round."""
    pairs = zip(rates["lorakit"], rates[other], strict=True)
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)


def encoded(data: Path) -> list[Row]:
    """The rows with the demo model's vocabulary, in the file's order."""
    tokenizer = load_tokenizer(locate(DEMO_MODEL))
    rows, _ = encode_all(
        tokenizer, read_samples([data]).samples, Policy(2048), find_template(tokenizer, "auto")
    )
    return rows


def base(model: str, form: str) -> PreTrainedModel:
    """The frozen model."""
    precision: hardware.Precision = "fp32" if form == "fp32" else "bf16"
    if model == DEMO_MODEL:
        made = load_model(locate(DEMO_MODEL), precision=precision)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=49152,
        )  # fmt: skip
        made = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    if form not in DTYPES:
        quantize_model(made.model, bits=4 if form == "nf4" else 8)
    return made


def lorakit_step(
    stack: contextlib.ExitStack, rows: list[Row], model: str, form: str, targets: str, dropout: float
) -> Step:
    """An update by lorakit's engine, packed."""
    names = ",".join(ALL if targets == "all" else ATTENTION)
    ours = add_lora_to_model(
        base(model, form), r=RANK, target_modules=names, lora_dropout=dropout, seed=0
    ).train()
    strategy = Strategy(ours, build_optimizer(ours, OptimizerSpec("adamw_torch", RATE)), World())
    assert isinstance(ours, PreTrainedModel)
    collate = stack.enter_context(batching(ours, load_tokenizer(locate(DEMO_MODEL)), rows))

    def step(chosen: list[Row]) -> None:
        groups = passes([len(row.ids) for row in chosen], range(len(chosen)), PASS_TOKENS)
        train_step(strategy, [collate([chosen[i] for i in group]) for group in groups], 1.0)

    return step


def peft_step(size: int, model: str, form: str, targets: str, dropout: float) -> Step:
    """An update of PEFT's model: micro-batches of ``size`` rows, the Trainer's loss and clipping."""
    import peft  # here: its memory is not lorakit's

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=dropout,
        target_modules=list(ALL if targets == "all" else ATTENTION),
    )
    theirs = peft.get_peft_model(base(model, form), config).train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)

    def step(chosen: list[Row]) -> None:
        count = sum(label != -100 for row in chosen for label in row.labels[1:])
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            batch = pad(part, 0)
            labels = torch.full_like(batch.inputs["input_ids"], -100)
            for i, row in enumerate(part):
                labels[i, : len(row.labels)] = torch.tensor(row.labels)
            theirs(**batch.inputs, labels=labels, num_items_in_batch=count).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def gemms(model: str, dtype: torch.dtype) -> Step:
    """Every product with a frozen weight in a packed update: x Wᵀ and g W, the head's on labelled positions."""
    with torch.device("meta"):
        shapes = [
            (tuple(layer.weight.shape), name == "lm_head")
            for name, layer in base_shapes(model).named_modules()
            if isinstance(layer, nn.Linear)
        ]
    weights = {shape: torch.randn(shape).to(dtype) for shape, _ in set(shapes)}
    sides = {side for shape, is_head in shapes for side in (shape[1:] if is_head else shape)}
    x = {side: torch.randn(LONGEST, side).to(dtype) for side in sides}

    def run(chosen: list[Row]) -> None:
        every = sum(len(row.ids) for row in chosen)
        labelled = sum(label != -100 for row in chosen for label in row.labels[1:])
        for shape, is_head in shapes:
            W = weights[shape]
            if not is_head:
                torch.mm(x[shape[1]][:every], W.T)
                torch.mm(x[shape[0]][:every], W)
                continue
            for some in x[shape[1]][:labelled].split(_PRODUCT // shape[0]):
                torch.mm(some @ W.T, W)

    return run


def base_shapes(model: str) -> PreTrainedModel:
    """The model without numbers."""
    if model == DEMO_MODEL:
        from transformers import AutoConfig

        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate(DEMO_MODEL).path))
    return base(model, "bf16")


def peak(name: str, data: Path, model: str, form: str, targets: str, dropout: float) -> float:
    """GB of this process after three updates."""
    rows = encoded(data)
    with contextlib.ExitStack() as stack:
        if name == "lorakit":
            step = lorakit_step(stack, rows, model, form, targets, dropout)
        else:
            step = peft_step(PEERS[name], model, form, targets, dropout)
        for turn in range(3):
            step(rows[turn * ROWS : (turn + 1) * ROWS])
    return round(hardware.memory_peak() / 1e9, 3)


def resident(name: str, data: Path, model: str, form: str, targets: str, dropout: float) -> float:
    """`peak` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--data",
        str(data),
        "--peak",
        name,
        "--model",
        model,
        "--format",
        form,
    ]
    command += ["--targets", targets, "--dropout", str(dropout)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(name.replace("_", " ") for name in names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row.get(name, "")) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
