"""Which rows come in which update: a pure function of the step and the seed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from lorakit.data.order import Grouping, Order, epoch_order, total_steps


def updates(lengths: Sequence[int], grouping: Grouping, steps: int, seed: int) -> list[list[list[int]]]:
    order = Order(lengths, grouping, seed)
    return [order.update(step) for step in range(1, steps + 1)]


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
