"""What the CUDA kernels of the portable family have to reach on one H200, judged from a run's cells."""

from __future__ import annotations

from collections.abc import Iterator

from . import flop, reference_ratios, steps_cuda
from .bars import Bar, Cell, chosen, geometric_mean, least, most, ran, ratio, relative_cost, speedup

# (pass, d, causal) → the least share of the matrix product's rate, s ≥ 4096.
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
# An option's rate over the plain call's, for the same FLOP.
OF_PLAIN = {
    "bias": 0.6,
    "alibi": 0.6,
    "softcap": 0.6,
    "dropout": 0.6,
    "packed forward": 0.9,
    "packed backward": 0.9,
}
OF_COPY = {"bfloat16": 0.7, "float16": 0.7, "float8_e4m3fn": 0.7, "float32": 0.7}
LONG_CACHE = 8192  # keys
# The time of a paged call over that of what it is compared with, at most.
STEPS = {"4 tokens / 1": 1.05, "8 tokens / 1": 1.12, "16 tokens / 1": 1.3, "together / apart": 1.1}
STEPS |= {f"tree of {n} / {n} tokens": 1.05 for n in steps_cuda.TOKENS}


def judge(cells: list[Cell]) -> list[Bar]:
    """All bars whose cells are there."""
    return [*_matmul(cells), *plain_bars(cells, OF_PLAIN), *_decode(cells), *of_steps(cells)]


def rate_of_matmul(cell: Cell) -> float:
    """FLOP/s over that of the 8192³ product timed in the same turns."""
    return float(cell["flop"] / flop.matmul("gpu")) * ratio(cell, "matmul", "jax_flash")


def copy_rate(cell: Cell) -> float:
    """GB/s, read and written."""
    return float(cell["copied"] / cell["times"]["copy"]["median"] / 1e9)


def shares_of_copy(cell: Cell) -> dict[str, float]:
    """Bytes of keys and values per second over the copy's bytes per second, of every layout and peer."""
    timed = [name for name in cell["times"] if name != "copy" and ran(cell, name)]
    return {name: cell["bytes_read"][name] / cell["copied"] * ratio(cell, "copy", name) for name in timed}


def _matmul(cells: list[Cell]) -> Iterator[Bar]:
    for (pass_, d, causal), limit in OF_MATMUL.items():
        for s in (4096, 16384):
            tags = {"pass": pass_, "d": d, "causal": causal, "s": s}
            values = [(rate_of_matmul(c), c["name"]) for c in chosen(cells, "sustained", **tags)]
            name = f"{pass_} d{d} s{s} {'causal' if causal else 'full'} / matmul"
            yield from least(name, values, limit)


def plain_bars(cells: list[Cell], limits: dict[str, float]) -> Iterator[Bar]:
    """The rate of a call over that of the plain call, by what sets it apart."""
    for what, limit in limits.items():
        for d in (64, 128, 256):
            values = [(1 / relative_cost(c), c["name"]) for c in chosen(cells, "ratio", what=what, d=d)]
            yield from least(f"{what} d{d} / plain", values, limit)


def _decode(cells: list[Cell]) -> Iterator[Bar]:
    for dtype, limit in OF_COPY.items():
        long = [c for c in chosen(cells, "decode", dtype=dtype) if c["keys"] >= LONG_CACHE]
        values = [(x, f"{c['name']} {n}") for c in long for n, x in shares_of_copy(c).items() if n != "cudnn"]
        yield from least(f"decode {dtype}, {LONG_CACHE:,} keys and more / copy", values, limit)


def of_steps(cells: list[Cell]) -> Iterator[Bar]:
    """Calls of several tokens beside those of one, and mixed batches."""
    for name, limit in STEPS.items():
        of = [c for kind in ("tokens", "mixed") for c in chosen(cells, kind) if name in steps_cuda.ratios(c)]
        yield from most(name, [(steps_cuda.ratios(c)[name], c["name"]) for c in of], limit)


def lead(cell: Cell) -> float | None:
    """FlashAttention-3's time over ours by way of cuDNN: a lead (reference_ratios.py); None where there is none."""
    third = reference_ratios.flash_attention_3(cell["pass"], cell["case"])
    return None if third is None or not ran(cell, "cudnn") else speedup(cell, "cudnn") / third


def lead_over_best(cell: Cell) -> float | None:
    """The time of the fastest peer of the earlier run over ours by way of cuDNN: a lead."""
    best = reference_ratios.best_peer(cell["pass"], cell["case"])
    return None if best is None or not ran(cell, "cudnn") else speedup(cell, "cudnn") / best[0]


def peer_tables(cells: list[Cell]) -> list[str]:
    """The matrix of shapes: TFLOP/s, × cuDNN, and the leads by way of cuDNN."""
    lines: list[str] = []
    for pass_ in ("forward", "backward"):
        timed = [c for c in chosen(cells, "peer", of="matrix", **{"pass": pass_}) if ran(c, "cudnn")]
        if not timed:
            continue
        lines += [f"## {pass_.capitalize()} beside cuDNN", ""]
        lines += ["| shape | TFLOP/s | cuDNN | × cuDNN | lead: × FlashAttention-3 | lead: × best peer |"]
        lines += ["|---" * 6 + "|"]
        columns: list[list[float]] = [[], [], []]
        for cell in timed:
            rates = (cell["flop"] / cell["times"][n]["median"] / 1e12 for n in ("jax_flash", "cudnn"))
            ratios = (speedup(cell, "cudnn"), lead(cell), lead_over_best(cell))
            for column, x in zip(columns, ratios, strict=True):
                column += [x] if x is not None else []
            shown = [f"{x:.0f}" for x in rates] + ["–" if x is None else f"{x:.2f}" for x in ratios]
            lines.append(f"| {cell['case']} | {' | '.join(shown)} |")
        means = (f"{geometric_mean(x):.2f}" if x else "–" for x in columns)
        lines += [f"| geometric mean | | | {' | '.join(means)} |", ""]
        lines += [
            "Leads are no results: they are this run's ratio to cuDNN over another implementation's ratio"
        ]
        lines += ["to cuDNN in an earlier run on the same kind of card (benchmarks/reference_ratios.py).", ""]
    return lines
