"""Answers by greedy decoding, in batches, through transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lorakit.data.sample import Message
from lorakit.data.templates import render
from lorakit.models.patch import lean_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The model's answer to each conversation, special tokens left out, in the given order.

    Rows of similar length share a batch, padded on the left; ``on_batch(done, total)`` follows the progress.
    """
    texts = [render(tokenizer, messages, ask=True) for messages in prompts]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        outputs = _greedy(model, tokenizer, [ids[i] for i in chosen], max_new_tokens)
        for i, output in zip(chosen, outputs, strict=True):
            answers[i] = output
        on_batch(min(start + batch_size, len(order)), len(order))
    return answers


@torch.no_grad()
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], max_new_tokens: int
) -> list[str]:
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    with lean_head(model):
        out_BT = model.generate(  # type: ignore[operator]  # typed as a tensor by nn.Module's __getattr__
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    new_BT = out_BT[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_BT, skip_special_tokens=True)
