"""Runs a suite: its sections, measured one after the other into one report.

The sections of a run replace those of the same name in <out>/report.json and keep the others. That file is written
after every cell, so that a run which is stopped keeps its cells; the report is made at the end, from all sections.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import report
from .suite import Sections, Suite


def run(suite: Suite, chosen: Sequence[str], folder: Path, limit: float | None = None) -> int:
    """Measures the sections, merges them into the folder's report and prints it.

    After `limit` seconds no further cell begins, and the sections that were not measured are named.
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
    """Writes the report of the cells that were measured, and prints its bars."""
    sections = _in_order(suite, _read(folder))
    if not sections:
        sys.exit(f"python -m benchmarks: {folder} has no cell")
    report.write(suite, sections, folder)
    print(report.bar_table(suite, sections))
    return 0


def _read(folder: Path) -> Sections:
    path = folder / "report.json"
    return json.loads(path.read_text()).get("sections", {}) if path.exists() else {}


def _in_order(suite: Suite, sections: Sections) -> Sections:
    return {name: sections[name] for name in suite.sections if sections.get(name, {}).get("cells")}


def _measure(suite: Suite, name: str, sections: Sections, folder: Path, deadline: float | None) -> bool:
    """Measures one section, cell by cell; returns whether the deadline came before its end."""
    start, cells = time.monotonic(), []
    header = report.header(suite.command)
    found = suite.sections[name]()
    while deadline is None or time.monotonic() < deadline:
        cell = next(found, None)
        seconds = time.monotonic() - start
        if cell is None:
            print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
            return False
        cells.append(cell)
        print(report.line(suite, cell), file=sys.stderr, flush=True)
        sections[name] = {"header": header, "seconds": seconds, "cells": cells}
        report.save(sections, folder)
    return True
