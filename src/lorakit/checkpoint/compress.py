"""A smaller adapter out of a trained one: each update cut to its leading singular values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorakit.adapters.attach import adapter_layers
from lorakit.checkpoint.convert import attach_plain, factors_of, refuse_whole
from lorakit.checkpoint.inspect import energy_rank, singular_values
from lorakit.errors import UsageError
from lorakit.lowrank.combine import Factors, reduce_rank


@dataclass(frozen=True)
class Compression:
    """What became of the updates, by path.

    Attributes:
        before: ranks as they were (AdaLoRA's removed ones not counted; anchored starts have twice theirs).
        after: ranks as they are.
        errors: ‖Δ − B A‖_F / ‖Δ‖_F; 0 for an update of nothing.
    """

    before: dict[str, int]
    after: dict[str, int]
    errors: dict[str, float]

    @property
    def numbers_kept(self) -> float:
        """Share of the ranks that is left, and so roughly of the bytes."""
        return sum(self.after.values()) / sum(self.before.values())


def compress(
    model: nn.Module, name: str, new_name: str, *, rank: int | None = None, energy: float | None = None
) -> Compression:
    """Attach the adapter ``new_name``, ``name`` at lower ranks, as plain LoRA, and make it the active one.

    The nearest matrix of its rank stands for each update (Eckart and Young 1936). Either every module gets at
    most ``rank``, or each the smallest rank that keeps the share ``energy`` of its Σσᵢ²: then no update moves
    by more than √(1 − energy) of its norm.

    Raises:
        UsageError: not one of ``rank`` and ``energy``; the ranks are that low already; DoRA, whose update is no
            product B A; modules that are trained whole.
        TargetError: a convolution with groups. The model is untouched after any error.
    """
    if (rank is None) == (energy is None):
        raise UsageError("a rank or a share of the energy decides what is kept", remedy="give one of the two")
    refuse_whole(model, name)
    found = {path: factors_of(layer, name, path) for path, layer in adapter_layers(model, name).items()}
    before = {path: factors.A.shape[0] for path, factors in found.items()}
    wanted = {path: rank or _enough(factors, energy or 1.0) for path, factors in found.items()}
    after = {path: max(1, min(wanted[path], r)) for path, r in before.items()}
    if rank is not None and rank >= max(before.values()):
        raise UsageError(
            f"the largest rank of the adapter is {max(before.values())}: nothing is above {rank}",
            remedy="choose a lower rank",
        )
    made = {path: reduce_rank(factors, after[path]) for path, factors in found.items()}
    attach_plain(model, {path: factors for path, (factors, _) in made.items()}, new_name)
    return Compression(before, after, {path: error for path, (_, error) in made.items()})


def _enough(factors: Factors, energy: float) -> int:
    return energy_rank(singular_values(factors.A, factors.B).tolist(), energy)
