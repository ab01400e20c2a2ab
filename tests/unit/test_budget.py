"""AdaLoRA's budget: the schedule, the choice of triplets, exact resume, and PEFT's AdaLoraModel as oracle."""

from __future__ import annotations

import copy
import io
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import Generator, Tensor, nn

from lorakit.errors import AdapterMismatchError, UsageError
from lorakit.lowrank.budget import RankAllocator, RankSchedule, Triplet, orthogonality

WIDTHS = [6, 8, 5, 3]
INITIAL_R, ALPHA = 4, 8


class SVDLayer(nn.Module):
    """y = W x + α/r · B diag(E) A x, with PEFT's divisor r + 1e-5."""

    def __init__(self, base: nn.Linear, triplet: Triplet) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_E, self.lora_B = triplet

    @property
    def triplet(self) -> Triplet:
        return Triplet(self.lora_A, self.lora_E, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        update = x @ (self.lora_A * self.lora_E).T @ self.lora_B.T
        return self.base(x) + update * ALPHA / (len(self.lora_E) + 1e-5)


class Net(nn.Module):
    """An MLP that returns its loss as PEFT's AdaLoRA expects it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return SimpleNamespace(loss=F.mse_loss(x, y))

    @property
    def triplets(self) -> dict[str, Triplet]:
        return {str(i): layer.triplet for i, layer in enumerate(self.layers)}


def plain_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net([nn.Linear(a, b) for a, b in pairwise(WIDTHS)])


def triplet(in_: int, out: int, r: int = INITIAL_R, *, seed: int = 0) -> Triplet:
    generator = Generator().manual_seed(seed)
    shapes = (r, in_), (r, 1), (out, r)
    return Triplet(*(nn.Parameter(0.3 * torch.randn(shape, generator=generator)) for shape in shapes))


def adapted_net(seed: int = 0) -> Net:
    bases = plain_net(seed).layers
    return Net(
        [SVDLayer(base, triplet(base.in_features, base.out_features, seed=i)) for i, base in enumerate(bases)]
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(100 + step)
    x = torch.randn(12, WIDTHS[0], generator=generator)
    return x, torch.tanh(2 * x[:, :3] - x[:, 3:])


class Run:
    """A net, its optimizer and its allocator: what a trainer would hold."""

    def __init__(self, schedule: RankSchedule) -> None:
        self.net = adapted_net()
        self.optimizer = torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], lr=0.02)
        self.allocator = RankAllocator(schedule, self.net.triplets)

    def step(self, step: int) -> int:
        loss = self.net(*batch(step)).loss
        loss = loss + self.allocator.schedule.orth_reg_weight * orthogonality(self.net.triplets.values())
        loss.backward()
        self.optimizer.step()
        budget = self.allocator.update(step)
        self.optimizer.zero_grad()
        return budget

    def living(self) -> int:
        return sum(int(t.E.count_nonzero()) for t in self.net.triplets.values())


# -- the schedule


def peft_schedule(schedule: RankSchedule, initial: int, target: int) -> Any:
    theirs = PeftAllocator.__new__(PeftAllocator)
    theirs.peft_config, theirs.init_bgt, theirs.target_bgt = schedule, initial, target
    return theirs.budget_schedule


@pytest.mark.parametrize("initial", [24, 101])
@pytest.mark.parametrize(
    "schedule",
    [
        RankSchedule(target_r=1, total_step=60, tinit=7, tfinal=11, deltaT=3),
        RankSchedule(target_r=1, total_step=37),
        RankSchedule(target_r=1, total_step=1000, tinit=200, tfinal=333, deltaT=10),
    ],
)
def test_budget_follows_the_cubic_schedule_of_peft(schedule: RankSchedule, initial: int) -> None:
    theirs = peft_schedule(schedule, initial, 9)
    previous = initial
    for step in range(schedule.total_step + 5):
        budget, choose = schedule.budget(step, initial, 9)
        assert budget == theirs(step)[0]
        # The final choice is forced, whatever deltaT says.
        assert choose == (theirs(step)[1] or step == schedule.last_choice)
        assert 9 <= budget <= previous
        previous = budget
    assert schedule.budget(schedule.tinit, initial, 9) == (initial, False)
    assert schedule.budget(schedule.last_choice, initial, 9) == (9, True)


def test_budget_by_hand() -> None:
    schedule = RankSchedule(target_r=2, total_step=30, tinit=5, tfinal=5, deltaT=5)
    # Half way between steps 5 and 25 an eighth of the difference is left: 8 + (72 − 8) / 8.
    assert schedule.budget(15, 72, 8) == (16, True)
    assert schedule.budget(16, 72, 8) == (int(8 + 64 * 0.45**3), False)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"target_r": 0}, "target_r"),
        ({"target_r": 2.5}, "target_r"),
        ({"total_step": 0}, "total_step"),
        ({"tinit": -1}, "tinit"),
        ({"tfinal": True}, "tfinal"),
        ({"deltaT": 0}, "deltaT"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": math.nan}, "beta2"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"orth_reg_weight": math.inf}, "orth_reg_weight"),
        ({"tinit": 60, "tfinal": 40}, "tinit"),
    ],
)
def test_schedules_that_make_no_sense(values: dict[str, Any], place: str) -> None:
    with pytest.raises(UsageError) as caught:
        RankSchedule(**{"target_r": 2, "total_step": 100, **values})
    assert caught.value.place == f"AdaLoRA: {place}"
    assert place in caught.value.message
    assert caught.value.remedy


# -- PEFT as oracle


def peft_pair(schedule: RankSchedule) -> tuple[Any, Any, Run]:
    """PEFT's model and optimizer, and a run of ours with the same tensors."""
    run = Run(schedule)
    config = AdaLoraConfig(
        init_r=INITIAL_R,
        lora_alpha=ALPHA,
        target_modules=["0", "1", "2"],
        target_r=schedule.target_r,
        total_step=schedule.total_step,
        tinit=schedule.tinit,
        tfinal=schedule.tfinal,
        deltaT=schedule.deltaT,
        orth_reg_weight=schedule.orth_reg_weight,
    )
    model = get_peft_model(plain_net(), config).base_model
    for theirs, ours in zip(model.model.layers, run.net.layers, strict=True):
        assert torch.equal(theirs.base_layer.weight, ours.base.weight)
        for target, source in zip(peft_tensors(theirs), ours.triplet, strict=True):
            target.data.copy_(source.data)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    return model, optimizer, run


def peft_tensors(layer: Any) -> tuple[nn.Parameter, ...]:
    return layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]


@pytest.mark.parametrize(("tinit", "tfinal", "deltaT"), [(5, 8, 3), (0, 1, 1), (10, 13, 4)])
def test_the_trajectory_and_the_masks_of_peft(tinit: int, tfinal: int, deltaT: int) -> None:
    schedule = RankSchedule(target_r=2, total_step=40, tinit=tinit, tfinal=tfinal, deltaT=deltaT)
    model, optimizer, run = peft_pair(schedule)
    choices = 0
    for step in range(1, 41):
        x, y = batch(step)
        model(x=x, y=y).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()

        run.step(step)

        for i, (theirs, ours) in enumerate(zip(model.model.layers, run.net.layers, strict=True)):
            for target, source in zip(peft_tensors(theirs), ours.triplet, strict=True):
                torch.testing.assert_close(source, target, rtol=0, atol=1e-4)
            masks = model.peft_config["default"].rank_pattern
            if masks is not None:
                choices += 1
                assert run.allocator.kept[str(i)].tolist() == masks[f"layers.{i}.lora_E.default"]
            assert torch.equal(ours.lora_E == 0, theirs.lora_E["default"] == 0)
    assert choices >= 3 * 8
    assert sum(run.allocator.ranks().values()) == run.living() == 6


# -- the choice


@pytest.mark.parametrize("target_r", [1, 2, 3])
@pytest.mark.parametrize("deltaT", [1, 7])
def test_every_budget_is_met_exactly(target_r: int, deltaT: int) -> None:
    schedule = RankSchedule(target_r=target_r, total_step=30, tinit=3, tfinal=5, deltaT=deltaT)
    run = Run(schedule)
    for step in range(1, 31):
        budget = run.step(step)
        choose = schedule.budget(step, 12, 3 * target_r)[1]
        if choose:
            assert run.living() == sum(run.allocator.ranks().values()) == budget
    assert run.living() == 3 * target_r


def equal_triplets(r: int = 4) -> dict[str, Triplet]:
    """Layers whose triplets all have the same score."""
    ones = {name: Triplet(*(nn.Parameter(torch.ones(s)) for s in ((r, 3), (r, 1), (5, r)))) for name in "ab"}
    for each in ones.values():
        for parameter in each:
            parameter.grad = torch.ones_like(parameter)
    return ones


def test_equal_scores_keep_the_earlier_triplets() -> None:
    layers = equal_triplets()
    allocator = RankAllocator(RankSchedule(target_r=3, total_step=3, tfinal=1), layers)
    assert [allocator.update(step) for step in (1, 2, 3)] == [6, 6, 6]
    assert allocator.ranks() == {"a": 4, "b": 2}
    assert layers["b"].E.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]
    assert layers["a"].E.flatten().tolist() == [1.0] * 4


def test_the_importance_by_hand() -> None:
    A, E, B = (torch.tensor(v) for v in ([[1.0, 2.0], [3.0, 1.0]], [[2.0], [0.5]], [[1.0, 4.0]]))
    layer = Triplet(nn.Parameter(A), nn.Parameter(E), nn.Parameter(B))
    schedule = RankSchedule(target_r=1, total_step=4, beta1=0.5, beta2=0.25, tinit=2)
    allocator = RankAllocator(schedule, {"x": layer})
    gradients = [(0.1, 0.2, 0.3), (0.4, -0.1, 0.2)]
    mean, spread = [0.0 * t for t in layer], [0.0 * t for t in layer]
    for step, values in enumerate(gradients, start=1):
        for i, (parameter, value) in enumerate(zip(layer, values, strict=True)):
            parameter.grad = torch.full_like(parameter, value)
            now = (parameter.detach() * value).abs()
            mean[i] = 0.5 * mean[i] + 0.5 * now
            spread[i] = 0.25 * spread[i] + 0.75 * (now - mean[i]).abs()
        allocator.update(step)
    a, e, b = (m * s for m, s in zip(mean, spread, strict=True))
    expected = e[:, 0] + a.mean(1) + b.mean(0)
    torch.testing.assert_close(allocator._scores(), expected.detach())


def test_a_dropped_triplet_may_return_until_the_choice_stands() -> None:
    layers = {"a": triplet(3, 3, 2), "b": triplet(3, 3, 2, seed=1)}
    allocator = RankAllocator(RankSchedule(target_r=1, total_step=8, tfinal=4), layers)

    def important(name: str) -> None:
        with torch.no_grad():
            for layer in layers.values():
                for parameter in layer:
                    parameter.copy_(torch.ones_like(parameter))
                    parameter.grad = torch.full_like(parameter, 100.0 if layer is layers[name] else 0.01)

    important("a")
    allocator.update(3)
    assert allocator.ranks() == {"a": 2, "b": 0}
    for step in (3, 3, 4):
        important("b")
        layers["b"].A.grad *= 1000
        allocator.update(step)
    assert allocator.ranks() == {"a": 0, "b": 2}
    important("a")
    assert allocator.update(5) == 2
    assert allocator.ranks() == {"a": 0, "b": 2}
    assert not layers["a"].E.any()


@pytest.mark.parametrize("scored", [True, False])
def test_a_budget_that_never_falls_masks_nothing(scored: bool) -> None:
    run = Run(RankSchedule(target_r=INITIAL_R, total_step=6, tfinal=2))
    for step in range(1 if scored else 4, 7):
        assert run.step(step) == 12
        assert run.living() == 12
    assert run.allocator.ranks() == {"0": 4, "1": 4, "2": 4}


def test_layers_may_start_with_different_ranks() -> None:
    layers = {"small": triplet(4, 4, 1), "large": triplet(4, 4, 7, seed=1)}
    for each in layers.values():
        for parameter in each:
            parameter.grad = torch.ones_like(parameter)
    allocator = RankAllocator(RankSchedule(target_r=2, total_step=2), layers)
    allocator.update(1)
    assert allocator.update(2) == 4
    assert sum(allocator.ranks().values()) == 4


def test_convolution_shapes_are_flattened() -> None:
    A, E, B = (
        nn.Parameter(torch.randn(3, 2, 3, 3)),
        nn.Parameter(torch.randn(3, 1)),
        nn.Parameter(torch.randn(4, 3)),
    )
    flat = Triplet(nn.Parameter(A.detach().flatten(1)), E, B)
    torch.testing.assert_close(orthogonality([Triplet(A, E, B)]), orthogonality([flat]))
    for parameter in (A, E, B):
        parameter.grad = torch.ones_like(parameter)
    allocator = RankAllocator(RankSchedule(target_r=1, total_step=2), {"conv": Triplet(A, E, B)})
    allocator.update(1)
    allocator.update(2)
    assert allocator.ranks() == {"conv": 1}


def test_a_parameter_without_gradient_has_no_importance() -> None:
    layers = equal_triplets()
    for parameter in layers["a"]:
        parameter.grad = None
    allocator = RankAllocator(RankSchedule(target_r=2, total_step=2), layers)
    allocator.update(1)
    allocator.update(2)
    assert allocator.ranks() == {"a": 0, "b": 4}


def test_called_at_the_wrong_time() -> None:
    layers = {"a": triplet(3, 3)}
    allocator = RankAllocator(RankSchedule(target_r=1, total_step=4), layers)
    with pytest.raises(UsageError, match="no AdaLoRA tensor has a gradient") as caught:
        allocator.update(1)
    assert "before zero_grad" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="no step was seen before"):
        allocator.update(4)
    assert layers["a"].E.count_nonzero() == INITIAL_R


def test_layers_that_do_not_fit() -> None:
    schedule = RankSchedule(target_r=2, total_step=4)
    with pytest.raises(UsageError, match="no AdaLoRA layer"):
        RankAllocator(schedule, {})
    a, b = triplet(3, 3, 2), triplet(3, 3, 4)
    with pytest.raises(UsageError, match=r"A \[2, 3\], E \[4, 1\] and B \[3, 2\]") as caught:
        RankAllocator(schedule, {"q_proj": Triplet(a.A, b.E, a.B)})
    assert caught.value.place == "AdaLoRA: q_proj"
    with pytest.raises(UsageError, match="2 layers of target_r 2 are more than the 3 ranks"):
        RankAllocator(schedule, {"x": triplet(3, 3, 1), "y": triplet(3, 3, 2)})


# -- state


@pytest.mark.parametrize(
    "stop", [3, 9, 15, 22]
)  # before the first choice, in the middle, between choices, after
def test_resume_is_bit_equal(stop: int) -> None:
    schedule = RankSchedule(target_r=1, total_step=26, tinit=4, tfinal=6, deltaT=2)
    run = Run(schedule)
    for step in range(1, stop + 1):
        run.step(step)
    file = io.BytesIO()
    torch.save(run.allocator.state_dict(), file)
    file.seek(0)
    resumed = Run(schedule)
    resumed.net.load_state_dict(run.net.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    resumed.allocator.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.allocator.ranks() == run.allocator.ranks()
    for step in range(stop + 1, 27):
        assert run.step(step) == resumed.step(step)
        for ours, theirs in zip(run.net.parameters(), resumed.net.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert run.living() == 3


def test_a_saved_state_does_not_change_with_the_run() -> None:
    run = Run(RankSchedule(target_r=1, total_step=20, tfinal=4))
    for step in range(1, 9):
        run.step(step)
    state = run.allocator.state_dict()
    before = copy.deepcopy(state)
    for step in range(9, 21):
        run.step(step)
    for part in ("sensitivity", "uncertainty", "kept"):
        assert state[part].keys() == before[part].keys() != set()
        assert all(torch.equal(state[part][key], before[part][key]) for key in before[part])


def test_a_state_of_other_layers_is_refused_and_nothing_loaded() -> None:
    schedule = RankSchedule(target_r=1, total_step=20)
    run, other = (
        Run(schedule),
        RankAllocator(schedule, {"0": triplet(6, 8), "1": triplet(8, 4), "2": triplet(5, 3)}),
    )
    for step in range(1, 6):
        run.step(step)
    state = run.allocator.state_dict()
    with pytest.raises(AdapterMismatchError) as caught:
        other.load_state_dict(state)
    assert caught.value.place == "rank allocation: sensitivity of 1.B"
    assert "expected [4, 4], found [5, 4]; 1 of 9 tensors differ" in caught.value.message
    assert other.ranks() == {"0": 4, "1": 4, "2": 4}
    assert other.state_dict()["sensitivity"] == {}
    del state["kept"]["2"]
    with pytest.raises(AdapterMismatchError, match=r"expected \[4\], found \['nothing'\]; 1 of 3"):
        run.allocator.load_state_dict(state)


# -- the regulariser


def test_orthogonality_by_hand() -> None:
    A, B = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    layer = Triplet(nn.Parameter(A), nn.Parameter(torch.zeros(2, 1)), nn.Parameter(B))
    # A Aᵀ − I = [[0, 1], [1, 1]] and Bᵀ B − I = [[3, 0], [0, 0]]
    assert orthogonality([layer]).item() == pytest.approx((math.sqrt(3) + 3) / 2)


def test_orthogonality_of_singular_vectors_is_zero_with_a_finite_gradient() -> None:
    eye = Triplet(*(nn.Parameter(t) for t in (torch.eye(3, 5), torch.ones(3, 1), torch.eye(4, 3))))
    value = orthogonality([eye])
    value.backward()
    assert value.item() == 0.0
    assert eye.A.grad is not None
    assert eye.B.grad is not None
    assert torch.isfinite(eye.A.grad).all()
    assert torch.isfinite(eye.B.grad).all()
    assert eye.E.grad is None
