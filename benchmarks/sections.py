"""A suite: sections of cells, measured one after the other into one report.

The sections of a run replace those of the same name in <out>/report.json and leave the others. That file is written
after every cell, so that a run which is stopped keeps what it measured; the report follows at the end, from all
sections.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from . import measure, report
from .bars import Bar, Cell
from .measure import Calls

PAUSE = 0.01  # seconds, in which the threads of a CPU library called before stop spinning
SETTLE = 0.001  # seconds of untimed calls after it
BURST, TURNS_AT_LEAST, TURNS_AT_MOST = 0.05, 3, 15  # on a CPU

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Suite:
    """What is measured, what it has to reach, and how it is shown."""

    name: str
    platform: str
    sections: dict[str, Callable[[], Iterator[Cell]]]
    judge: Callable[[list[Cell]], list[Bar]]
    verdict: Callable[[Cell], str]  # the figure of a cell that matters
    rates: Callable[[list[Cell]], list[str]]  # what the device did by itself in the cells' turns
    tables: Callable[[list[Cell]], list[str]] = lambda cells: []  # between those of bars and of cells
    figures: Mapping[str, Callable[[list[Cell], Any], Any]] = field(default_factory=dict)


def time_calls(calls: Calls, budget: float = 3.0, settle: float = SETTLE) -> dict[str, Any]:
    """Summaries of calls that take turns: on a GPU as measure.py says; on a CPU within about `budget` seconds.

    A CPU's calls may last seconds, and are not bound by power: few of them are left untimed (`settle`, seconds), and
    a rest goes before each burst.
    """
    if jax.default_backend() == "gpu":
        return measure.in_turns(calls)
    once = sum(min(measure.interleaved({name: call}, 1, 0.0, settle=0)[name]) for name, call in calls.items())
    burst = min(BURST, budget / TURNS_AT_MOST / len(calls))
    turn = max(once, settle * len(calls)) + max(once, burst * len(calls))
    turns = max(TURNS_AT_LEAST, min(TURNS_AT_MOST, int(budget / turn)))
    times = measure.interleaved(calls, turns, burst, PAUSE, settle)
    return {name: measure.summary(t) for name, t in times.items()}


def cells_of(sections: Sections) -> list[Cell]:
    return [cell for section in sections.values() for cell in section["cells"]]


def line(suite: Suite, cell: Cell) -> str:
    """One cell while it runs: milliseconds, and the ratio that matters."""
    times = ", ".join(
        f"{name} {r['median'] * 1e3:.3f} ±{r['spread']:.0%}" if "median" in r else f"{name} –"
        for name, r in cell.get("times", {}).items()
    )
    return f"{cell['name']}: {times or '–'} | {suite.verdict(cell)}"


def bar_table(suite: Suite, sections: Sections) -> str:
    lines = ["| bar | measured | asked | | decided by |", "|---|---|---|---|---|"]
    for bar in suite.judge(cells_of(sections)):
        asked = f"{'≥' if bar.at_least else '≤'} {bar.limit:g}"
        met = "met" if bar.met else "**missed**"
        lines.append(f"| {bar.name} | {bar.value:.4g} | {asked} | {met} | {bar.where} |")
    return "\n".join(lines)


def markdown(suite: Suite, sections: Sections) -> str:
    head = next(iter(sections.values()))["header"]
    lines = [f"# {head['device']}, {head['cores']} cores", ""]
    lines += [f"- commits: {', '.join(dict.fromkeys(str(s['header']['commit']) for s in sections.values()))}"]
    if head["driver"]:
        lines += [f"- driver {head['driver']}"]
    lines += [f"- versions: {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"]
    lines += [f"- command: `python -m benchmarks --suite {suite.name}`, or with `--sections` and names below"]
    lines += [f"- {rate}" for rate in suite.rates(cells_of(sections))]
    lines += ["", "## Bars", "", bar_table(suite, sections), "", *suite.tables(cells_of(sections))]
    lines += ["## Cells", ""]
    for name, section in sections.items():
        lines += [f"### {name}", "", "| cell | milliseconds | |", "|---|---|---|"]
        for cell in section["cells"]:
            what, _, rest = line(suite, cell).partition(": ")
            times, _, result = rest.partition(" | ")
            lines.append(f"| {what} | {times} | {result} |")
        lines.append("")
    return "\n".join(lines)


def write(suite: Suite, sections: Sections, folder: Path) -> None:
    """report.md, report.json and the figures."""
    save(sections, folder)
    text = markdown(suite, sections)
    for name in _plots(suite, cells_of(sections), folder):
        text += f"\n![{name}]({name}.png)\n"
    (folder / "report.md").write_text(text)


def _plots(suite: Suite, cells: list[Cell], folder: Path) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        print("benchmarks: matplotlib is not installed, no plots", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    figures = {**suite.figures, "bars": lambda cells, plt: draw_bars(suite, cells, plt)}
    for name, draw in figures.items():
        figure = draw(cells, plt)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            plt.close(figure)
            drawn.append(name)
    return drawn


def draw_rates(cells: list[Cell], names: tuple[str, ...], plt: Any, unit: float, label: str) -> Any:
    """FLOP/s of each implementation, cell by cell."""
    if not cells:
        return None
    figure, axes = plt.subplots(figsize=(9, 1 + 0.14 * len(names) * len(cells)), layout="constrained")
    height = 0.84 / len(names)
    for index, name in enumerate(names):
        rates = [c["flop"] / c["times"].get(name, {}).get("median", float("inf")) / unit for c in cells]
        axes.barh([row + index * height for row in range(len(cells))], rates, height, label=name)
    axes.set_yticks([row + 0.28 for row in range(len(cells))], [c["name"] for c in cells], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend()
    return figure


def draw_bars(suite: Suite, cells: list[Cell], plt: Any) -> Any:
    """How each bar is met: 1 is just met, more is better."""
    bars = [b for b in suite.judge(cells) if b.value > 0 and b.limit > 0]  # a ratio to nothing has no bar
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(9, 1 + 0.3 * len(bars)), layout="constrained")
    margins = [b.value / b.limit if b.at_least else b.limit / b.value for b in bars]
    colours = ["tab:green" if b.met else "tab:red" for b in bars]
    axes.barh(range(len(bars)), margins, color=colours)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(bars)), [b.name for b in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("measured over asked (right of 1: met)")
    return figure


def run(suite: Suite, chosen: list[str], folder: Path, limit: float | None = None) -> int:
    """Measures the sections, merges them into the folder's report and prints it.

    After `limit` seconds no further cell is begun; the sections that are left out then are named.
    """
    start, sections = time.monotonic(), _read(folder)
    for number, name in enumerate(chosen):
        late = _measure(suite, name, sections, folder, None if limit is None else start + limit)
        if late:
            left = ", ".join(chosen[number:])
            print(f"{limit:.0f} s are over; not measured, or in part: {left}", file=sys.stderr, flush=True)
            break
    return report_only(suite, folder)


def report_only(suite: Suite, folder: Path) -> int:
    """Writes the report of what was measured, and prints its bars."""
    sections = _in_order(suite, _read(folder))
    if not sections:
        sys.exit(f"python -m benchmarks: {folder} has no cell")
    write(suite, sections, folder)
    print(bar_table(suite, sections))
    return 0


def _read(folder: Path) -> Sections:
    path = folder / "report.json"
    return json.loads(path.read_text())["sections"] if path.exists() else {}


def _in_order(suite: Suite, sections: Sections) -> Sections:
    return {name: sections[name] for name in suite.sections if sections.get(name, {}).get("cells")}


def _measure(suite: Suite, name: str, sections: Sections, folder: Path, deadline: float | None) -> bool:
    """Measures one section, cell by cell; whether the deadline came before its end."""
    start, cells = time.monotonic(), []
    header = report.header(["--suite", suite.name, "--sections", name])
    found = suite.sections[name]()
    while deadline is None or time.monotonic() < deadline:
        cell = next(found, None)
        seconds = time.monotonic() - start
        if cell is None:
            print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            return False
        cells.append(cell)
        print(line(suite, cell), file=sys.stderr, flush=True)
        sections[name] = {"header": header, "seconds": seconds, "cells": cells}
        save(sections, folder)
    return True


def save(sections: Sections, folder: Path) -> None:
    """report.json, whole at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "report.json.part"
    part.write_text(json.dumps({"sections": sections}, indent=1) + "\n")
    part.replace(folder / "report.json")
