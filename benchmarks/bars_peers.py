"""The limits of the peers' suite on one H200: training, decode and whole steps, judged from the cells of a run."""

from __future__ import annotations

from collections.abc import Iterator

from . import paged_steps
from .bars import (
    Bar,
    Cell,
    Values,
    chosen,
    least,
    mean,
    most,
    peer_verdict,
    ran,
    ratio,
    relative_cost,
    share_of_product,
    speedup,
)
from .peers import PEERS

# Speed relative to cuDNN, and in each cell to the best peer.
BACKWARD_MEAN, FORWARD_MEAN, EACH = 1.28, 1.2, 0.97
LARGE_HEADS = 1.3  # backward at head dim 256, relative to cuDNN
# Forwards at length LONG: their rate over that of the matrix product.
OF_PRODUCT = {(128, False): 0.95, (128, True): 0.92, (256, False): 1.0, (256, True): 0.97}
LONG = 16384
LATENT_OF_PRODUCT = 0.59  # head dims 192/128, backward: share of the matrix product's rate
WINDOWS = {"window 128": 1.7, "window 1024": 1.25, "window 4096": 1.25}  # backward, relative to cuDNN
OF_FIXED, SEGMENTS_OF_PACKED = 0.92, 1 / 1.15
OF_PLAIN = {  # an option's rate, relative to the plain call's
    "forward": {"sinks": 0.98, "softcap": 0.75, "alibi": 0.8, "dropout": 0.6, "bias": 0.6, "segments": 0.9},
    "backward": {"sinks": 0.97, "softcap": 0.75, "alibi": 0.8, "dropout": 0.6, "bias": 0.45},
}
OF_PAIR = {  # the rate of a shape, relative to the plain call that it is paired with
    "forward": {"GQA 8:1": 0.98, "window 1024": 0.8, "s 4001": 0.85, "s 1000": 0.85, "s 777": 0.85},
    "backward": {"s 4001": 0.85, "s 1000": 0.85, "s 777": 0.85},
}
# Time of the deterministic backward, relative to the plain one.
DETERMINISTIC = {64: 1.08, 128: 1.08, 256: 1.1}
# Relative to cuDNN, with attention's results kept under remat.
TRAINING_STEP = {"1 × 32,768": 1.18, "2 × 8,192": 1.08}

DECODE_MEAN, DECODE_EACH, OF_READ, READ_FROM = 1.02, 0.98, 0.95, 5e8  # bytes of keys and values
OF_CONTIGUOUS = {"pages of 64": 0.98, "pages of 16": 0.98, "pages of 1": 0.94}
OVER_PALLAS, MANY_OF_READ, PAGED_ONE, INVARIANT = 2.2, 0.9, 1.08, 1.06
OF_PLAIN_BANDWIDTH = {
    "ragged to 8,192": 0.9,
    "ragged to 65,536": 0.95,
    "window 1,024": 0.9,
    "window 128, sinks, d64": 0.9,
}
FLOAT8 = 1.75
LATENT_READ, LATENT_PRODUCT = 0.8, 0.6
PREFILL = {"pages of 64": 0.9, "pages of 16": 0.8}  # of the contiguous call's rate
# Upper bounds: the time of a paged call over that of the call that it is paired with.
STEPS = {"4 tokens / 1": 1.05, "8 tokens / 1": 1.12, "16 tokens / 1": 1.3, "together / apart": 1.1}
STEPS |= {f"tree of {n} / {n} tokens": 1.05 for n in paged_steps.TOKENS}


def judge(cells: list[Cell]) -> list[Bar]:
    """The bars whose cells were measured."""
    return [
        *_matrix(cells),
        *_product(cells),
        *_models(cells),
        *_options(cells),
        *_short(cells),
        *_steps(cells),
        *_long_decode(cells),
        *_other_decode(cells),
        *_paged_steps(cells),
    ]


def over_best(cell: Cell) -> float | None:
    """The time of the fastest peer over ours."""
    found = [speedup(cell, name) for name in PEERS if name != "jax_flash" and ran(cell, name)]
    return min(found) if found and ran(cell, "jax_flash") else None


def _over_cudnn(cells: list[Cell]) -> Values:
    return [(speedup(c, "cudnn"), c["name"]) for c in cells if ran(c, "cudnn") and ran(c, "jax_flash")]


def _best(cells: list[Cell]) -> Values:
    return [(x, c["name"]) for c in cells if (x := over_best(c)) is not None]


def _matrix(cells: list[Cell]) -> Iterator[Bar]:
    for pass_, limit in (("backward", BACKWARD_MEAN), ("forward", FORWARD_MEAN)):
        here = chosen(cells, "peer", of="matrix", **{"pass": pass_})
        yield from mean(f"{pass_} × cuDNN", _over_cudnn(here), limit)
        yield from least(f"{pass_} × best peer, each shape", _best([*here, *_others(cells, pass_)]), EACH)
        if pass_ == "backward":
            large = [c for c in here if c["d"] == 256]
            yield from least("backward d256 × cuDNN, each shape", _over_cudnn(large), LARGE_HEADS)


def _others(cells: list[Cell], pass_: str, window: str = "") -> list[Cell]:
    """The cells of peers that are slow to compile, for one window, or for the matrix if there is none."""
    others = chosen(cells, "peer", of="others", **{"pass": pass_})
    return [c for c in others if (c["case"].endswith(window) if window else "window" not in c["case"])]


def _product(cells: list[Cell]) -> Iterator[Bar]:
    """Long forwards over the matrix product of the run."""
    for device in chosen(cells, "device"):
        product = device["flop"] / device["times"]["matmul"]["median"]
        for (d, causal), limit in OF_PRODUCT.items():
            tags = {"of": "matrix", "pass": "forward", "d": d, "s": LONG, "causal": causal}
            timed = [
                c for c in chosen(cells, "peer", **tags) if ran(c, "jax_flash") and "heads" not in c["case"]
            ]
            values = [(c["flop"] / c["times"]["jax_flash"]["median"] / product, c["name"]) for c in timed]
            how = "causal" if causal else "full"
            yield from least(f"forward d{d} s{LONG} {how} / matmul", values, limit)


def _models(cells: list[Cell]) -> Iterator[Bar]:
    for cell in chosen(cells, "peer", of="models", **{"pass": "backward"}):
        if ran(cell, "jax_flash") and ran(cell, "matmul"):
            share = share_of_product(cell)
            yield Bar("backward 192/128 / matmul", share, True, LATENT_OF_PRODUCT, cell["name"])
    for what, limit in WINDOWS.items():
        here = [
            c for c in chosen(cells, "peer", of="windows", **{"pass": "backward"}) if c["case"].endswith(what)
        ]
        yield from least(f"backward {what} × cuDNN", _over_cudnn(here), limit)
        here += _others(cells, "backward", what)
        yield from least(f"backward {what} × best peer", _best(here), 1.0)
    for cell in chosen(cells, "documents"):
        if ran(cell, "jax_flash") and ran(cell, "fixed"):
            rate = ratio(cell, "fixed", "jax_flash") * cell["work"]["packed"] / cell["work"]["fixed"]
            yield Bar(f"{cell['name']} / fixed", rate, True, OF_FIXED, cell["name"])
        if ran(cell, "jax_flash") and ran(cell, "segment ids"):
            share = ratio(cell, "jax_flash", "segment ids")
            yield Bar(f"{cell['name']}, segment ids / packed", share, True, SEGMENTS_OF_PACKED, cell["name"])


def _options(cells: list[Cell]) -> Iterator[Bar]:
    every = [c for c in chosen(cells, "options") if ran(c, "plain")]
    for pass_, limits in OF_PLAIN.items():
        for d in DETERMINISTIC:
            timed = [c for c in every if c["d"] == d and c["pass"] == pass_]
            for what, limit in limits.items():
                values = [(ratio(c, "plain", what), c["name"]) for c in timed if ran(c, what)]
                yield from least(f"{pass_} {what} d{d} / plain", values, limit)
    for d, limit in DETERMINISTIC.items():
        timed = [c for c in every if c["d"] == d and ran(c, "deterministic")]
        values = [(ratio(c, "deterministic", "plain"), c["name"]) for c in timed]
        yield from most(f"backward deterministic d{d}, time / plain", values, limit)
    for pass_, limits in OF_PAIR.items():
        two = [c for c in chosen(cells, "ratio", **{"pass": pass_}) if ran(c, "this") and ran(c, "plain")]
        for what, limit in limits.items():
            values = [(1 / relative_cost(c), c["name"]) for c in two if c["what"] == what]
            yield from least(f"{pass_} {what} / plain", values, limit)


def _short(cells: list[Cell]) -> Iterator[Bar]:
    for pass_ in ("backward", "forward"):
        for how in ("one by one", "device"):
            here = [c for c in chosen(cells, "small", **{"pass": pass_}) if c["name"].endswith(how)]
            yield from least(f"short {pass_} × cuDNN, {how}", _over_cudnn(here), 1.0)
    for cell in chosen(cells, "host"):
        yield from least(f"{cell['name']}, × cuDNN", _over_cudnn([cell]), 1.0)


def _steps(cells: list[Cell]) -> Iterator[Bar]:
    for cell in chosen(cells, "step"):
        kept = "jax_flash, results kept"
        if cell["name"] in TRAINING_STEP and ran(cell, "cudnn") and ran(cell, kept):
            limit, found = TRAINING_STEP[cell["name"]], ratio(cell, "cudnn", kept)
            yield Bar(f"training step {cell['name']}, kept × cuDNN", found, True, limit, cell["name"])


def _paged_steps(cells: list[Cell]) -> Iterator[Bar]:
    """Calls of several tokens over those of one, mixed batches over their parts, and prompts over pages."""
    for name, limit in STEPS.items():
        of = [c for kind in ("tokens", "mixed") for c in chosen(cells, kind) if name in paged_steps.ratios(c)]
        yield from most(name, [(paged_steps.ratios(c)[name], c["name"]) for c in of], limit)
    for name, limit in PREFILL.items():
        values = [(ratio(c, "contiguous", name), c["name"]) for c in chosen(cells, "prefill")]
        yield from least(f"prefill, {name} / contiguous", values, limit)


def _long_decode(cells: list[Cell]) -> Iterator[Bar]:
    every = [c for c in chosen(cells, "bandwidth", of="long") if ran(c, "contiguous")]
    many = [c for c in every if c["shape"][0] > 512]
    here = [c for c in every if c not in many]
    over = [(ratio(c, "cudnn", "contiguous"), c["name"]) for c in here if ran(c, "cudnn")]
    yield from mean("decode, contiguous × cuDNN", over, DECODE_MEAN)
    yield from least("decode, contiguous × cuDNN, each shape", over, DECODE_EACH)
    large = [c for c in here if c["bytes_read"]["contiguous"] > READ_FROM and ran(c, "read")]
    shares = [(ratio(c, "read", "contiguous"), c["name"]) for c in large]
    yield from least("decode, contiguous / streaming read", shares, OF_READ)
    for name, limit in OF_CONTIGUOUS.items():
        values = [(ratio(c, "contiguous", name), c["name"]) for c in here if ran(c, name)]
        yield from least(f"decode, {name} / contiguous", values, limit)
    pallas = [(x, c["name"]) for c in here if (x := over_pallas(c)) is not None]
    yield from least("decode, pages × Pallas", pallas, OVER_PALLAS)
    values = [(ratio(c, "read", "contiguous"), c["name"]) for c in many if ran(c, "read")]
    yield from least("1,024 sequences / streaming read", values, MANY_OF_READ)
    costs = [
        (ratio(c, "batch invariant", "pages of 64"), c["name"])
        for c in here
        if ran(c, "batch invariant") and ran(c, "pages of 64")
    ]
    yield from most("decode, batch invariant, time / plain", costs, INVARIANT)


def over_pallas(cell: Cell) -> float | None:
    """The time of Pallas over ours, each at its faster page size."""
    theirs, own = (
        min(
            (t["median"] for name, t in cell["times"].items() if name.startswith(start) and "median" in t),
            default=0,
        )
        for start in ("pallas", "pages of")
    )
    return theirs / own if theirs and own else None


def _other_decode(cells: list[Cell]) -> Iterator[Bar]:
    one = [c for c in chosen(cells, "bandwidth", of="one") if ran(c, "contiguous")]
    values = [(ratio(c, "cudnn", "contiguous"), c["name"]) for c in one if ran(c, "cudnn")]
    yield from least("short decode × cuDNN", values, 1.0)
    costs = [(ratio(c, "pages of 64", "contiguous"), c["name"]) for c in one if ran(c, "pages of 64")]
    yield from most("short decode, pages of 64, time / contiguous", costs, PAGED_ONE)
    for cell in chosen(cells, "bandwidth", of="kinds"):
        if not ran(cell, "plain"):
            continue
        for name, limit in OF_PLAIN_BANDWIDTH.items():
            if ran(cell, name):
                share = ratio(cell, "plain", name) * cell["bytes_read"][name] / cell["bytes_read"]["plain"]
                yield Bar(f"decode, {name}, of the plain bandwidth", share, True, limit, cell["name"])
        if ran(cell, "batch invariant"):
            cost = ratio(cell, "batch invariant", "plain")
            yield Bar("decode, batch invariant, time / plain", cost, False, INVARIANT, cell["name"])
        if ran(cell, "float8"):
            yield Bar("decode, float8 × plain", ratio(cell, "plain", "float8"), True, FLOAT8, cell["name"])
    for cell in chosen(cells, "bandwidth", of="latent"):
        if ran(cell, "16 heads") and ran(cell, "read"):
            yield Bar(
                "latent decode, 16 heads / read",
                ratio(cell, "read", "16 heads"),
                True,
                LATENT_READ,
                cell["name"],
            )
        for device in chosen(cells, "device"):
            if ran(cell, "128 heads"):
                rate = cell["work"]["128 heads"] / cell["times"]["128 heads"]["median"]
                share = rate / device["flop"] * device["times"]["matmul"]["median"]
                yield Bar("latent decode, 128 heads / matmul", share, True, LATENT_PRODUCT, cell["name"])


# --- a cell in words --------------------------------------------------------------------------------------------------


def verdict(cell: Cell) -> str:
    timed = {name: t["median"] for name, t in cell.get("times", {}).items() if "median" in t}
    match cell["kind"]:
        case "failed":
            return str(cell["error"])
        case "peer" | "settled" | "documents" if "jax_flash" in timed:
            return peer_verdict(cell)
        case "options" if "plain" in timed:
            return ", ".join(
                f"{name} {timed['plain'] / t:.2f}" for name, t in timed.items() if name != "plain"
            )
        case "ratio" if len(timed) == 2:
            return f"{1 / relative_cost(cell):.3f} of the rate of the plain call"
        case "small" | "host":
            return "microseconds: " + ", ".join(f"{name} {t * 1e6:.1f}" for name, t in timed.items())
        case "bandwidth":
            return ", ".join(_bandwidth(cell, name, t) for name, t in timed.items())
        case "tokens" | "mixed":
            return paged_steps.verdict(cell)
        case "step":
            return "thousand tokens/s: " + ", ".join(
                f"{n} {cell['tokens'] / t / 1e3:.1f}" for n, t in timed.items()
            )
        case "serving":
            return _serving(cell, timed)
    return ", ".join(f"{name} {t * 1e3:.3f}" for name, t in timed.items()) or "–"


def _bandwidth(cell: Cell, name: str, seconds: float) -> str:
    size = cell["bytes_read"][name]
    return f"{name} {seconds * 1e6:.1f} µs" + (f" {size / seconds / 1e9:.0f} GB/s" if size else "")


def _serving(cell: Cell, timed: dict[str, float]) -> str:
    said = [f"{name} {cell['sequences'] / t:,.0f} tokens/s" for name, t in timed.items()]
    if {"jax_flash", "no attention"} <= set(timed):
        said.append(f"attention's share {1 - timed['no attention'] / timed['jax_flash']:.0%}")
    return ", ".join([*said, f"thunks {cell['captured']}"])
