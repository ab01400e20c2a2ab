"""Time and memory of loading a checkpoint quantised, against transformers with bitsandbytes.

    .venv/bin/python benchmarks/loading.py [--pairs 5] [--gigabytes 2] [--quick]

A Llama of random bf16 weights is written once, in shards, and loaded in turns by all contestants, each in a
fresh process, after the files have been read once, so that none pays for the disk. A small model is loaded
first, to leave out what any loading imports. ``seconds`` is the loading alone; in bytes, ``model`` is what
its tensors take, ``peak_above`` the highest resident set beyond that before the loading, ``over`` the peak
beyond the model, and ``largest`` the largest tensor of the file. The result goes to ``results/loading.json``.
Only a quiet machine gives times that mean something.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lorakit import hardware
from lorakit.config.quantization import Quantization
from lorakit.files import write_json
from lorakit.models.load import load_model
from lorakit.models.sources import locate

WIDTH, MLP, WORDS, SHARD = 2048, 5632, 32_000, 500_000_000
PER_BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP


def lorakit(folder: Path, quantization: Quantization) -> nn.Module:
    """The streaming loader."""
    return load_model(locate(str(folder)), precision="bf16", quantization=quantization)


def stock(folder: Path, **settings: Any) -> nn.Module:
    """transformers, whose quantiser makes bitsandbytes' layers."""
    config = BitsAndBytesConfig(**settings)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


CONTESTANTS: dict[str, Callable[[Path], nn.Module]] = {
    "lorakit nf4": lambda folder: lorakit(folder, Quantization()),
    "bitsandbytes nf4": lambda folder: stock(
        folder,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "lorakit int8": lambda folder: lorakit(folder, Quantization(kind="int8", double=False)),
    "bitsandbytes int8": lambda folder: stock(folder, load_in_8bit=True),
    "dense bf16": lambda folder: load_model(locate(str(folder)), precision="bf16"),
}


def main() -> None:
    """Measure in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--quick", action="store_true", help="one turn on a tenth of the size; writes nothing")
    parser.add_argument(
        "--one", nargs=3, help=argparse.SUPPRESS
    )  # a single measurement: who, folder, small one
    options = parser.parse_args()
    if options.one:
        who, folder, small = options.one
        print(json.dumps(measure(who, Path(folder), Path(small))))
        return
    turns, size = (1, options.gigabytes / 10) if options.quick else (options.pairs, options.gigabytes)
    with tempfile.TemporaryDirectory() as place:
        folder, small = Path(place) / "model", Path(place) / "small"
        blocks = (size * 1e9 / 2 - 2 * WORDS * WIDTH) / PER_BLOCK
        largest = write_checkpoint(folder, layers=max(1, round(blocks)))
        write_checkpoint(small, layers=1, width=64, words=64)
        found: dict[str, list[dict[str, float]]] = {who: [] for who in CONTESTANTS}
        for _ in range(turns):
            for who in CONTESTANTS:
                for path in folder.iterdir():
                    path.read_bytes()
                found[who].append(run(who, folder, small))
    rows = {
        who: {key: statistics.median(turn[key] for turn in measured) for key in measured[0]}
        for who, measured in found.items()
    }
    result = {
        "processor": hardware.processor_name(), "cores": hardware.summary()["cores"], "turns": turns,
        "gigabytes": size, "largest": largest, "medians": rows,
    }  # fmt: skip
    if not options.quick:
        write_json(Path(__file__).parent / "results" / "loading.json", result)
    print(table(rows, largest))


def write_checkpoint(folder: Path, *, layers: int, width: int = WIDTH, words: int = WORDS) -> int:
    """A Llama of random weights in shards, written one by one; the size of its largest tensor in bytes."""
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=MLP * width // WIDTH, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128), dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    largest, held = 0, 0
    for name, shape in shapes.items():
        shard[name] = (0.02 * torch.randn(shape)).bfloat16()
        largest, held = max(largest, shard[name].nbytes), held + shard[name].nbytes
        if held > SHARD or len(index) + len(shard) == len(shapes):
            file = f"model-{len(set(index.values())):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, held = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return largest


def run(who: str, folder: Path, small: Path) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", who, str(folder), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(who: str, folder: Path, small: Path) -> dict[str, float]:
    """Load the small model, then the other."""
    CONTESTANTS[who](small)
    hardware.give_back_memory()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = hardware.memory_used()
    start = time.perf_counter()
    model = CONTESTANTS[who](folder)
    seconds = time.perf_counter() - start
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    peak = hardware.memory_peak() - before
    return {"seconds": seconds, "model": size, "peak_above": peak, "over": peak - size}


def table(rows: dict[str, dict[str, float]], largest: int) -> str:
    """As Markdown, memory in megabytes."""
    lines = [
        f"largest tensor {largest / 1e6:.0f} MB", "",
        "| | seconds | model MB | peak MB | peak over model MB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for who, row in rows.items():
        sizes = (row[key] / 1e6 for key in ("model", "peak_above", "over"))
        lines.append(f"| {who} | {row['seconds']:.1f} | {' | '.join(f'{size:.0f}' for size in sizes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
