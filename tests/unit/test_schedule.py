"""Rates and order of the updates: pure functions of the step and the seed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from lorakit.training.order import Grouping, epoch_order, total_steps, updates
from lorakit.training.schedule import learning_rate, warmup_steps


class TestSchedule:
    KINDS = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup")
    LENGTHS = ((1, 0), (7, 0), (7, 1), (7, 6), (100, 10), (100, 99), (333, 17))

    @pytest.mark.parametrize(("steps", "warmup"), LENGTHS)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("peak", [1.0, 3e-4])
    def test_the_rates_are_those_of_transformers(self, kind: str, peak: float, steps: int, warmup: int) -> None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
        scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        theirs = []
        for _ in range(steps):
            theirs.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        ours = [learning_rate(t, kind=kind, peak=peak, steps=steps, warmup=warmup) for t in range(steps)]
        assert ours == pytest.approx(theirs, rel=0, abs=1e-12)

    def test_every_kind_of_the_configuration_is_compared(self) -> None:
        from typing import get_args

        from lorakit.config.schema import TrainConfig

        assert set(self.KINDS) == set(get_args(TrainConfig.model_fields["lr_scheduler_type"].annotation))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_warm_up_as_long_as_the_run_only_rises(self, kind: str) -> None:
        rates = [learning_rate(t, kind=kind, peak=1.0, steps=4, warmup=4) for t in range(4)]
        assert rates == ([1.0] * 4 if kind == "constant" else [0, 0.25, 0.5, 0.75])

    @pytest.mark.parametrize(
        ("steps", "ratio", "count", "expected"),
        [(100, 0.1, None, 10), (101, 0.1, None, 11), (5, 0.0, None, 0), (5, 1.0, None, 5), (50, 0.5, 3, 3),
         (50, 0.5, 0, 0), (5, 0.0, 99, 5)],
    )  # fmt: skip
    def test_warmup_steps(self, steps: int, ratio: float, count: int | None, expected: int) -> None:
        assert warmup_steps(steps, ratio=ratio, count=count) == expected


class TestOrder:
    @pytest.mark.parametrize("rows", [1, 2, 7, 64])
    def test_every_epoch_is_another_permutation(self, rows: int) -> None:
        orders = [epoch_order(rows, seed=3, epoch=epoch) for epoch in range(5)]
        assert all(sorted(order) == list(range(rows)) for order in orders)
        assert len(set(orders)) == (5 if rows > 5 else len(set(orders)))
        assert orders == [epoch_order(rows, seed=3, epoch=epoch) for epoch in range(5)]

    def test_other_seeds_give_other_orders(self) -> None:
        assert len({epoch_order(64, seed, 0) for seed in range(20)}) == 20

    def test_neither_reads_nor_touches_the_global_generator(self) -> None:
        before = torch.random.get_rng_state()
        first = epoch_order(64, 1, 0)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(1)
        assert epoch_order(64, 1, 0) == first

    def test_the_last_update_of_an_epoch_is_what_is_left(self) -> None:
        got = list(updates([5] * 10, Grouping(size=2, accumulation=2), steps=6, seed=0))
        assert [[len(batch) for batch in update] for update in got] == [[2, 2], [2, 2], [2]] * 2
        for epoch in (0, 1):
            batches = itertools.chain(*got[3 * epoch : 3 * epoch + 3])
            assert tuple(itertools.chain(*batches)) == epoch_order(10, 0, epoch)

    def test_fewer_rows_than_an_update_takes(self) -> None:
        got = updates([5, 5], Grouping(size=4, accumulation=2), steps=3, seed=0)
        assert [[sorted(batch) for batch in update] for update in got] == [[[0, 1]]] * 3

    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
    def test_as_many_updates_as_asked_for(self, steps: int) -> None:
        assert len(list(updates([7] * 5, Grouping(size=1, accumulation=2), steps=steps, seed=0))) == steps

    @pytest.mark.parametrize(
        ("epochs", "max_steps", "expected"),
        [(1, None, 3), (3, None, 9), (0.5, None, 2), (0.01, None, 1), (1.5, None, 5), (3, 2, 2), (1, 100, 100)],
    )
    def test_total_steps(self, epochs: float, max_steps: int | None, expected: int) -> None:
        assert total_steps(3, epochs=epochs, max_steps=max_steps) == expected
