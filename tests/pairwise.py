"""Pairwise draws of cases, and loops over cases inside one test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import Signature, signature
from itertools import combinations, product
from random import Random
from typing import Any

import torch


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


def loop_over(names: str | Sequence[str], cases: Iterable[Any]) -> Callable[..., Any]:
    """Run a test once for every case, as one test. Takes the arguments of pytest's parametrize.

    Each case starts from seed 0. An error names its case.
    """
    names = names.replace(",", " ").split() if isinstance(names, str) else names

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(test)
        def run(**fixtures: Any) -> None:
            for case in cases:
                values = dict(zip(names, case if len(names) > 1 else (case,), strict=True))
                torch.manual_seed(0)
                try:
                    test(**fixtures, **values)
                except Exception as error:
                    raise AssertionError(f"in the case {values}: {error}") from error

        kept = [p for name, p in signature(test).parameters.items() if name not in names]
        run.__signature__ = Signature(kept)  # type: ignore[attr-defined]
        return run

    return decorate
