"""Rows → tensors for one forward pass, packed end to end or padded.

Position t of a segment predicts token t+1, so targets are the labels shifted by one *within* their segment.
Only positions with a target need logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.data.encode import Row
from lorakit.ops.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        inputs: keyword arguments of the model.
        keep_N: flat positions (row-major over batch and sequence) that have a target.
        targets_N: the tokens to predict there.
        tokens: real tokens, padding left out.
    """

    inputs: dict[str, Tensor | tuple[int, ...]]
    keep_N: Tensor
    targets_N: Tensor
    tokens: int
    packed: bool

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; to a GPU by pinned memory, without waiting (not run on one)."""
        on_gpu = torch.device(device).type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)

        inputs = {k: move(v) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Batch(inputs, move(self.keep_N), move(self.targets_N), self.tokens, self.packed)


def pack(rows: Sequence[Row]) -> Batch:
    """All rows in one line of T tokens, positions counted anew in each; attention must know the lengths."""
    ids_T = torch.tensor([i for row in rows for i in row.ids])
    positions_T = torch.cat([torch.arange(len(row.ids)) for row in rows])
    targets_T = torch.tensor([t for row in rows for t in _targets(row)])
    inputs: dict[str, Tensor | tuple[int, ...]] = {
        "input_ids": ids_T[None],
        "position_ids": positions_T[None],
        "segment_lengths": tuple(len(row.ids) for row in rows),
    }
    return _batch(inputs, targets_T, len(ids_T), packed=True)


def pad(rows: Sequence[Row], pad_id: int) -> Batch:
    """One row a line, filled up on the right to the longest. Padding has no target, whatever its id."""
    longest = max(len(row.ids) for row in rows)
    ids_BT = torch.full((len(rows), longest), pad_id)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    targets_BT = torch.full((len(rows), longest), IGNORE)
    for number, row in enumerate(rows):
        ids_BT[number, : len(row.ids)] = torch.tensor(row.ids)
        mask_BT[number, : len(row.ids)] = 1
        targets_BT[number, : len(row.ids)] = torch.tensor(_targets(row))
    inputs: dict[str, Tensor | tuple[int, ...]] = {"input_ids": ids_BT, "attention_mask": mask_BT}
    return _batch(inputs, targets_BT.flatten(), int(mask_BT.sum()), packed=False)


def _targets(row: Row) -> tuple[int, ...]:
    return (*row.labels[1:], IGNORE)


def _batch(inputs: dict[str, Tensor | tuple[int, ...]], targets: Tensor, tokens: int, *, packed: bool) -> Batch:
    keep_N = (targets != IGNORE).nonzero().flatten()
    return Batch(inputs, keep_N, targets[keep_N], tokens, packed)
