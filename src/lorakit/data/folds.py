"""k-fold cross validation: every row is held out exactly once, in a fold that the seed alone decides."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from lorakit.errors import UsageError


def folds(
    n: int, k: int, seed: int, labels: Sequence[Hashable] | None = None
) -> list[tuple[list[int], list[int]]]:
    """The rows to train on and the rows held out, of each of ``k`` folds, in ascending order.

    The held-out parts differ by at most one row in size. With ``labels`` the same holds for each label
    (stratified folds), so a label of fewer than ``k`` rows is missing from some of them.

    Args:
        n: number of rows.
        k: number of folds, 2 to ``n``.
        seed: of the draw.
        labels: one of each row, such as its class or the data set that it comes from.

    Raises:
        UsageError: there are fewer than two folds, more folds than rows, or not one label for each row.
    """
    if not 2 <= k <= n:
        raise UsageError(
            f"{n} rows cannot be divided into {k} folds",
            remedy="choose at least 2 folds, and no more than there are rows",
        )
    if labels is not None and len(labels) != n:
        raise UsageError(f"{len(labels)} labels for {n} rows", remedy="give one label for each row")
    shuffled = random.Random(seed).sample(range(n), n)
    if labels is not None:
        place = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        shuffled.sort(key=lambda row: place[labels[row]])
    # Dealt like cards, one label after the other: in each run of neighbours every fold gets its share.
    fold_of = {row: number % k for number, row in enumerate(shuffled)}
    return [
        (
            [row for row in range(n) if fold_of[row] != fold],
            [row for row in range(n) if fold_of[row] == fold],
        )
        for fold in range(k)
    ]
