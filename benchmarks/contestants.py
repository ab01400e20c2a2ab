"""Updates by lorakit and by others on the same rows, for `throughput.py`, `agreement.py` and `curves.py`.

An update has 8 rows. ``lorakit`` packs them into passes of up to 1,024 tokens, as training does. Others:

- ``peft``: PEFT on transformers as its Trainer runs it by default, one row at a time and eight accumulations;
- ``peft-padded``: all eight rows at once, padded to the longest;
- ``peft-packed``: all eight laid end to end, told apart by their positions (`DataCollatorWithFlattening`);
- ``trl``: TRL's SFTTrainer with eight padded rows, its default but for gradient checkpointing, which is off;
- ``trl-packed``: the same with ``padding_free``.

All have the same rank, targets, dropout, number format and AdamW, and clip the norm of gradients at 1.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
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
from lorakit.evals.objective import batching
from lorakit.modelinfo.demo import DEMO_MODEL
from lorakit.models.load import load_model, load_tokenizer
from lorakit.models.quantized import quantize_model
from lorakit.models.sources import locate
from lorakit.optim.build import build_optimizer
from lorakit.optim.spec import OptimizerSpec
from lorakit.parallel.strategy import Strategy
from lorakit.parallel.world import World
from lorakit.training.step import train_step

ROWS, RATE = 8, 1e-4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "all": ALL}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PEERS = ("peft", "peft-padded", "peft-packed", "trl", "trl-packed")

Step = Callable[[list[Row]], float]  # trains on rows; the mean loss of their labelled tokens, in nats


@dataclass(frozen=True)
class Contestant:
    """A model with an adapter, and how it is trained."""

    model: nn.Module
    step: Step


@dataclass(frozen=True)
class Setting:
    """What everyone trains: the base, its number format, and the adapter."""

    model: str = DEMO_MODEL
    form: str = "bf16"
    targets: str = "attention"
    dropout: float = 0.1
    rank: int = 8
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return DTYPES.get(self.form, torch.bfloat16)

    def base(self) -> PreTrainedModel:
        """The frozen model: the demo's, or one of `shapes` with random weights."""
        precision: hardware.Precision = "fp32" if self.form == "fp32" else "bf16"
        if self.model == DEMO_MODEL:
            made = load_model(locate(DEMO_MODEL), precision=precision)
        else:
            torch.manual_seed(0)
            made = AutoModelForCausalLM.from_config(shapes(self.model), dtype=DTYPES[precision])
        if self.form not in DTYPES:
            quantize_model(made.model, bits=4 if self.form == "nf4" else 8)
        return made


def shapes(model: str) -> LlamaConfig:
    """``random-1b``: six layers of TinyLlama-1.1B; ``width-N``: two layers of N numbers, heads of 64."""
    if model == "random-1b":
        return LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=6, num_attention_heads=32,
            num_key_value_heads=4, vocab_size=49152,
        )  # fmt: skip
    width = int(model.removeprefix("width-"))
    return LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3 // 64 * 64, num_hidden_layers=2,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=49152,
    )  # fmt: skip


def encoded(data: Path) -> list[Row]:
    """The rows with the demo model's vocabulary, in the file's order."""
    tokenizer = load_tokenizer(locate(DEMO_MODEL))
    rows, _ = encode_all(
        tokenizer, read_samples([data]).samples, Policy(2048), find_template(tokenizer, "auto")
    )
    return rows


def contestant(stack: contextlib.ExitStack, name: str, setting: Setting, rows: list[Row]) -> Contestant:
    """``lorakit`` or one of `PEERS`; all that it will be given are among the rows."""
    if name == "lorakit":
        return lorakit_step(stack, setting, rows)
    return (trl_step if name.startswith("trl") else peft_step)(stack, setting, name)


def lorakit_step(
    stack: contextlib.ExitStack, setting: Setting, rows: list[Row], pass_tokens: int = PASS_TOKENS
) -> Contestant:
    """An update by lorakit's engine, packed."""
    names = ",".join(TARGETS[setting.targets])
    options = {"r": setting.rank, "lora_dropout": setting.dropout, "seed": setting.seed}
    ours = add_lora_to_model(setting.base(), target_modules=names, **options).train()
    strategy = Strategy(ours, build_optimizer(ours, OptimizerSpec("adamw_torch", RATE)), World())
    assert isinstance(ours, PreTrainedModel)
    collate = stack.enter_context(batching(ours, load_tokenizer(locate(DEMO_MODEL)), rows))

    def step(chosen: list[Row]) -> float:
        groups = passes([len(row.ids) for row in chosen], range(len(chosen)), pass_tokens)
        return train_step(strategy, [collate([chosen[i] for i in group]) for group in groups], 1.0).loss

    return Contestant(ours, step)


def _adapter(setting: Setting) -> Any:
    import peft  # here: its memory is not lorakit's

    torch.manual_seed(setting.seed)
    return peft.LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=setting.dropout,
        target_modules=list(TARGETS[setting.targets]),
    )


def _clipped(trained: list[nn.Parameter]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def peft_step(stack: contextlib.ExitStack, setting: Setting, name: str) -> Contestant:
    """An update of PEFT's model with the Trainer's loss, which makes logits of all positions."""
    import peft

    theirs = peft.get_peft_model(setting.base(), _adapter(setting)).train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    update = _clipped(trained)
    size = 1 if name == "peft" else ROWS
    lay = flattened if name == "peft-packed" else padded

    def step(chosen: list[Row]) -> float:
        count, total = labelled(chosen), 0.0
        for start in range(0, len(chosen), size):
            loss = theirs(**lay(chosen[start : start + size]), num_items_in_batch=count, use_cache=False).loss
            loss.backward()
            total += loss.item()
        update()
        return total

    return Contestant(theirs, step)


def trl_step(stack: contextlib.ExitStack, setting: Setting, name: str) -> Contestant:
    """An update by TRL's trainer: its collator, its loss from the head's chunks, its metrics."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    arguments = SFTConfig(
        output_dir=folder, per_device_train_batch_size=ROWS, gradient_checkpointing=False, use_cpu=True,
        bf16=setting.form != "fp32", padding_free=name == "trl-packed", report_to=[], max_length=None,
        seed=setting.seed,
    )  # fmt: skip
    trainer = SFTTrainer(
        setting.base(), arguments, train_dataset=Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
        processing_class=load_tokenizer(locate(DEMO_MODEL)), peft_config=_adapter(setting),
    )  # fmt: skip
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    update = _clipped([p for p in model.parameters() if p.requires_grad])

    def step(chosen: list[Row]) -> float:
        batch = trainer.data_collator([{"input_ids": row.ids, "labels": row.labels} for row in chosen])
        loss = trainer.training_step(model, batch, num_items_in_batch=labelled(chosen))
        update()
        return float(loss)

    return Contestant(model, step)


def labelled(rows: list[Row]) -> int:
    """Tokens that carry loss."""
    return sum(row.supervised for row in rows)


def padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows under each other, filled up to the longest."""
    inputs = pad(rows, 0).inputs
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, row in enumerate(rows):
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return {**inputs, "labels": labels}


def flattened(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows end to end; transformers' attention tells them apart by positions that begin at 0 again."""
    ids = [i for row in rows for i in row.ids]
    labels = [label for row in rows for label in (-100, *row.labels[1:])]
    positions = [i for row in rows for i in range(len(row.ids))]
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([each]) for name, each in zip(names, (ids, labels, positions), strict=True)}
