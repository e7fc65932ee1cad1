"""Plots of the peers' suite: the first page's, and those of the results pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bars import Cell, chosen, ran

COLOURS = {
    "jax_flash": "#1f4e9c",
    "cudnn": "#76b900",
    "flash-attn3-jax": "#c2571a",
    "jla": "#8e63b0",
    "fa4-jax": "#d4a72c",
    "tokamax": "#4aa5a0",
    "pallas": "#9a9a9a",
    "xla": "#d0d0d0",
}
LABELS = {"cudnn": "cuDNN (jax.nn)", "jla": "jax-linear-attention", "pallas": "Pallas"}
PLOTTED = (
    "d64 s4096",
    "d64 s16384",
    "d128 s4096",
    "d128 s16384",
    "d256 s4096",
)  # and each under a causal mask
GROUPED = "64/8 heads d128 s16384 causal"
DECODED = 6  # shapes of the first page
Row = tuple[str, dict[str, float]]  # a cell's name, and each implementation's rate


def peer_rows(cells: list[Cell], pass_: str, names: Sequence[str] | None = None) -> list[Row]:
    """TFLOP/s by case, a peer's from whichever cell of the run it was timed in."""
    rows: dict[str, dict[str, float]] = {}
    for cell in chosen(cells, "peer", **{"pass": pass_}):
        found = rows.setdefault(cell["case"], {})
        for name in COLOURS:
            if ran(cell, name) and name not in found:
                found[name] = cell["flop"] / cell["times"][name]["median"] / 1e12
    wanted = list(rows) if names is None else [name for name in names if name in rows]
    return [(name, rows[name]) for name in wanted if "jax_flash" in rows[name]]


def decode_rows(cells: list[Cell]) -> list[Row]:
    """GB/s of keys and values: pages and Pallas at their better page size."""
    rows = []
    for cell in chosen(cells, "bandwidth", of="long"):
        found = {}
        for label, start in (("jax_flash", "contiguous"), ("cudnn", "cudnn")):
            if ran(cell, start):
                found[label] = cell["bytes_read"][start] / cell["times"][start]["median"] / 1e9
        for label, start in (("jax_flash, pages", "pages of"), ("pallas", "pallas")):
            timed = [
                t["median"] for name, t in cell["times"].items() if name.startswith(start) and "median" in t
            ]
            if timed:
                found[label] = next(iter(cell["bytes_read"].values())) / min(timed) / 1e9
        if found:
            rows.append((cell["name"].removeprefix("decode "), found))
    return rows


def bars(axes: Any, rows: list[Row], title: str, label: str) -> None:
    every = {name: None for _, found in rows for name in found}
    names = [name for name in ("jax_flash", "jax_flash, pages", *COLOURS) if name in every]
    names = list(dict.fromkeys(names))
    height = 0.84 / max(len(names), 1)
    for index, name in enumerate(names):
        rates = [found.get(name, 0.0) for _, found in rows]
        colour = COLOURS.get(name, "#7fa3d8")
        places = [row + index * height for row in range(len(rows))]
        axes.barh(places, rates, height, label=LABELS.get(name, name), color=colour)
    axes.set_yticks([row + 0.36 for row in range(len(rows))], [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(label, fontsize=8)
    axes.margins(y=0.01)


def panels(shown: list[tuple[str, str, list[Row]]], plt: Any) -> Any:
    """One panel for each list of rows that has any."""
    shown = [panel for panel in shown if panel[2]]
    if not shown:
        return None
    longest = max(sum(len(found) + 1 for _, found in rows) for *_, rows in shown)
    size = (4.4 * len(shown), max(2.5, 1.2 + 0.11 * longest))
    figure, every = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    for axes, (title, label, rows) in zip(every[0], shown, strict=True):
        bars(axes, rows, title, label)
    drawn = {
        label: bar for axes in every[0] for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        drawn.values(), drawn.keys(), loc="outside lower center", ncols=8, fontsize=7, frameon=False
    )
    return figure


def first_page(cells: list[Cell], plt: Any) -> Any:
    names = [f"{name}{causal}" for name in PLOTTED for causal in ("", " causal")] + [GROUPED]
    shown = [
        (pass_.capitalize(), "TFLOP/s of visible pairs", peer_rows(cells, pass_, names))
        for pass_ in ("forward", "backward")
    ]
    shown.append(("Decode, one token", "GB/s of keys and values", decode_rows(cells)[:DECODED]))
    return panels(shown, plt)


def training(cells: list[Cell], plt: Any) -> Any:
    every = chosen(cells, "peer") + [
        c | {"kind": "peer", "case": c["name"]} for c in chosen(cells, "documents")
    ]
    shown = [
        (pass_.capitalize(), "TFLOP/s of visible pairs", peer_rows(every, pass_))
        for pass_ in ("backward", "forward")
    ]
    return panels(shown, plt)


def decode(cells: list[Cell], plt: Any) -> Any:
    return panels([("Decode, one token", "GB/s of keys and values", decode_rows(cells))], plt)
