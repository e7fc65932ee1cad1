"""The plain run: the platform's cases, or some of them, on this library and on every peer that is installed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import flop, measure, peers
from .bars import Cell, chosen, peer_verdict
from .cases import Case
from .report import draw_rates, means, refusals
from .suite import Suite


@dataclass(frozen=True)
class Run:
    """The cases, implementations and bursts of a run; `products` are those of the matrix product, by dtype."""

    platform: str
    cases: Sequence[Case]
    names: Sequence[str]
    repeats: int
    seconds: float
    products: dict[str, Any] = field(default_factory=dict)

    def cells(self, pass_: str) -> Iterator[Cell]:
        """One pass of every case on every implementation."""
        for case in self.cases:
            try:
                calls, refused = peers.prepare({name: (name, case, pass_) for name in self.names})
            except NotImplementedError as error:  # this library was built without a kernel for the case
                calls, refused = {}, {name: {"refused": peers.why(error)} for name in self.names}
            cell = {"kind": "peer", "name": f"{case.name} {pass_}", "case": case.name, "pass": pass_}
            cell |= {"flop": flop.attention(case, pass_), "product": flop.matmul(self.platform)}
            yield cell | {"times": self.timed(calls) | refused | {"matmul": self.product(case.dtype)}}

    def timed(self, calls: measure.Calls) -> dict[str, Any]:
        return measure.in_turns(calls, self.repeats, self.seconds)

    def product(self, dtype: str) -> Any:
        """The time of the matrix product, measured once for each dtype."""
        if dtype not in self.products:
            self.products[dtype] = self.timed({"": measure.matmul_call(self.platform, dtype)})[""]
        return self.products[dtype]

    def figure(self, pass_: str, cells: list[Cell], plt: Any) -> Any:
        drawn = chosen(cells, "peer", **{"pass": pass_})
        return draw_rates(drawn, tuple(self.names), plt)


def suite_of(run: Run, passes: Sequence[str], command: Sequence[str]) -> Suite:
    """A section and a figure for each pass; no bars."""
    return Suite(
        "cases",
        run.platform,
        {pass_: functools.partial(run.cells, pass_) for pass_ in passes},
        lambda cells: [],
        peer_verdict,
        refusals,
        lambda cells: means(cells, run.names),
        {pass_: functools.partial(run.figure, pass_) for pass_ in passes},
        tuple(command),
    )
