"""What the CPU kernels have to reach, judged from a run's cells: each bar beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Cell = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """`value` has to be at least (or at most) `limit`; `where` names the cell that decided it."""

    name: str
    value: float
    at_least: bool
    limit: float
    where: str

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def judge(cells: list[Cell]) -> list[Bar]:
    """All bars whose cells are there."""
    return [*_peers(cells), *_matmul(cells), *_shapes(cells), *_options(cells), *_others(cells)]


def ratio(cell: Cell, above: str, below: str) -> float:
    return float(cell["times"][above]["median"] / cell["times"][below]["median"])


def _of(cells: list[Cell], kind: str, **tags: Any) -> list[Cell]:
    chosen = (c for c in cells if c["kind"] == kind)
    return [c for c in chosen if all(c[name] == value for name, value in tags.items())]


def _least(name: str, values: list[tuple[float, str]], limit: float) -> Iterator[Bar]:
    if values:
        yield Bar(name, *_split(min(values), True, limit))


def _most(name: str, values: list[tuple[float, str]], limit: float) -> Iterator[Bar]:
    if values:
        yield Bar(name, *_split(max(values), False, limit))


def _split(worst: tuple[float, str], at_least: bool, limit: float) -> tuple[float, bool, float, str]:
    return worst[0], at_least, limit, worst[1]


def _mean(values: list[tuple[float, str]]) -> list[tuple[float, str]]:
    if not values:
        return []
    mean = math.exp(sum(math.log(value) for value, _ in values) / len(values))
    return [(mean, f"geometric mean of {len(values)}")]


def _peers(cells: list[Cell]) -> Iterator[Bar]:
    limits = {("forward", "torch"): (3.5, 2.0), ("both", "torch"): (3.2, 2.0)}
    for pass_, text in (("forward", "forward"), ("both", "forward + backward")):
        for peer in ("torch", "xla"):
            ratios = [
                (ratio(c, peer, "jax_flash"), c["name"])
                for c in _of(cells, "peer", **{"pass": pass_})
                if "median" in c["times"].get(peer, {})
            ]
            mean, least = limits.get((pass_, peer), (7.0, 4.0))
            yield from _least(f"{text} × {peer}", _mean(ratios), mean)
            yield from _least(f"{text} × {peer}, each cell", ratios, least)


def rate_of_matmul(cell: Cell) -> float:
    """FLOP/s over that of XLA's float32 product of two 2048² matrices, timed beside it."""
    matmul = cell["times"]["matmul"]["median"]
    return float(cell["flop"] / cell["times"]["jax_flash"]["median"] / (2.0 * 2048**3 / matmul))


def _matmul(cells: list[Cell]) -> Iterator[Bar]:
    for dtype, limit in (("float32", 0.85), ("bfloat16", 1.5)):
        long = [
            (rate_of_matmul(c), c["name"])
            for c in _of(cells, "peer", dtype=dtype, **{"pass": "forward"})
            if c["rows"] >= 2048
        ]
        yield from _least(f"forward {dtype} / XLA's float32 matmul rate", long, limit)


def _shapes(cells: list[Cell]) -> Iterator[Bar]:
    """Ratios within a shape: causal, GQA, a narrow window, varlen."""
    limits = {"causal": 0.55, "GQA 8:1": 1.05, "window 256 at s 16,384": 0.05, "equal documents": 1.1}
    for what, limit in limits.items():
        values = [(ratio(c, "this", "plain"), c["name"]) for c in _of(cells, "shape", what=what)]
        yield from _most(f"{what} / plain", values, limit)


def cost(cell: Cell) -> float:
    """Time per FLOP over that of the plain call."""
    return ratio(cell, "this", "plain") * float(cell["flop"]["plain"] / cell["flop"]["this"])


def _options(cells: list[Cell]) -> Iterator[Bar]:
    for what in dict.fromkeys(c["what"] for c in _of(cells, "option")):
        limit = 1.6 if what in ("bias", "dropout") else 1.3
        values = [(cost(c), c["name"]) for c in _of(cells, "option", what=what)]
        yield from _most(f"{what}: cost for the same FLOP", values, limit)


def _others(cells: list[Cell]) -> Iterator[Bar]:
    scaling = [(ratio(c, "1 thread", "2 threads"), c["name"]) for c in _of(cells, "scaling")]
    yield from _least("1 to 3 heads, 1 to 2 threads", scaling, 1.8)
    for layout in ("contiguous", "paged"):
        reads = [
            (ratio(c, "read", "jax_flash"), c["name"])
            for c in _of(cells, "decode", layout=layout)
            if c["dtype"] in ("float32", "bfloat16")
        ]
        yield from _least(f"decode {layout} / streaming read", reads, 0.8)
    small = [(ratio(c, "xla", "jax_flash"), c["name"]) for c in _of(cells, "small")]
    yield from _least("small calls × xla", small, 1.0)
    memory = [(c["bytes"] / 2**20, c["name"]) for c in _of(cells, "memory")]
    yield from _most("extra memory, MB", memory, 64.0)
