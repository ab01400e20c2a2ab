"""Training as one writes it by hand: plain PyTorch and transformers, and nothing of the engine that it checks.

It reads the file, renders, masks, shuffles, packs, divides, clips and steps by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup


@dataclass(frozen=True)
class Settings:
    """Of one run of the reference."""

    steps: int
    size: int
    accumulation: int
    capacity: int | None  # of a packed bin
    seed: int
    rate: float
    warmup: int
    decay: float
    clip: float


@dataclass(frozen=True)
class Seen:
    """What one update saw."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int


def read(path: Path, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every row: the answer carries loss, and the token that ends it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt + row["output"] + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        rows.append((ids, [-100] * start + ids[start:-1] + [-100]))  # not the line's end
    return rows


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def bins(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing; of bins as full, the one filled last."""
    made: list[list[int]] = []
    recent: list[list[int]] = []
    for row in sorted(order, key=lambda row: -lengths[row]):
        room = [b for b in recent if sum(lengths[i] for i in b) + lengths[row] <= capacity]
        if room:
            chosen = max(reversed(room), key=lambda b: sum(lengths[i] for i in b))
            recent = [b for b in recent if b is not chosen]
        else:
            chosen = []
            made.append(chosen)
        chosen.append(row)
        recent.append(chosen)
    return made


def updates(lengths: Sequence[int], run: Settings) -> Iterator[list[list[int]]]:
    """The micro-batches of each update; an epoch's last one may have fewer of them."""
    epoch = 0
    while True:
        order = shuffled(len(lengths), run.seed, epoch)
        units = [[row] for row in order]
        if run.capacity is not None:
            packed = bins(lengths, order, run.capacity)
            units = [packed[i] for i in shuffled(len(packed), run.seed, epoch)]
        micro = [
            [row for unit in units[i : i + run.size] for row in unit] for i in range(0, len(units), run.size)
        ]
        yield from (micro[i : i + run.accumulation] for i in range(0, len(micro), run.accumulation))
        epoch += 1


def train_by_hand(model: nn.Module, rows: list[tuple[list[int], list[int]]], run: Settings) -> list[Seen]:
    """Padded micro-batches; the loss of an update is the mean over all of its labelled tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.rate, weight_decay=run.decay, foreach=False)
    schedule = get_cosine_schedule_with_warmup(optimizer, run.warmup, run.steps)
    source, seen, tokens = updates([len(ids) for ids, _ in rows], run), [], 0
    for _ in range(run.steps):
        groups = next(source)
        labelled = sum(label != -100 for group in groups for i in group for label in rows[i][1][1:])
        total = 0.0
        for group in groups:
            longest = max(len(rows[i][0]) for i in group)
            ids = torch.tensor([rows[i][0] + [0] * (longest - len(rows[i][0])) for i in group])
            labels = torch.tensor([rows[i][1] + [-100] * (longest - len(rows[i][1])) for i in group])
            mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (longest - len(rows[i][0])) for i in group])
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / labelled
            loss.backward()
            total += loss.item()
            tokens += int(mask.sum())
        norm = torch.nn.utils.clip_grad_norm_(trained, run.clip)
        seen.append(Seen(total, norm.item(), schedule.get_last_lr()[0], tokens))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return seen
