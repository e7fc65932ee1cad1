"""Compares two checkouts of this repository in one process: times, and results bit by bit.

python -m benchmarks --compare ../before                  # all cells of this platform
python -m benchmarks --compare ../before --filter "backward|decode" --out out/compare

DIR is a checkout of another commit, whose jax_flash/ holds its own _core*.so (tools/build_inplace.sh there) and, for
a GPU, its own libjax_flash_cuda.so. Each cell is timed as measure.py says, and the results on the same arrays are
compared bit by bit. The ratio is the time before over the time after: below 1, this checkout is slower. A cell whose
ratio is below EACH is timed once more, longer, and the repeats of both times count together.

XLA's autotuning is off: in each compilation it may choose another kernel for delta = rowsum(dO ∘ O), whose sums then
differ in their last bits.

Cells of earlier runs stay in <out>/compare.json unless a cell of the same name runs again, so a comparison may be made
in several parts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash

from . import compare_cells, measure, other_checkout, report
from .bars import geometric_mean
from .compare_cells import Cell

MEAN, EACH = 0.995, 0.97  # the least geometric mean, and the least ratio of a cell
LONGER = 3  # a cell below EACH is repeated this many times more often
BURST = {"gpu": measure.BURST, "cpu": 0.05}
PAUSE = {"gpu": 0.0, "cpu": 0.01}  # seconds of rest, in which the other checkout's threads stop spinning


def run(checkout: Path, wanted: str, repeats: int, folder: Path) -> int:
    """Prints a line for each cell and the summary, and writes compare.json; returns 0 if nothing is slower or
    differs."""
    before = other_checkout.load(checkout)
    require_same_backends(before)
    cells = [c for c in compare_cells.of_platform(jax.default_backend()) if selected(c.name, wanted)]
    if not cells:
        sys.exit(f"python -m benchmarks: --filter: no cell's name holds {wanted!r}")
    path = folder / "compare.json"
    results = json.loads(path.read_text())["cells"] if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for cell in cells:
        results[cell.name] = compare(cell, {"before": before, "after": jax_flash}, repeats)
        print(line(cell.name, results[cell.name]), flush=True)
        written = {"header": header(checkout), "summary": summary(results), "cells": results}
        path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{len(cells)} cells in {time.monotonic() - start:.0f} s; {path}")
    print(describe(summary(results)))
    return 0 if summary(results)["met"] else 1


def turn_autotuning_off() -> None:
    """Must be called before JAX has a backend."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"


def selected(name: str, wanted: str) -> bool:
    return any(part in name for part in wanted.split("|"))


def require_same_backends(before: ModuleType) -> None:
    """Exits if the other checkout has no library for this platform."""
    name = {"cpu": "cpu", "gpu": "cuda"}[jax.default_backend()]
    for backend in before.backends():
        if backend.implementation == name and backend.problem:
            sys.exit(f"python -m benchmarks: --compare: {before.__file__}: {name} is {backend.problem}")


def compare(cell: Cell, packages: dict[str, ModuleType], repeats: int) -> dict[str, Any]:
    """Times and bits of one cell, or "error" if one of the checkouts cannot run it."""
    try:
        calls = {name: cell.prepare(package) for name, package in packages.items()}
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_and_run, calls.values()))
    except Exception as error:  # such as a kernel that was not built
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    result = {"bits": bits(cell, calls)}
    times = timed(calls, repeats)
    if ratio(times) < EACH:
        longer = timed(calls, LONGER * repeats)
        times = {name: [*times[name], *longer[name]] for name in times}
    summaries = {name: measure.summary([x / cell.calls for x in t]) for name, t in times.items()}
    return result | {"ratio": ratio(times), "times": summaries}


def compile_and_run(prepared: compare_cells.Prepared) -> Any:
    call, arguments = prepared
    return jax.block_until_ready(call(*arguments[0]))


def timed(calls: measure.Calls, repeats: int) -> dict[str, list[float]]:
    platform = jax.default_backend()
    return measure.interleaved(calls, repeats, BURST[platform], PAUSE[platform])


def ratio(times: dict[str, list[float]]) -> float:
    return measure.median(times["before"]) / measure.median(times["after"])


def bits(cell: Cell, calls: measure.Calls) -> str:
    """ "same" or "differ"; or why bits say nothing: "not promised", or "not repeatable before" if two runs of the
    checkout before differ too."""
    if not cell.repeatable:
        return "not promised"
    first, second = (call(*arguments[0]) for call, arguments in (calls["before"], calls["after"]))
    if same_bits(first, second):
        return "same"
    call, arguments = calls["before"]
    return "differ" if same_bits(first, call(*arguments[0])) else "not repeatable before"


def same_bits(x: Any, y: Any) -> bool:
    return all(map(_same_array, jax.tree.leaves(x), jax.tree.leaves(y)))


def _same_array(x: jax.Array, y: jax.Array) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    integer = f"uint{8 * x.dtype.itemsize}"
    return bool(jnp.array_equal(x.view(integer), y.view(integer)))


def line(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name}: {result['error']}"
    before, after = (result["times"][x] for x in ("before", "after"))
    times = f"{before['median'] * 1e3:.4f} → {after['median'] * 1e3:.4f} ms"
    spread = max(before["spread"], after["spread"])
    return f"{name}: {times} ±{spread:.1%}, ratio {result['ratio']:.3f}, bits {result['bits']}"


def summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The geometric mean, the worst cell, the cells that differ, and those that did not run."""
    ratios = {name: r["ratio"] for name, r in results.items() if "ratio" in r}
    worst = min(ratios, key=ratios.__getitem__, default=None)
    found = {
        "cells": len(ratios),
        "mean": geometric_mean(list(ratios.values())) if ratios else None,
        "worst": worst and [worst, ratios[worst]],
        "slower": [name for name, x in ratios.items() if x < EACH],
        "differ": [name for name, r in results.items() if r.get("bits") == "differ"],
        "errors": [name for name, r in results.items() if "error" in r],
    }
    met = bool(ratios) and found["mean"] >= MEAN and not (found["slower"] or found["differ"])
    return found | {"met": met}


def describe(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "no cell ran"
    lines = [
        f"geometric mean {found['mean']:.4f} of {found['cells']} cells (target ≥ {MEAN}), "
        f"worst {found['worst'][1]:.3f}: {found['worst'][0]} (target ≥ {EACH})"
    ]
    for what in ("slower", "differ", "errors"):
        if found[what]:
            lines.append(f"{what}: {', '.join(found[what])}")
    return "\n".join([*lines, "met" if found["met"] else "NOT met"])


def header(checkout: Path) -> dict[str, Any]:
    commits = {"before": report.commit(checkout), "after": report.commit(Path(__file__).parent)}
    return report.header(["--compare", str(checkout)]) | {"commits": commits}
