"""Plots of the peers' suite, for the first page and for the results pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .bars import Cell, chosen, ran

COLOURS = {
    "jax_flash": "#1f4e9c",
    "jax_flash, pages": "#7fa3d8",
    "cudnn": "#76b900",
    "flash-attn3-jax": "#c2571a",
    "jla": "#8e63b0",
    "fa4-jax": "#d4a72c",
    "tokamax": "#4aa5a0",
    "pallas": "#9a9a9a",
    "xla": "#d0d0d0",
}
LABELS = {"cudnn": "cuDNN (jax.nn)", "jla": "jax-linear-attention", "pallas": "Pallas"}
# Each of these is plotted with and without a causal mask.
PLOTTED = ("d64 s4096", "d64 s16384", "d128 s4096", "d128 s16384", "d256 s4096")
GROUPED = "64/8 heads d128 s16384 causal"
FONT = 9
Row = tuple[str, dict[str, float]]  # a cell's name, and each implementation's rate


def peer_rows(cells: list[Cell], pass_: str, names: Sequence[str] | None = None) -> list[Row]:
    """TFLOP/s by case. A peer that was timed in another cell of the case keeps its ratio to this library in that cell.

    Two cells of one case have differed by 16%, so rates of different cells cannot be compared.
    """
    rows: dict[str, dict[str, float]] = {}
    for cell in chosen(cells, "peer", **{"pass": pass_}):
        if not ran(cell, "jax_flash"):
            continue
        found = rows.setdefault(cell["case"], {})
        times = {name: cell["times"][name]["median"] for name in COLOURS if ran(cell, name)}
        own = found.get("jax_flash", cell["flop"] / times["jax_flash"] / 1e12)
        for name, time in times.items():
            found.setdefault(name, own * times["jax_flash"] / time)
    wanted = list(rows) if names is None else [name for name in names if name in rows]
    return [(name, rows[name]) for name in wanted]


def decode_rows(cells: list[Cell]) -> list[Row]:
    """GB/s of keys and values, with pages and Pallas at their faster page size."""
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
    """One bar per implementation that ran a row's call, without a gap for those that did not."""
    names = [name for name in COLOURS if any(name in found for _, found in rows)]
    drawn: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    ticks, place = [], 0.0
    for _, found in rows:
        there = [name for name in names if name in found]
        for name in there:
            drawn[name][0].append(place)
            drawn[name][1].append(found[name])
            place += 1
        ticks.append(place - (len(there) + 1) / 2)
        place += 0.8
    for name, (places, rates) in drawn.items():
        axes.barh(places, rates, 1.0, label=LABELS.get(name, name), color=COLOURS[name])
    axes.set_yticks(ticks, [name.replace(" heads ", " heads\n") for name, _ in rows], fontsize=FONT)
    axes.tick_params(axis="x", labelsize=FONT)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=FONT + 3)
    axes.set_xlabel(label, fontsize=FONT)
    axes.margins(y=0.01)


def panels(shown: list[tuple[str, str, list[Row]]], plt: Any) -> Any:
    """A panel for each list that has rows."""
    shown = [panel for panel in shown if panel[2]]
    if not shown:
        return None
    longest = max(sum(len(found) + 0.8 for _, found in rows) for *_, rows in shown)
    size = (4.4 * len(shown), max(2.5, 1.4 + 0.105 * longest))
    figure, every = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    drawn = {}
    for axes, (title, label, rows) in zip(every[0], shown, strict=True):
        bars(axes, rows, title, label)
        drawn.update({text: bar for bar, text in zip(*axes.get_legend_handles_labels(), strict=True)})
    labels = [LABELS.get(name, name) for name in COLOURS if LABELS.get(name, name) in drawn]
    handles = [drawn[label] for label in labels]
    columns = min(2 ** len(shown), len(labels))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=FONT + 1, frameon=False
    )
    return figure


def first_page(cells: list[Cell], plt: Any) -> Any:
    names = [f"{name}{causal}" for name in PLOTTED for causal in ("", " causal")] + [GROUPED]
    shown = [
        (pass_.capitalize(), "TFLOP/s of visible pairs", peer_rows(cells, pass_, names))
        for pass_ in ("forward", "backward")
    ]
    shown.append(("Decode, one token", "GB/s of keys and values", decode_rows(cells)))
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
