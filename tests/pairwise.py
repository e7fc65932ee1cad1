"""Pairwise (all-pairs) testing: few combinations that cover every pair of values of every two options."""

from __future__ import annotations

from itertools import combinations
from random import Random
from typing import Any

Row = dict[str, int]  # the index of each option's value


def pairwise(factors: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Greedy: each row starts from an uncovered pair and takes the values that cover the most new pairs."""
    rng = Random(seed)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def new(row: Row) -> int:
        return len(_pairs(names, row) & missing)

    rows = []
    while missing:
        a, i, b, j = min(missing)
        row = {a: i, b: j}
        for name in rng.sample(names, len(names)):
            if name not in row:
                values = rng.sample(range(len(factors[name])), len(factors[name]))
                row[name] = max(values, key=lambda value, name=name, row=row: new(row | {name: value}))
        missing -= _pairs(names, row)
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _pairs(names: list[str], row: Row) -> set[tuple[str, int, str, int]]:
    return {(a, row[a], b, row[b]) for a, b in combinations(names, 2) if a in row and b in row}
