"""What the sm_90a forward has to reach on one H200, judged from a run's cells."""

from __future__ import annotations

from collections.abc import Iterator

from .bars import Bar, Cell, chosen, least, mean, ran, ratio, speedup
from .bars_cuda import lead, lead_over_best, plain_bars, rate_of_matmul
from .cases import MATRIX
from .peers import PEERS

OVER_CUDNN, OF_BEST_PEER = 1.11, 0.98  # over the 18 shapes, and in each of them
OVER_FLASH_ATTENTION_3 = {64: 1.05}  # head dim → in the mean of its shapes
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


def judge(cells: list[Cell]) -> list[Bar]:
    """All bars whose cells are there."""
    return [
        *_peers(cells),
        *_sustained(cells),
        *_matmul(cells),
        *plain_bars(cells, OF_PLAIN),
        *_pages(cells),
        *_small(cells),
    ]


def over_best_peer(cell: Cell) -> float:
    """The time over ours of the fastest peer in this run, or by the lead over those of the earlier run."""
    here = [speedup(cell, name) for name in PEERS if name != "jax_flash" and ran(cell, name)]
    earlier = lead_over_best(cell)
    return min(here + ([] if earlier is None else [earlier]))


def _peers(cells: list[Cell]) -> Iterator[Bar]:
    matrix = [c for c in chosen(cells, "peer", of="matrix") if ran(c, "cudnn")]
    if len(matrix) == len(MATRIX):
        yield from mean("forward × cuDNN", [(speedup(c, "cudnn"), c["name"]) for c in matrix], OVER_CUDNN)
    for d, limit in OVER_FLASH_ATTENTION_3.items():
        leads = [(x, c["name"]) for c in matrix if c["d"] == d and (x := lead(c)) is not None]
        yield from mean(f"forward d{d} × FlashAttention-3 (a lead)", leads, limit)
    for d in (64, 128, 256):
        values = [(over_best_peer(c), c["name"]) for c in matrix if c["d"] == d]
        yield from least(f"forward d{d} × best peer (in part leads), each shape", values, OF_BEST_PEER)


def _sustained(cells: list[Cell]) -> Iterator[Bar]:
    for cell in chosen(cells, "sustained"):
        value = lead(cell)
        if value is not None:
            name = f"{cell['name']} × FlashAttention-3, sustained (a lead)"
            yield Bar(name, value, True, OF_BEST_PEER, cell["name"])


def _matmul(cells: list[Cell]) -> Iterator[Bar]:
    for kind, how in (("sustained", "sustained"), ("peer", "in bursts")):
        for (d, causal), limit in OF_MATMUL.items():
            tags = {"d": d, "s": LONG, "causal": causal}
            values = [(rate_of_matmul(c), c["name"]) for c in chosen(cells, kind, **tags)]
            name = f"d{d} s{LONG} {'causal' if causal else 'full'} / matmul, {how}"
            yield from least(name, values, limit)


def _pages(cells: list[Cell]) -> Iterator[Bar]:
    for size, limit in OF_CONTIGUOUS.items():
        for d in (64, 128, 256):
            prefill = chosen(cells, "prefill", d=d)
            values = [(ratio(c, "contiguous", f"pages of {size}"), c["name"]) for c in prefill]
            yield from least(f"pages of {size} d{d} / contiguous", values, limit)


def _small(cells: list[Cell]) -> Iterator[Bar]:
    for d in (64, 128):
        small = [(speedup(c, "cudnn"), c["name"]) for c in chosen(cells, "small", d=d) if ran(c, "cudnn")]
        yield from least(f"small calls d{d} × cuDNN", small, 1.0)
    for cell in chosen(cells, "host"):
        yield Bar(f"{cell['name']}, × cuDNN", speedup(cell, "cudnn"), True, 1.0, cell["name"])
