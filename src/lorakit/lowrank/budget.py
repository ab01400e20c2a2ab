"""AdaLoRA's rank reallocation (arXiv 2303.10512): which of all singular values the adapters may keep.

    ΔW = s · B diag(E) A      A [r, in], E [r, 1], B [out, r]

A triplet is one rank of one layer: a row of A, its value in E, a column of B. All layers start with more ranks
than the budget allows in the end. While the budget falls, the least important triplets of the *whole model*
lose their value (E = 0), and come back if they turn out to matter while it still falls. Plain state: no
trainer, no model, no layer type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.errors import AdapterMismatchError, UsageError

_LEAST = {"target_r": 1, "total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}


@dataclass(frozen=True)
class RankSchedule:
    """How the budget falls. Steps are optimizer steps, the first one is 1.

    Args:
        target_r: rank per layer in the end, on average over the layers.
        total_step: steps of the whole training.
        tinit: steps at the start with every triplet.
        tfinal: steps at the end that train the triplets chosen at step ``total_step − tfinal``.
        deltaT: steps from one choice to the next.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of its uncertainty.
        orth_reg_weight: weight of `orthogonality` in the loss.
    """

    target_r: int
    total_step: int
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        values = asdict(self)
        for name, least in _LEAST.items():
            value = values[name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            message = f"{name} must be a whole number of at least {least}, not {value!r}"
            _require(whole and value >= least, name, message, "count optimizer steps and ranks")
        for name in ("beta1", "beta2"):
            message = f"{name} must be between 0 and 1, not {values[name]!r}"
            _require(0 < values[name] < 1, name, message, "0.85 is the usual value")
        weight = self.orth_reg_weight
        message = f"orth_reg_weight must be a number of at least 0, not {weight!r}"
        _require(0 <= weight < math.inf, "orth_reg_weight", message, "0.5 is the usual value")
        _require(
            self.tinit < self.last_choice,
            "tinit",
            f"{self.total_step} steps less the first {self.tinit} (tinit) and the last {self.tfinal} (tfinal) "
            "leave none to reduce the ranks in",
            "make tinit or tfinal smaller",
        )

    @property
    def last_choice(self) -> int:
        """The step at which the final triplets are chosen."""
        return self.total_step - self.tfinal

    def budget(self, step: int, initial: int, target: int) -> tuple[int, bool]:
        """How many triplets may stay after ``step``, and whether they are chosen now.

        initial for t ≤ tinit, target from t = total_step − tfinal on, and between them
        target + (initial − target) · (1 − (t − tinit) / (total_step − tfinal − tinit))³, rounded down.
        """
        if step <= self.tinit:
            return initial, False
        if step >= self.last_choice:
            return target, True
        left = 1 - (step - self.tinit) / (self.last_choice - self.tinit)
        return int((initial - target) * left**3 + target), step % self.deltaT == 0


class Triplet(NamedTuple):
    """The tensors of one layer: A [r, ...], E [r, 1], B [out, r]."""

    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter


class RankAllocator:
    """Smoothed importance of every triplet, and the triplets kept.

    ``kept`` holds for each layer which of its triplets survived the last choice (bool, [r]); the tensors are
    replaced by every choice, never changed in place.
    """

    def __init__(self, schedule: RankSchedule, layers: Mapping[str, Triplet]) -> None:
        _require(bool(layers), "layers", "there is no AdaLoRA layer", "attach an adapter of this method first")
        for name, (A, E, B) in layers.items():
            message = f"A {list(A.shape)}, E {list(E.shape)} and B {list(B.shape)} do not belong together"
            fit = E.shape == (A.shape[0], 1) and B.shape[1] == A.shape[0]
            _require(fit, name, message, "they are [r, in], [r, 1] and [out, r]")
        self.schedule = schedule
        self.layers = dict(layers)
        self.kept = {name: torch.ones_like(E[:, 0], dtype=torch.bool) for name, (_, E, _) in layers.items()}
        self.initial_budget = sum(len(mask) for mask in self.kept.values())
        self.target_budget = schedule.target_r * len(layers)
        _require(
            self.target_budget <= self.initial_budget,
            "target_r",
            f"{len(layers)} layers of target_r {schedule.target_r} are more than the {self.initial_budget} "
            "ranks they start with",
            "make target_r smaller or the starting rank larger",
        )
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._settled = False

    @torch.no_grad()
    def update(self, step: int) -> int:
        """Account for one step; zero the E that fall out of the budget, and return the budget.

        Call it once a step, after ``optimizer.step()`` and before the gradients are cleared; ``step`` counts
        the optimizer steps done. Between two choices a dropped triplet trains on and may return; from step
        ``total_step − tfinal`` on the choice stands.
        """
        if step < self.schedule.last_choice:
            self._observe()
        budget, choose = self.schedule.budget(step, self.initial_budget, self.target_budget)
        if choose and not self._settled:
            self.kept = self._choose(budget)
            if step >= self.schedule.last_choice:
                self._settled = True
                self._sensitivity, self._uncertainty = {}, {}
        if choose:
            for name, (_, E, _) in self.layers.items():
                E.masked_fill_(~self.kept[name].to(E.device).unsqueeze(1), 0.0)
        return budget

    def ranks(self) -> dict[str, int]:
        """How many triplets each layer keeps."""
        return {name: int(mask.sum()) for name, mask in self.kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, besides the parameters themselves."""
        return {
            "sensitivity": dict(self._sensitivity),
            "uncertainty": dict(self._uncertainty),
            "kept": dict(self.kept),
            "settled": self._settled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; ``AdapterMismatchError`` if it is of other layers, nothing loaded."""
        parameters = dict(self._parameters())
        masks = {name: mask.shape for name, mask in self.kept.items()}
        moments = {key: each.shape for key, each in parameters.items()} if state["sensitivity"] else {}
        for part, expected in (("sensitivity", moments), ("uncertainty", moments), ("kept", masks)):
            found = {key: tensor.shape for key, tensor in state[part].items()}
            wrong = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
            if wrong:
                here, there = (list(shapes.get(wrong[0], ["nothing"])) for shapes in (expected, found))
                raise AdapterMismatchError(
                    f"expected {here}, found {there}; {len(wrong)} of {len(expected)} tensors differ",
                    place=f"rank allocation: {part} of {wrong[0]}",
                    remedy="resume with the adapter settings that the checkpoint was made with",
                )
        self._sensitivity = {key: each.to(parameters[key].device) for key, each in state["sensitivity"].items()}
        self._uncertainty = {key: each.to(parameters[key].device) for key, each in state["uncertainty"].items()}
        self.kept = {name: state["kept"][name] for name in self.layers}
        self._settled = bool(state["settled"])

    def _parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        for name, (A, E, B) in self.layers.items():
            yield from ((f"{name}.A", A), (f"{name}.E", E), (f"{name}.B", B))

    def _observe(self) -> None:
        """I = |w · ∂L/∂w|, its running mean Ī, and the running mean Ū of |I − Ī|.

        A parameter without a gradient took no part in this step: its I is 0.
        """
        _require(
            any(each.grad is not None for _, each in self._parameters()),
            "update",
            "no AdaLoRA tensor has a gradient",
            "call it after backward and optimizer.step(), before zero_grad()",
        )
        beta1, beta2 = self.schedule.beta1, self.schedule.beta2
        for key, w in self._parameters():
            nothing = torch.zeros_like(w)
            now = nothing if w.grad is None else (w * w.grad).abs()
            mean = beta1 * self._sensitivity.get(key, nothing) + (1 - beta1) * now
            spread = beta2 * self._uncertainty.get(key, nothing) + (1 - beta2) * (now - mean).abs()
            self._sensitivity[key], self._uncertainty[key] = mean, spread

    def _scores(self) -> Tensor:
        """s(E) + mean of s over the row of A + mean of s over the column of B, with s = Ī · Ū."""
        scores = []
        for name in self.layers:
            keys = [f"{name}.{part}" for part in Triplet._fields]
            a, e, b = (self._sensitivity[key] * self._uncertainty[key] for key in keys)
            scores.append(e.flatten() + (a.flatten(1).mean(dim=1) + b.flatten(1).mean(dim=0)))
        return torch.cat(scores)

    def _choose(self, budget: int) -> dict[str, Tensor]:
        """The ``budget`` triplets of the highest score; of equal ones the earlier layer's, then the earlier."""
        if budget == self.initial_budget:
            return {name: torch.ones_like(mask) for name, mask in self.kept.items()}
        _require(
            bool(self._sensitivity),
            "update",
            "the ranks are to be chosen and no step was seen before",
            "call update after every optimizer step, and load the state when resuming",
        )
        scores = self._scores()
        best = scores.sort(descending=True, stable=True).indices[:budget]
        chosen = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, best, True)
        sizes = [len(mask) for mask in self.kept.values()]
        return {name: part.clone() for name, part in zip(self.kept, chosen.split(sizes), strict=True)}


def orthogonality(triplets: Iterable[Triplet]) -> Tensor:
    """Mean over all A and B of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F: how far A and B are from singular vectors.

    Added to the loss with the weight ``orth_reg_weight``. The paper sums the squared norms; this is what PEFT
    trains with.
    """
    norms = []
    for A, _, B in triplets:
        for rows in (A.flatten(1), B.flatten(1).T):
            gram = rows @ rows.T
            identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            norms.append(torch.linalg.matrix_norm(gram - identity))
    return torch.stack(norms).mean()


def _require(condition: bool, place: str, message: str, remedy: str) -> None:
    if not condition:
        raise UsageError(message, place=f"AdaLoRA: {place}", remedy=remedy)
