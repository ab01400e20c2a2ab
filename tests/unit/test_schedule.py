"""Learning rates: pure functions of the step, equal to those of the schedulers that they are named after."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from transformers import get_scheduler

from lorakit.config.schema import TrainConfig
from lorakit.errors import UsageError
from lorakit.optim.schedule import KINDS, Schedule, warmup_steps

STEPS, WARMUP = 40, 10
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-5, "num_cycles": 0.75}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.5, "lr_end": 1e-5}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 3}),
    ("warmup_stable_decay", {"num_decay_steps": 1}),
    ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "linear", "min_lr_ratio": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "1-sqrt", "min_lr_ratio": 0.05}),
]


def theirs(kind: str, settings: Mapping[str, Any], *, peak: float, steps: int, warmup: int) -> list[float]:
    """Every rate of transformers' scheduler of this name."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(kind, optimizer, warmup, steps, dict(settings))
    return [peak * scheduler.lr_lambdas[0](step) for step in range(steps)]


def ours(schedule: Schedule, steps: int | None = None) -> list[float]:
    return [schedule.rate(step) for step in range(steps or schedule.steps)]


class TestSchedule:
    @pytest.mark.parametrize(("kind", "settings"), CASES)
    @hypothesis_settings(max_examples=30)
    @given(
        steps=st.integers(1, 300), share=st.floats(0, 0.99), decay=st.floats(0, 1), peak=st.floats(2e-5, 1.0)
    )
    def test_the_rates_are_those_of_transformers(
        self, kind: str, settings: dict[str, Any], steps: int, share: float, decay: float, peak: float
    ) -> None:
        warmup = int(share * steps)
        if "num_decay_steps" in settings:
            settings = settings | {"num_decay_steps": max(1, round(decay * (steps - warmup)))}
        expected = theirs(kind, settings, peak=peak, steps=steps, warmup=warmup)
        found = ours(Schedule(kind, peak, steps, warmup, settings=settings))
        assert found == pytest.approx(expected, rel=0, abs=1e-12)

    def test_every_kind_is_compared(self) -> None:
        configured = get_args(TrainConfig.model_fields["lr_scheduler_type"].annotation)
        assert {kind for kind, _ in CASES} == set(KINDS) >= set(configured)

    @pytest.mark.parametrize("factor", [0.1, 1 / 3, 1.0])
    def test_the_start_factor_is_that_of_linear_lr(self, factor: float) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-5)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=factor, total_iters=100)
        expected = []
        for _ in range(150):
            expected.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        schedule = Schedule("constant_with_warmup", 1e-5, 150, 100, start_factor=factor)
        assert ours(schedule) == pytest.approx(expected, rel=0, abs=1e-12)
        assert schedule.rate(0) == factor * 1e-5

    @pytest.mark.parametrize(("kind", "settings"), CASES)
    def test_the_start_factor_changes_the_warm_up_alone(self, kind: str, settings: dict[str, Any]) -> None:
        plain, lifted = (Schedule(kind, 1e-3, STEPS, WARMUP, f, settings) for f in (0.0, 0.1))
        assert ours(plain)[WARMUP:] == ours(lifted)[WARMUP:]
        if kind != "constant":
            assert ours(lifted)[:WARMUP] == pytest.approx(
                [1e-3 * (0.1 + 0.9 * t / WARMUP) for t in range(WARMUP)]
            )

    @pytest.mark.parametrize(("kind", "settings"), CASES)
    def test_a_run_that_goes_on_longer_keeps_the_last_rate(self, kind: str, settings: dict[str, Any]) -> None:
        rates = ours(Schedule(kind, 1e-3, STEPS, WARMUP, settings=settings), 3 * STEPS)
        if kind != "inverse_sqrt":  # it has no end
            assert set(rates[STEPS:]) == {rates[STEPS]}
        assert all(0 <= rate <= 1e-3 for rate in rates)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_warm_up_as_long_as_the_run_only_rises(self, kind: str) -> None:
        if kind == "warmup_stable_decay":
            return  # it needs a decay
        settings = {"min_lr_rate": 0.5} if kind == "cosine_with_min_lr" else {}
        rates = ours(Schedule(kind, 1.0, 4, 4, settings=settings))
        assert rates == ([1.0] * 4 if kind == "constant" else [0, 0.25, 0.5, 0.75])

    @pytest.mark.parametrize(
        ("kind", "settings", "message"),
        [
            ("cosin", {}, "lr_scheduler_type: there is no cosin"),
            ("linear", {"num_cycles": 1}, "linear has no setting num_cycles"),
            ("cosine", {"cycles": 1}, "cosine has no setting cycles\nit has num_cycles"),
            ("cosine", {"num_cycles": 0}, "num_cycles must be a number above 0, not 0"),
            ("cosine", {"num_cycles": float("nan")}, "must be a number above 0, not nan"),
            ("cosine", {"num_cycles": "2"}, "not '2'"),
            ("cosine_with_restarts", {"num_cycles": 1.5}, "must be a whole number from 1, not 1.5"),
            ("cosine_with_restarts", {"num_cycles": True}, "not True"),
            ("cosine_with_min_lr", {}, "needs one of min_lr and min_lr_rate"),
            ("cosine_with_min_lr", {"min_lr": 0.0, "min_lr_rate": 0.0}, "needs one of"),
            ("cosine_with_min_lr", {"min_lr": 1e-2}, "min_lr 0.01 is above learning_rate 0.001"),
            ("polynomial", {"lr_end": 1}, "lr_end 1 is above learning_rate 0.001"),
            ("inverse_sqrt", {"timescale": 0}, "timescale must be a whole number from 1, not 0"),
            ("warmup_stable_decay", {}, "needs num_decay_steps"),
            ("warmup_stable_decay", {"num_decay_steps": 31}, "after the warm-up there are 30 updates"),
            ("warmup_stable_decay", {"num_decay_steps": 1, "decay_type": "step"}, "linear or cosine or 1-sqrt"),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, kind: str, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=re.escape(message)):
            Schedule(kind, 1e-3, STEPS, WARMUP, settings=settings)

    @pytest.mark.parametrize(
        ("steps", "ratio", "count", "expected"),
        [(100, 0.1, None, 10), (101, 0.1, None, 11), (5, 0.0, None, 0), (5, 1.0, None, 5), (50, 0.5, 3, 3),
         (50, 0.5, 0, 0), (5, 0.0, 99, 5)],
    )  # fmt: skip
    def test_warmup_steps(self, steps: int, ratio: float, count: int | None, expected: int) -> None:
        assert warmup_steps(steps, ratio=ratio, count=count) == expected

    def test_nothing_here_imports_torch(self) -> None:
        program = "import sys, lorakit.optim.schedule, lorakit.optim.spec; print('torch' in sys.modules)"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert found.stdout == "False\n"
