"""Predicted memory against what others measured on GPUs: nothing here was run on one.

    .venv/bin/python benchmarks/published.py

Each row is a published figure with the settings that its source tells, and what a plan says for them, the
framework's share left out (their counters see tensors alone). What a source does not tell is assumed and said.
The result goes to ``results/published.json`` and ``results/published.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.files import write_json, write_text
from lorakit.modelinfo.architectures import facts_of
from lorakit.modelinfo.facts import ModelFacts
from lorakit.modelinfo.find import find_facts
from lorakit.planning.memory import memory
from lorakit.planning.setup import Setup

GB, GIB = 1e9, 2.0**30
QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
QWEN_7B = {  # the first Qwen: all of q, k, v with a bias, heads not shared
    "model_type": "qwen2", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A published figure in bytes, its source and assumptions, and the setup that it belongs to."""

    who: str
    figure: float
    model: str
    assumed: str
    setup: dict[str, Any]


LITGPT = {"targets": QV, "rank": 8, "length": 1304, "attention": "sdpa", "device": "cuda"}
QWEN = {
    "rank": 64, "checkpointing": True, "attention": "sdpa", "loss": "plain", "device": "cuda",
    "targets": (*QKVO, "gate_proj", "up_proj", "down_proj"),
}  # fmt: skip
PEFT = {"batch": 4, "length": 768, "attention": "sdpa", "loss": "plain", "device": "cuda"}
_CHUNKED, _PLAIN, _PADDED = "head in chunks", "cross-entropy in float32, checkpointing", "every row 768 tokens"
ROWS = (
    Row("LitGPT, A100: LoRA bf16", 21.30 * GB, "llama-2-7b", _CHUNKED, {**LITGPT}),
    Row("LitGPT: nf4", 14.14 * GB, "llama-2-7b", _CHUNKED, {**LITGPT, "bits": 4, "double": False}),
    Row("LitGPT: nf4, double", 13.84 * GB, "llama-2-7b", _CHUNKED, {**LITGPT, "bits": 4}),
    Row("LitGPT: LoRA bf16", 38.12 * GB, "llama-2-13b", _CHUNKED, {**LITGPT}),
    Row("LitGPT: nf4", 23.14 * GB, "llama-2-13b", _CHUNKED, {**LITGPT, "bits": 4, "double": False}),
    Row("LitGPT: nf4, double", 22.55 * GB, "llama-2-13b", _CHUNKED, {**LITGPT, "bits": 4}),
    Row("Qwen, A100: LoRA, 256 tokens", 20.1 * GB, "qwen-7b", _PLAIN, {**QWEN, "length": 256}),
    Row("Qwen: LoRA, 2048", 23.8 * GB, "qwen-7b", _PLAIN, {**QWEN, "length": 2048}),
    Row("Qwen: LoRA, 8192", 36.6 * GB, "qwen-7b", _PLAIN, {**QWEN, "length": 8192}),
    Row("Qwen: QLoRA, 256", 11.5 * GB, "qwen-7b", _PLAIN, {**QWEN, "length": 256, "bits": 4}),
    Row("Qwen: QLoRA, 2048", 13.9 * GB, "qwen-7b", _PLAIN, {**QWEN, "length": 2048, "bits": 4}),
    Row("Qwen: QLoRA, 8192", 23.5 * GB, "qwen-7b", _PLAIN, {**QWEN, "length": 8192, "bits": 4}),
    Row("PEFT: LoRA r32 q,v", 20.8 * GIB, "llama-3.2-3b", _PADDED, {**PEFT, "rank": 32, "targets": QV}),
    Row("PEFT: LoRA r64 q,v", 21.0 * GIB, "llama-3.2-3b", _PADDED, {**PEFT, "rank": 64, "targets": QV}),
    Row(
        "PEFT: DoRA r32 q,v", 22.8 * GIB, "llama-3.2-3b", _PADDED,
        {**PEFT, "rank": 32, "targets": QV, "method": "dora"},
    ),
    Row(
        "PEFT: LoRA r10 on the feed-forward part", 23.0 * GIB, "llama-3.2-3b", _PADDED,
        {**PEFT, "rank": 10, "targets": ("gate_proj", "up_proj", "down_proj")},
    ),
    Row("PEFT: full, bf16", 36.2 * GIB, "llama-3.2-3b", _PADDED, {**PEFT, "method": "full"}),
)  # fmt: skip


def main() -> None:
    """Work out and write the table."""
    rows = []
    for row in ROWS:
        taken = memory(facts(row.model), Setup(**row.setup))
        predicted = taken.total - taken.framework
        error = predicted / row.figure - 1
        rows.append(
            {
                "who": row.who,
                "model": row.model,
                "assumed": row.assumed,
                "published_gb": round(row.figure / GB, 2),
                "predicted_gb": round(predicted / GB, 2),
                "error": round(error, 3),
            }
        )
    results = Path(__file__).parent / "results"
    write_json(results / "published.json", {"rows": rows})
    lines = [
        "| who, what | model | published GB | predicted GB | error | assumed |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    shape = "| {who} | {model} | {published_gb:.1f} | {predicted_gb:.1f} | {error:+.0%} | {assumed} |"
    lines += [shape.format(**row) for row in rows]
    text = "\n".join(lines) + "\n"
    write_text(results / "published.md", text)
    print(text)


def facts(name: str) -> ModelFacts:
    """Of the table, or of Qwen's first model, which it does not have."""
    return facts_of(QWEN_7B, name, "its config.json") if name == "qwen-7b" else find_facts(name)


if __name__ == "__main__":
    main()
