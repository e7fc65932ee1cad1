"""What the CUDA kernels have to reach on one H200, judged from a run's cells."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .bars import Bar, Cell

# FlashAttention-3 over cuDNN on such a card, in one run: TFLOP/s of its sm_90a kernels behind XLA's FFI over those
# of cuDNN, by (d, s, causal). From the notes that this project began with, before any code of its own (matmul 8192³
# in that run: 702 TFLOP/s); there is no report of that run here, and its versions are not known.
_KEYS = [(d, s, causal) for d in (64, 128, 256) for s in (1024, 4096, 16384) for causal in (False, True)]
_FORWARD = (
    (400, 360), (308, 296), (435, 494), (399, 447), (452, 520), (430, 507),
    (536, 601), (377, 450), (619, 635), (506, 602), (605, 687), (549, 655),
    (541, 635), (399, 457), (653, 702), (538, 643), (665, 739), (594, 706),
)  # fmt: skip
_BACKWARD = (
    (325, 414), (220, 297), (410, 496), (354, 458), (441, 522), (420, 530),
    (386, 465), (268, 343), (498, 563), (424, 513), (535, 596), (514, 593),
    (277, 371), (218, 290), (358, 434), (329, 408), (355, 456), (372, 459),
)  # fmt: skip
FLASH_ATTENTION_3 = {
    "forward": {key: theirs / cudnn for key, (cudnn, theirs) in zip(_KEYS, _FORWARD, strict=True)},
    "backward": {key: theirs / cudnn for key, (cudnn, theirs) in zip(_KEYS, _BACKWARD, strict=True)},
}
# Of the matrix product's rate, s ≥ 4096: (pass, d, causal) → limit.
OF_MATMUL = {
    ("forward", 64, False): 0.42,
    ("forward", 128, False): 0.48,
    ("forward", 128, True): 0.44,
    ("forward", 256, False): 0.42,
    ("backward", 64, False): 0.34,
    ("backward", 128, False): 0.41,
    ("backward", 128, True): 0.37,
    ("backward", 256, False): 0.28,
}
OF_PLAIN = {
    "bias": 0.6,
    "alibi": 0.6,
    "softcap": 0.6,
    "dropout": 0.6,
    "packed forward": 0.9,
    "packed backward": 0.9,
}
OF_COPY = {"bfloat16": 0.7, "float16": 0.7, "float8_e4m3fn": 0.7, "float32": 0.7}


def speedup(cell: Cell, peer: str) -> float:
    return float(cell["times"][peer]["median"] / cell["times"]["jax_flash"]["median"])


def of_matmul(cell: Cell) -> float:
    """FLOP/s over that of the 8192³ product timed beside it."""
    rate = cell["flop"] / cell["times"]["jax_flash"]["median"]
    return float(rate / (2.0 * 8192**3 / cell["times"]["matmul"]["median"]))


def rate_of_plain(cell: Cell) -> float:
    times, work = cell["times"], cell["flop"]
    return float(work["this"] / times["this"]["median"] / (work["plain"] / times["plain"]["median"]))


def copy_rate(cell: Cell) -> float:
    """GB/s, read and written."""
    return float(cell["copied"] / cell["times"]["copy"]["median"] / 1e9)


def shares_of_copy(cell: Cell) -> dict[str, float]:
    """Bytes of keys and values per second over the copy's bytes per second, of every layout and peer."""
    timed = {name: t["median"] for name, t in cell["times"].items() if name != "copy" and "median" in t}
    return {name: cell["bytes"] / seconds / 1e9 / copy_rate(cell) for name, seconds in timed.items()}


def judge(cells: list[Cell]) -> list[Bar]:
    """All bars whose cells are there."""
    return [*_matmul(cells), *_plain(cells), *_decode(cells)]


def _least(name: str, values: list[tuple[float, str]], limit: float) -> Iterator[Bar]:
    if values:
        value, where = min(values)
        yield Bar(name, value, True, limit, where)


def _matmul(cells: list[Cell]) -> Iterator[Bar]:
    for (pass_, d, causal), limit in OF_MATMUL.items():
        for s in (4096, 16384):
            tags = {"kind": "sustained", "pass": pass_, "d": d, "causal": causal, "s": s}
            values = [(of_matmul(c), c["name"]) for c in cells if tags.items() <= c.items()]
            name = f"{pass_} d{d} s{s} {'causal' if causal else 'full'} / matmul"
            yield from _least(name, values, limit)


def _plain(cells: list[Cell]) -> Iterator[Bar]:
    for d in (64, 128, 256):
        for what, limit in OF_PLAIN.items():
            tags = {"kind": "ratio", "what": what, "d": d}
            values = [(rate_of_plain(c), c["name"]) for c in cells if tags.items() <= c.items()]
            yield from _least(f"{what} d{d} / plain", values, limit)


def _decode(cells: list[Cell]) -> Iterator[Bar]:
    for dtype, limit in OF_COPY.items():
        long = [c for c in cells if c["kind"] == "decode" and c["dtype"] == dtype and c["keys"] >= 8192]
        values = [(x, f"{c['name']} {n}") for c in long for n, x in shares_of_copy(c).items() if n != "cudnn"]
        yield from _least(f"decode {dtype}, 8,192 keys and more / copy", values, limit)


def peer_tables(cells: list[Cell]) -> list[str]:
    """The matrix of shapes: TFLOP/s, and the ratios to peers; FlashAttention-3 by its ratio to cuDNN."""
    lines: list[str] = []
    for pass_ in ("forward", "backward"):
        chosen = [c for c in cells if c["kind"] == "peer" and c["of"] == "matrix" and c["pass"] == pass_]
        timed = [c for c in chosen if "median" in c["times"].get("cudnn", {})]
        if not timed:
            continue
        lines += [f"## {pass_.capitalize()} beside cuDNN", ""]
        lines += ["| shape | TFLOP/s | cuDNN | × cuDNN | × FlashAttention-3 |", "|---|---|---|---|---|"]
        ratios: list[tuple[float, float]] = []
        for cell in timed:
            ours, theirs = (cell["flop"] / cell["times"][n]["median"] / 1e12 for n in ("jax_flash", "cudnn"))
            third = FLASH_ATTENTION_3[pass_][cell["d"], cell["s"], cell["causal"]]
            ratios.append((ours / theirs, ours / theirs / third))
            shown = " | ".join(f"{x:.2f}" for x in ratios[-1])
            lines.append(f"| {cell['name'].rsplit(' ', 1)[0]} | {ours:.0f} | {theirs:.0f} | {shown} |")
        means = (math.exp(sum(map(math.log, x)) / len(x)) for x in zip(*ratios, strict=True))
        lines += [f"| geometric mean | | | {' | '.join(f'{x:.2f}' for x in means)} |", ""]
        lines += [
            "FlashAttention-3 was not in this run: its column is the one before over its ratio to cuDNN in"
        ]
        lines += ["an earlier run on the same card.", ""]
    return lines
