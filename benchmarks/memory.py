"""Memory of one training step on a quantised Llama-2: real shapes, random contents, nothing downloaded.

    .venv/bin/python benchmarks/memory.py                                     # the table, a process a row
    .venv/bin/python benchmarks/memory.py --arch llama-2-7b --bits 4 --tokens 512 --json

A step is what `lorakit train` does: one row of ``--tokens`` tokens, all of them supervised, LoRA r=8 on q, k, v
and o, gradient checkpointing, AdamW. The quantised weights are made of random bytes, so that no dense weight
ever exists; embedding and output head are bf16. Freed tensors go back to the system at once
(`hardware.lean_memory`). The table goes to ``results/memory.json``.

Columns, in GB of 10⁹ bytes: ``libraries`` is the resident set before the model is there (the interpreter, torch
and transformers), ``weights`` all tensors of the base, ``adapters`` A and B with their gradients, ``optimizer``
AdamW's moments, ``activations`` what the peak has beyond these, ``predicted`` the peak by `predicted`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lorakit import add_lora_to_model, hardware
from lorakit.adapters.attach import adapter_layers
from lorakit.config.quantization import Quantization
from lorakit.data.collate import pack
from lorakit.data.encode import Row
from lorakit.files import write_json
from lorakit.models.patch import packed
from lorakit.models.quantized import Packed, format_of, place, quantisable
from lorakit.optim.build import build_optimizer
from lorakit.optim.spec import OptimizerSpec
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.training.step import train_step

ARCHITECTURES = {  # hidden size, width of the MLP, layers, heads; 32,000 words
    "llama-2-7b": (4096, 11008, 32, 32),
    "llama-2-13b": (5120, 13824, 40, 40),
}
ROWS = (("llama-2-7b", 4, 512), ("llama-2-13b", 4, 512), ("llama-2-7b", 8, 512), ("llama-2-7b", 4, 2048))


def main() -> None:
    """Measure one row in this process, or all of them in a process each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, help="so many layers instead of all")
    parser.add_argument("--json", action="store_true", help="print one object")
    options = parser.parse_args()
    if options.arch:
        row = measure(options.arch, options.bits, options.tokens, options.layers)
        print(json.dumps(row) if options.json else table([row]))
        return
    rows = []
    for arch, bits, tokens in ROWS:
        command = [sys.executable, __file__, "--json", "--arch", arch, f"--bits={bits}", f"--tokens={tokens}"]
        command += [f"--layers={options.layers}"] if options.layers else []
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    if not options.layers:
        result = {"rows": rows, "processor": hardware.processor_name()}
        write_json(Path(__file__).parent / "results" / "memory.json", result)
    print(json.dumps(rows) if options.json else table(rows))


def measure(arch: str, bits: int, tokens: int, layers: int | None) -> dict[str, Any]:
    """One training step; the peak is that of this process."""
    hardware.lean_memory()
    libraries = hardware.memory_used()
    model = add_lora_to_model(
        quantised_llama(arch, bits, layers), r=8, target_modules="q_proj,k_proj,v_proj,o_proj", seed=0
    ).train()
    assert isinstance(model, PreTrainedModel)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    strategy = Strategy(model, build_optimizer(model, OptimizerSpec("adamw_torch", 1e-4)), World())
    trained = sum(p.nbytes for layer in adapter_layers(model).values() for p in layer.trainable())
    weights = size(model) - trained
    ids = tuple(torch.randint(model.config.vocab_size, (tokens,)).tolist())
    start = time.perf_counter()
    with packed(model):
        result = train_step(strategy, [pack([Row(ids, ids)])], 1.0)
    seconds = time.perf_counter() - start
    moments = sum(t.nbytes for state in strategy.optimizer.state.values() for t in state.values())
    peak = hardware.memory_peak()
    rest = libraries + weights + 2 * trained + moments
    return {
        "arch": arch,
        "layers": model.config.num_hidden_layers,
        "bits": bits,
        "tokens": tokens,
        "libraries_gb": gigabytes(libraries),
        "weights_gb": gigabytes(weights),
        "adapters_gb": gigabytes(2 * trained),
        "optimizer_gb": gigabytes(moments),
        "activations_gb": gigabytes(peak - rest),
        "peak_rss_gb": gigabytes(peak),
        "predicted_gb": gigabytes(rest + predicted_activations(model.config, tokens)),
        "step_seconds": round(seconds, 1),
        "loss": round(result.loss, 3),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def quantised_llama(arch: str, bits: int, layers: int | None = None) -> PreTrainedModel:
    """A Llama of these shapes whose linear layers hold random codes and everything else random bf16."""
    hidden, width, depth, heads = ARCHITECTURES[arch]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers or depth,
        num_attention_heads=heads, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    form = format_of(Quantization(kind="nf4" if bits == 4 else "int8"))
    torch.manual_seed(0)
    weights = {}
    for path, module in quantisable(model).items():
        shape = tuple(module.get_parameter("weight").shape)
        weights[path] = Packed(form, filled(form.empty(shape)), shape)
    place(model, weights, compute_dtype=torch.bfloat16)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                value = value.normal_(0.0, 0.02) if value.dim() > 1 else value.fill_(1.0)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    return model.requires_grad_(False)


def filled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random codes, and constants that give weights the spread of a real model's (about 0.02)."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            tensor.random_()  # all bytes are codes
        else:
            tensor.fill_(0.005 if name == "nested_absmax" else 0.035)
    return tensors


def predicted_activations(config: LlamaConfig, tokens: int) -> float:
    """Bytes at the peak beyond weights and optimizer: the input of each layer, and what one layer needs.

    Inside the layer that is being differentiated these are alive, in bf16: the residual stream and its norms (8
    rows of the hidden size a token), q, k, v and o (8), gate, up, their product and the gradients of these (6
    rows of the MLP's width), and the lower half of the attention's scores three times. The logits and their
    gradient are smaller. 60 MB are libraries that come with the first step.
    """
    hidden, width, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kept = config.num_hidden_layers * tokens * hidden
    layer = tokens * (16 * hidden + 6 * width) + 1.5 * heads * tokens**2
    return 2.0 * (kept + layer) + 60e6


def size(module: nn.Module) -> int:
    """Bytes of all tensors of a module."""
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    return sum(tensor.nbytes for tensor in tensors)


def gigabytes(count: float) -> float:
    """10⁹ bytes."""
    return round(count / 1e9, 3)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(str(row[name]) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    main()
