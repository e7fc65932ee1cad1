"""The CPU suite's report: each bar beside what was measured, all cells, JSON and plots."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .bars import Cell, cost, judge, rate_of_matmul, ratio

Sections = dict[str, dict[str, Any]]


def cells_of(sections: Sections) -> list[Cell]:
    return [cell for section in sections.values() for cell in section["cells"]]


def line(cell: Cell) -> str:
    """One cell while it runs: milliseconds, and the ratio that matters."""
    times = ", ".join(
        f"{name} {r['median'] * 1e3:.3f} ±{r['spread']:.0%}" if "median" in r else f"{name} –"
        for name, r in cell.get("times", {}).items()
    )
    return f"{cell['name']}: {times or '–'} | {verdict(cell)}"


def verdict(cell: Cell) -> str:
    match cell["kind"]:
        case "peer":
            known = [p for p in ("torch", "xla") if "median" in cell["times"][p]]
            shown = [f"× {p} {ratio(cell, p, 'jax_flash'):.2f}" for p in known]
            rate = cell["flop"] / cell["times"]["jax_flash"]["median"] / 1e9
            return ", ".join([*shown, f"{rate:,.0f} GFLOP/s", f"{rate_of_matmul(cell):.2f} of matmul"])
        case "shape":
            return f"{cell['what']} / plain {ratio(cell, 'this', 'plain'):.3f}"
        case "option":
            return f"cost {cost(cell):.2f}"
        case "scaling":
            return f"× {ratio(cell, '1 thread', '2 threads'):.2f}"
        case "decode":
            rate = cell["bytes"] / cell["times"]["read"]["median"] / 1e9
            return f"{ratio(cell, 'read', 'jax_flash'):.2f} of a read at {rate:.1f} GB/s"
        case "small":
            return f"× xla {ratio(cell, 'xla', 'jax_flash'):.2f}"
        case "training":
            return f"× xla {ratio(cell, 'xla', 'cpu'):.2f}"
    return f"{cell['bytes'] / 2**20:.1f} MB"


def bar_table(sections: Sections) -> str:
    lines = ["| bar | measured | asked | | decided by |", "|---|---|---|---|---|"]
    for bar in judge(cells_of(sections)):
        asked = f"{'≥' if bar.at_least else '≤'} {bar.limit:g}"
        met = "met" if bar.met else "**missed**"
        lines.append(f"| {bar.name} | {bar.value:.4g} | {asked} | {met} | {bar.where} |")
    return "\n".join(lines)


def markdown(sections: Sections) -> str:
    head = next(iter(sections.values()))["header"]
    lines = [f"# {head['device']}, {head['cores']} cores", ""]
    lines += [f"- commits: {', '.join(dict.fromkeys(str(s['header']['commit']) for s in sections.values()))}"]
    lines += [f"- versions: {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"]
    lines += ["- command: `python -m benchmarks --suite cpu`, or `--sections` with the name of one below"]
    matmul = [c["times"]["matmul"]["median"] for c in cells_of(sections) if c["kind"] == "peer"]
    if matmul:
        rates = [2 * 2048**3 / seconds / 1e9 for seconds in matmul]
        lines += [f"- XLA's float32 product beside the cells: {min(rates):.0f} to {max(rates):.0f} GFLOP/s"]
    lines += ["", "## Bars", "", bar_table(sections), "", "## Cells", ""]
    for name, section in sections.items():
        lines += [f"### {name}", "", "| cell | milliseconds | |", "|---|---|---|"]
        for cell in section["cells"]:
            what, _, rest = line(cell).partition(": ")
            times, _, result = rest.partition(" | ")
            lines.append(f"| {what} | {times} | {result} |")
        lines.append("")
    return "\n".join(lines)


def write(sections: Sections, folder: Path) -> None:
    """report.md, report.json, peers.png and bars.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps({"sections": sections}, indent=1) + "\n")
    text = markdown(sections)
    for name in _plots(cells_of(sections), folder):
        text += f"\n![{name}]({name}.png)\n"
    (folder / "report.md").write_text(text)


def _plots(cells: list[Cell], folder: Path) -> list[str]:
    try:
        import matplotlib
    except ImportError:
        print("benchmarks: matplotlib is not installed, no plots", file=sys.stderr)
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    for name, draw in (("peers", _draw_peers), ("bars", _draw_bars)):
        figure = draw(cells, plt)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            plt.close(figure)
            drawn.append(name)
    return drawn


def _draw_peers(cells: list[Cell], plt: Any) -> Any:
    """GFLOP/s of each implementation, cell by cell."""
    chosen = [c for c in cells if c["kind"] == "peer"]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(9, 1 + 0.42 * len(chosen)), layout="constrained")
    peers = ("jax_flash", "torch", "xla")
    for index, peer in enumerate(peers):
        rates = [c["flop"] / c["times"][peer].get("median", float("inf")) / 1e9 for c in chosen]
        axes.barh([row + index * 0.28 for row in range(len(chosen))], rates, 0.28, label=peer)
    axes.set_yticks([row + 0.28 for row in range(len(chosen))], [c["name"] for c in chosen], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GFLOP/s, visible pairs only")
    axes.legend()
    return figure


def _draw_bars(cells: list[Cell], plt: Any) -> Any:
    """How each bar is met: 1 is just met, more is better."""
    bars = judge(cells)
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
