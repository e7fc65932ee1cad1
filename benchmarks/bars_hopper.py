"""What the sm_90a forward has to reach on one H200, judged from a run's cells."""

from __future__ import annotations

import math
from collections.abc import Iterator

from . import small_cuda
from .bars import Bar, Cell
from .bars_cuda import FLASH_ATTENTION_3, of_matmul, rate_of_plain, speedup

OVER_CUDNN, OF_BEST_PEER = 1.11, 0.98  # over the 18 shapes, and in each of them
OF_FLASH_ATTENTION_3 = {64: 1.05}  # in the mean of a head dim's shapes
OF_MATMUL = {(128, False): 0.95, (128, True): 0.92, (256, False): 1.0, (256, True): 0.97}  # at LONG
LONG = 16384
OF_PLAIN = {
    "packed forward": 0.92,
    "GQA 8:1": 0.98,
    "window 1024": 0.8,
    "softcap": 0.75,
    "sinks": 0.98,
    "segments": 0.9,
    "alibi": 0.8,
    "bias": 0.6,
    "dropout": 0.6,
    "s 4001": 0.85,
    "s 1000": 0.85,
    "s 777": 0.85,
}
OF_CONTIGUOUS = {64: 0.9, 16: 0.8}  # page size → limit


def of_flash_attention_3(cell: Cell) -> float:
    """Its time over ours, by its ratio to cuDNN."""
    return speedup(cell, "cudnn") / FLASH_ATTENTION_3["forward"][cell["d"], cell["s"], cell["causal"]]


def of_best_peer(cell: Cell) -> float:
    """The time of the fastest peer over ours."""
    others = ("cudnn", "pallas", "mosaic", "tokamax")
    return min(
        of_flash_attention_3(cell),
        *(speedup(cell, n) for n in others if "median" in cell["times"].get(n, {})),
    )


def judge(cells: list[Cell]) -> list[Bar]:
    """All bars whose cells are there."""
    return [
        *_peers(cells),
        *_sustained(cells),
        *_matmul(cells),
        *_plain(cells),
        *_pages(cells),
        *_small(cells),
    ]


def _least(name: str, values: list[tuple[float, str]], limit: float) -> Iterator[Bar]:
    if values:
        value, where = min(values)
        yield Bar(name, value, True, limit, where)


def _mean(name: str, values: list[float], limit: float) -> Iterator[Bar]:
    if values:
        mean = math.exp(sum(map(math.log, values)) / len(values))
        yield Bar(name, mean, True, limit, f"geometric mean of {len(values)}")


def _peers(cells: list[Cell]) -> Iterator[Bar]:
    matrix = [c for c in cells if c["kind"] == "peer" and "median" in c["times"].get("cudnn", {})]
    if len(matrix) == len(FLASH_ATTENTION_3["forward"]):
        yield from _mean("forward × cuDNN", [speedup(c, "cudnn") for c in matrix], OVER_CUDNN)
    for d, limit in OF_FLASH_ATTENTION_3.items():
        values = [of_flash_attention_3(c) for c in matrix if c["d"] == d]
        yield from _mean(f"forward d{d} × FlashAttention-3", values, limit)
    for d in (64, 128, 256):
        values = [(of_best_peer(c), c["name"]) for c in matrix if c["d"] == d]
        yield from _least(f"forward d{d} × best peer, each shape", values, OF_BEST_PEER)


def _sustained(cells: list[Cell]) -> Iterator[Bar]:
    """FlashAttention-3 was measured where the product ran at 702 TFLOP/s, at a clock as of long runs."""
    for cell in cells:
        if cell["kind"] != "sustained" or "median" not in cell["times"].get("cudnn", {}):
            continue
        name = f"{cell['name']} × FlashAttention-3, sustained"
        yield Bar(name, of_flash_attention_3(cell), True, OF_BEST_PEER, cell["name"])


def _matmul(cells: list[Cell]) -> Iterator[Bar]:
    for kind, how in (("sustained", "sustained"), ("peer", "in bursts")):
        for (d, causal), limit in OF_MATMUL.items():
            tags = {"kind": kind, "d": d, "s": LONG, "causal": causal}
            values = [(of_matmul(c), c["name"]) for c in cells if tags.items() <= c.items()]
            name = f"d{d} s{LONG} {'causal' if causal else 'full'} / matmul, {how}"
            yield from _least(name, values, limit)


def _plain(cells: list[Cell]) -> Iterator[Bar]:
    for what, limit in OF_PLAIN.items():
        for d in (64, 128, 256):
            tags = {"kind": "ratio", "what": what, "d": d}
            values = [(rate_of_plain(c), c["name"]) for c in cells if tags.items() <= c.items()]
            yield from _least(f"{what} d{d} / plain", values, limit)


def _pages(cells: list[Cell]) -> Iterator[Bar]:
    for size, limit in OF_CONTIGUOUS.items():
        for d in (64, 128, 256):
            chosen = [c for c in cells if c["kind"] == "prefill" and c["d"] == d]
            values = [(of_contiguous(c, size), c["name"]) for c in chosen]
            yield from _least(f"pages of {size} d{d} / contiguous", values, limit)


def of_contiguous(cell: Cell, size: int) -> float:
    return float(cell["times"]["contiguous"]["median"] / cell["times"][f"pages of {size}"]["median"])


def _small(cells: list[Cell]) -> Iterator[Bar]:
    for d in (64, 128):
        chosen = [c for c in cells if c["kind"] == "small" and c["d"] == d]
        yield from _least(
            f"small calls d{d} × cuDNN", [(small_cuda.share(c), c["name"]) for c in chosen], 1.0
        )
    for cell in cells:
        if cell["kind"] == "host":
            yield Bar(f"{cell['name']}, × cuDNN", small_cuda.share(cell), True, 1.0, cell["name"])
