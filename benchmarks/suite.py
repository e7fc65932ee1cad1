"""A suite: sections of cells, the limits of its figures, and what its report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .bars import Bar, Cell

Sections = dict[str, dict[str, Any]]  # name → header, seconds and cells
Figure = Callable[[list[Cell], Any], Any]  # draws the cells with matplotlib.pyplot; None where there are none


@dataclass(frozen=True)
class Suite:
    """A suite of one platform.

    Attributes:
      judge: makes the bars of the cells that were measured.
      verdict: the figure of a cell that matters, in words.
      rates: the rates of the device itself, and the peers that did not run.
      tables: tables of the report between the one of bars and those of cells.
      command: the arguments after `python -m benchmarks`.
    """

    name: str
    platform: str
    sections: Mapping[str, Callable[[], Iterator[Cell]]]
    judge: Callable[[list[Cell]], list[Bar]]
    verdict: Callable[[Cell], str]
    rates: Callable[[list[Cell]], list[str]]
    tables: Callable[[list[Cell]], list[str]] = lambda cells: []
    figures: Mapping[str, Figure] = field(default_factory=dict)
    command: tuple[str, ...] = ()


def cells_of(sections: Sections) -> list[Cell]:
    return [cell for section in sections.values() for cell in section["cells"]]
