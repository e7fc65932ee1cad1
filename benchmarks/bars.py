"""Bars: figures of a run, each with its limit, and the arithmetic that all suites share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Cell = dict[str, Any]  # "kind", "name", "times" by implementation, and tags
Values = Sequence[tuple[float, str]]  # figures, each with the cell that it is from


@dataclass(frozen=True)
class Bar:
    """`value` has to be at least (or at most) `limit`; `where` names the cell that has this value."""

    name: str
    value: float
    at_least: bool
    limit: float
    where: str

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def least(name: str, values: Values, limit: float) -> Iterator[Bar]:
    """A bar for the least value; none if there are no values."""
    if values:
        value, where = min(values)
        yield Bar(name, value, True, limit, where)


def most(name: str, values: Values, limit: float) -> Iterator[Bar]:
    """A bar for the largest value."""
    if values:
        value, where = max(values)
        yield Bar(name, value, False, limit, where)


def mean(name: str, values: Values, limit: float) -> Iterator[Bar]:
    """A bar for the geometric mean of the values."""
    if values:
        where = f"geometric mean of {len(values)}"
        yield Bar(name, geometric_mean([value for value, _ in values]), True, limit, where)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def chosen(cells: list[Cell], kind: str, **tags: Any) -> list[Cell]:
    """The cells of a kind that have these tags."""
    return [c for c in cells if c["kind"] == kind and all(c[name] == value for name, value in tags.items())]


def ran(cell: Cell, name: str) -> bool:
    return "median" in cell["times"].get(name, {})


def ratio(cell: Cell, above: str, below: str) -> float:
    """The time of one implementation over that of another."""
    return float(cell["times"][above]["median"] / cell["times"][below]["median"])


def speedup(cell: Cell, peer: str) -> float:
    """A peer's time over this library's."""
    return ratio(cell, peer, "jax_flash")


def share_of_product(cell: Cell) -> float:
    """This library's FLOP/s as a share of a matrix product's. The product has `product` FLOP, and was timed in
    alternation with the call."""
    return float(cell["flop"] / cell["product"]) * ratio(cell, "matmul", "jax_flash")


def peer_verdict(cell: Cell) -> str:
    """This library's rate, its share of the matrix product's, and the others' times over its own."""
    if not ran(cell, "jax_flash"):
        return "–"
    rate = cell["flop"] / cell["times"]["jax_flash"]["median"]
    said = [f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"]
    if ran(cell, "matmul"):
        said.append(f"{share_of_product(cell):.2f} of the product")
    others = (name for name in cell["times"] if name not in ("jax_flash", "matmul") and ran(cell, name))
    return ", ".join([*said, *(f"× {name} {speedup(cell, name):.2f}" for name in others)])


def relative_cost(cell: Cell) -> float:
    """What an option costs: the time per FLOP of the cell's call with it ("this") over that without it ("plain")."""
    return ratio(cell, "this", "plain") * float(cell["flop"]["plain"] / cell["flop"]["this"])
