"""The peers' suite: training, decode and whole steps against every JAX peer, in one run within a time limit.

python -m benchmarks --suite peers --limit 270 --out out/peers       # the most important first
python -m benchmarks --suite peers --sections "backward,decode"      # these, into the report that is there
python -m benchmarks --suite peers --report-only --out out/peers     # the report of a run that was stopped

With XLA_FLAGS=--xla_gpu_autotune_level=0 programs compile several times faster; the custom calls and kernels that are
compared here are the same, and the products of whole steps are still tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import (
    bars_peers,
    flop,
    host_time,
    measure,
    peer_attention,
    peer_decode,
    peer_figures,
    step_serving,
    step_training,
)
from .bars import Cell, chosen
from .peers import PEERS, why
from .report import means, refusals
from .suite import Figure, Suite


def device_cells() -> Iterator[Cell]:
    """The rates of the device itself: a matrix product and a copy."""
    product = measure.matmul_call("gpu", "bfloat16")
    copy, arguments, size = measure.copy_call()
    times = peer_attention.timed({"matmul": product, "copy": (copy, arguments)})
    yield {"kind": "device", "name": "device", "times": times, "flop": flop.matmul("gpu"), "copied": size}


def kept(make: Callable[[], Iterator[Cell]], name: str) -> Callable[[], Iterator[Cell]]:
    """The cells of a section; an error is a cell too, so that the sections after it run."""

    def cells() -> Iterator[Cell]:
        try:
            yield from make()
        except Exception as error:  # an error of a peer, or of a call that this library rejects
            yield {"kind": "failed", "name": name, "error": why(error), "times": {}}

    return cells


_ALL: dict[str, Callable[[], Iterator[Cell]]] = {
    "device": device_cells,
    **peer_attention.SECTIONS,
    **peer_decode.SECTIONS,
    **host_time.SECTIONS,
    **step_training.SECTIONS,
    **step_serving.SECTIONS,
}
# The most important first, because a run may end at its limit.
ORDER = (
    "device",
    "backward",
    "decode",
    "training step",
    "windows",
    "one sequence",
    "kinds of decode",
    "tokens",
    "documents",
    "options",
    "serving step",
    "forward",
    "latent",
    "latent decode",
    "short",
    "deterministic",
    "pairs",
    "options d256",
    "short forward",
    "options forward",
    "mixed",
    "append",
    "float32",
    "head dims",
    "bias and mask",
    "gpt-oss step",
    "host",
    "other peers",
    "fa4-jax",
    "decode, flash-attn3-jax",
    "prefill",
    "settled backward",
    "settled forward",
)
SECTIONS = {name: kept(_ALL[name], name) for name in ORDER}


def rates(cells: list[Cell]) -> list[str]:
    """The rates of the device itself, and the peers that did not run, with their reasons."""
    lines = []
    for cell in chosen(cells, "device"):
        times = {name: t["median"] for name, t in cell["times"].items()}
        lines.append(f"8192³ product: {cell['flop'] / times['matmul'] / 1e12:.0f} TFLOP/s")
        lines.append(f"copy, read and written: {cell['copied'] / times['copy'] / 1e9:.0f} GB/s")
    return lines + refusals(cells)


def tables(cells: list[Cell]) -> list[str]:
    return means(cells, tuple(PEERS))


def verdict(cell: Cell) -> str:
    if cell["kind"] == "device":
        return "; ".join(rates([cell]))
    return bars_peers.verdict(cell)


FIGURES: dict[str, Figure] = {
    "peers": peer_figures.first_page,
    "training": peer_figures.training,
    "decode": peer_figures.decode,
}
SUITE = Suite(
    "peers",
    "gpu",
    SECTIONS,
    bars_peers.judge,
    verdict,
    rates,
    tables,
    FIGURES,
    command=("--suite", "peers"),
)
