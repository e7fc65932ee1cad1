"""The report of a run as Markdown, JSON and plots: its machine and versions, bars, tables and cells."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import jax_flash

from .bars import Cell, chosen, geometric_mean, ran, speedup
from .suite import Sections, Suite, cells_of

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "nvidia-cudnn-cu13",
    "tokamax",
    "fa4-jax",
    "flash-attn3-jax",
    "jax-linear-attention",
    "torch",
)


def header(arguments: Sequence[str]) -> dict[str, Any]:
    """Device, versions, commit and command: a reader needs them to judge the run, or to repeat it."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version(), "jax_flash": jax_flash.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "driver": _driver() if device.platform == "gpu" else None,
        "versions": versions,
        "commit": commit(Path(__file__).parent),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
    }


@functools.cache
def commit(folder: Path) -> str | None:
    """The commit of a checkout; None if the folder is in none."""
    return _output("git", "-C", str(folder), "rev-parse", "--short", "HEAD")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


@functools.cache
def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


# --- a suite's report -------------------------------------------------------------------------------------------------


def line(suite: Suite, cell: Cell) -> str:
    """One cell while it runs: milliseconds, and the figure that matters."""
    times = ", ".join(
        f"{name} {r['median'] * 1e3:.3f} ±{r['spread']:.0%}" if "median" in r else f"{name} –"
        for name, r in cell.get("times", {}).items()
    )
    return f"{cell['name']}: {times or '–'} | {suite.verdict(cell)}"


def bar_table(suite: Suite, sections: Sections) -> str:
    bars = suite.judge(cells_of(sections))
    if not bars:
        return ""
    lines = ["| bar | measured | asked | | decided by |", "|---|---|---|---|---|"]
    for bar in bars:
        asked = f"{'≥' if bar.at_least else '≤'} {bar.limit:g}"
        met = "met" if bar.met else "**missed**"
        lines.append(f"| {bar.name} | {bar.value:.4g} | {asked} | {met} | {bar.where} |")
    return "\n".join(lines)


def means(cells: list[Cell], names: Sequence[str]) -> list[str]:
    """A table of geometric means: each peer's time over this library's, by pass."""
    there = [name for name in names if name != "jax_flash" and any(ran(c, name) for c in cells)]
    lines = ["## Speed over each peer, geometric means", "", "| pass | " + " | ".join(there) + " |"]
    lines.append("|---" * (len(there) + 1) + "|")
    peer_cells = [c for c in chosen(cells, "peer") if ran(c, "jax_flash")]
    for pass_ in dict.fromkeys(c["pass"] for c in peer_cells):
        shown = []
        for name in there:
            values = [speedup(c, name) for c in peer_cells if c["pass"] == pass_ and ran(c, name)]
            shown.append(f"{geometric_mean(values):.2f} ({len(values)})" if values else "–")
        lines.append(f"| {pass_} | {' | '.join(shown)} |")
    return [*lines, ""] if there else []


def refusals(cells: list[Cell]) -> list[str]:
    """The implementations that did not run some cells, each with its reasons."""
    found = {
        (name, t["refused"]) for c in cells for name, t in c.get("times", {}).items() if not ran(c, name)
    }
    return [f"{name} did not run some cells: {reason}" for name, reason in sorted(found)]


def markdown(suite: Suite, sections: Sections) -> str:
    head = next(iter(sections.values()))["header"]
    lines = [f"# {head['device']}, {head['cores']} cores", ""]
    lines += [f"- commits: {', '.join(dict.fromkeys(str(s['header']['commit']) for s in sections.values()))}"]
    if head["driver"]:
        lines += [f"- driver {head['driver']}"]
    lines += [f"- versions: {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"]
    lines += [f"- command: `{shlex.join(['python', '-m', 'benchmarks', *suite.command])}`"]
    lines += [f"- {rate}" for rate in suite.rates(cells_of(sections))]
    if table := bar_table(suite, sections):
        lines += ["", "## Bars", "", table]
    lines += ["", *suite.tables(cells_of(sections)), "## Cells", ""]
    for name, section in sections.items():
        lines += [f"### {name}", "", "| cell | milliseconds | |", "|---|---|---|"]
        for cell in section["cells"]:
            what, _, rest = line(suite, cell).partition(": ")
            times, _, result = rest.partition(" | ")
            lines.append(f"| {what} | {times} | {result} |")
        lines.append("")
    return "\n".join(lines)


def save(sections: Sections, folder: Path) -> None:
    """Writes report.json, which is whole at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "report.json.part"
    part.write_text(json.dumps({"sections": sections}, indent=1) + "\n")
    part.replace(folder / "report.json")


def write(suite: Suite, sections: Sections, folder: Path) -> None:
    """Writes report.md, report.json and the figures."""
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


def draw_rates(cells: list[Cell], names: Sequence[str], plt: Any) -> Any:
    """GFLOP/s of each implementation, cell by cell."""
    if not cells:
        return None
    figure, axes = plt.subplots(figsize=(9, 1 + 0.14 * len(names) * len(cells)), layout="constrained")
    height = 0.84 / len(names)
    for index, name in enumerate(names):
        rates = [c["flop"] / c["times"].get(name, {}).get("median", float("inf")) / 1e9 for c in cells]
        axes.barh([row + index * height for row in range(len(cells))], rates, height, label=name)
    axes.set_yticks([row + 0.28 for row in range(len(cells))], [c["name"] for c in cells], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GFLOP/s, visible pairs only")
    axes.legend()
    return figure


def draw_bars(suite: Suite, cells: list[Cell], plt: Any) -> Any:
    """How each bar is met: 1 is just met, more is better."""
    bars = [b for b in suite.judge(cells) if b.value > 0 and b.limit > 0]  # the scale is logarithmic
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
