"""How a report shows the cells of the CPU suite."""

from __future__ import annotations

from typing import Any

from . import flop
from .bars import Cell, chosen, ran, ratio, relative_cost, speedup
from .bars_cpu import rate_of_matmul
from .sections import draw_rates


def verdict(cell: Cell) -> str:
    match cell["kind"]:
        case "peer":
            shown = [f"× {p} {speedup(cell, p):.2f}" for p in ("torch", "xla") if ran(cell, p)]
            rate = cell["flop"] / cell["times"]["jax_flash"]["median"] / 1e9
            return ", ".join([*shown, f"{rate:,.0f} GFLOP/s", f"{rate_of_matmul(cell):.2f} of matmul"])
        case "shape":
            return f"{cell['what']} / plain {ratio(cell, 'this', 'plain'):.3f}"
        case "option":
            return f"cost {relative_cost(cell):.2f}"
        case "scaling":
            return f"× {ratio(cell, '1 thread', '2 threads'):.2f}"
        case "decode":
            rate = cell["bytes"] / cell["times"]["read"]["median"] / 1e9
            return f"{ratio(cell, 'read', 'jax_flash'):.2f} of a read at {rate:.1f} GB/s"
        case "tangent":
            over_forward = ratio(cell, "jax_flash", "forward")
            return f"{over_forward:.2f} of the forward, × xla {speedup(cell, 'xla'):.2f}"
        case "small":
            return f"× xla {speedup(cell, 'xla'):.2f}"
        case "training":
            return f"× xla {ratio(cell, 'xla', 'cpu'):.2f}"
    return f"{cell['bytes'] / 2**20:.1f} MB"


def rates(cells: list[Cell]) -> list[str]:
    matmul = [flop.matmul("cpu") / c["times"]["matmul"]["median"] / 1e9 for c in chosen(cells, "peer")]
    if not matmul:
        return []
    return [f"XLA's float32 product in the cells' turns: {min(matmul):.0f} to {max(matmul):.0f} GFLOP/s"]


def _peers(cells: list[Cell], plt: Any) -> Any:
    return draw_rates(
        chosen(cells, "peer"), ("jax_flash", "torch", "xla"), plt, 1e9, "GFLOP/s, visible pairs only"
    )


FIGURES = {"peers": _peers}
