"""Pairwise draws: few cases that still hold every pair of values of any two parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from random import Random
from typing import Any


def pairwise(*columns: Sequence[Any], seed: int = 0, tries: int = 50) -> list[tuple[Any, ...]]:
    """Draw rows so that every two values of any two columns meet in one row at least.

    Args:
        columns: the values of each parameter; two columns or more.
        seed: of the draw; one seed always gives the same rows.
        tries: random rows per step, of which the one that covers most new pairs is taken.

    Returns:
        Rows with one value per column. A few more than the product of the two longest columns.

    Example:
        @pytest.mark.parametrize("mode, groups, layout", pairwise([1, 2, 3], [1, 2], LAYOUTS))
    """
    random = Random(seed)
    pairs = {
        (i, a, j, b)
        for i, j in combinations(range(len(columns)), 2)
        for a, b in product(range(len(columns[i])), range(len(columns[j])))
    }

    def covers(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)} & pairs

    rows = []
    while pairs:
        i, a, j, b = min(pairs)  # one open pair is always covered, so that the loop ends
        candidates = [[random.randrange(len(column)) for column in columns] for _ in range(tries)]
        for row in candidates:
            row[i], row[j] = a, b
        best = max(candidates, key=lambda row: len(covers(row)))
        pairs -= covers(best)
        rows.append(tuple(column[k] for column, k in zip(columns, best, strict=True)))
    return rows
