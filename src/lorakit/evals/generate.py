"""Answers by greedy decoding, in batches, through transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from lorakit.evals.objective import in_batches
from lorakit.models.patch import lean_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    stop: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """The model's answer to each prompt (token ids), special tokens left out, in the given order.

    An answer ends with any token of ``stop``, or with one that the model itself names. Rows of similar length
    share a batch, padded on the left; ``on_batch(done, total)`` follows the progress. With too little memory
    for ``batch_size`` rows, fewer are taken.

    Raises:
        MemoryLimitError: there is too little for a single row.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    own = model.generation_config.eos_token_id
    ends = sorted({*stop, *([own] if isinstance(own, int) else own or ())})

    def answer(start: int, end: int) -> None:
        chosen = order[start:end]
        outputs = _greedy(model, tokenizer, [list(prompts[i]) for i in chosen], ends, max_new_tokens)
        for i, output in zip(chosen, outputs, strict=True):
            answers[i] = output

    in_batches(len(order), batch_size, answer, lambda done: on_batch(done, len(order)))
    return answers


@torch.no_grad()
def _greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    ends: list[int],
    max_new_tokens: int,
) -> list[str]:
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    try:
        with lean_head(model):
            out_BT = model.generate(  # type: ignore[operator]  # typed as a tensor by nn.Module's __getattr__
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=ends,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.train(was_training)
    new_BT = out_BT[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new_BT, skip_special_tokens=True)
