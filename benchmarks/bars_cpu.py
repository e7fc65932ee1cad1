"""The limits of the CPU suite, judged from the cells of a run."""

from __future__ import annotations

from collections.abc import Iterator

from .bars import (
    Bar,
    Cell,
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

# (pass, peer) → the peer's time over ours: the mean over all cells, and each single cell.
OVER_PEERS = {
    ("forward", "torch"): (3.5, 2.0),
    ("forward", "xla"): (7.0, 4.0),
    ("both", "torch"): (3.2, 2.0),
    ("both", "xla"): (7.0, 4.0),
}
OF_MATMUL = {"float32": 0.85, "bfloat16": 1.5}  # rates of long forwards, relative to XLA's float32 product
OF_PLAIN_TIME = {"causal": 0.55, "GQA 8:1": 1.05, "window 256 at s 16,384": 0.05, "equal documents": 1.1}
COST = {"bias": 1.6, "dropout": 1.6}  # an option's time per FLOP, relative to the plain call's
COST_OF_OTHERS = 1.3
TWO_THREADS, OF_READ, OVER_XLA_SMALL, MEGABYTES = 1.8, 0.8, 1.0, 64.0
# Out and its tangent: our time over the forward's, and XLA's time over ours.
OF_FORWARD, OVER_XLA_TANGENT = 3.5, 6.0
TEXT = {"forward": "forward", "both": "forward + backward", "jvp": "forward + tangent"}


def judge(cells: list[Cell]) -> list[Bar]:
    """The bars whose cells were measured."""
    return [
        *_peers(cells),
        *_matmul(cells),
        *_shapes(cells),
        *_options(cells),
        *_tangents(cells),
        *_others(cells),
    ]


def _peers(cells: list[Cell]) -> Iterator[Bar]:
    for (pass_, peer), (limit, each) in OVER_PEERS.items():
        timed = [c for c in chosen(cells, "peer", **{"pass": pass_}) if ran(c, peer)]
        ratios = [(speedup(c, peer), c["name"]) for c in timed]
        yield from mean(f"{TEXT[pass_]} × {peer}", ratios, limit)
        yield from least(f"{TEXT[pass_]} × {peer}, each cell", ratios, each)


def _matmul(cells: list[Cell]) -> Iterator[Bar]:
    for dtype, limit in OF_MATMUL.items():
        forward = chosen(cells, "peer", dtype=dtype, **{"pass": "forward"})
        long = [(share_of_product(c), c["name"]) for c in forward if c["rows"] >= 2048]
        yield from least(f"forward {dtype} / XLA's float32 matmul rate", long, limit)


def _shapes(cells: list[Cell]) -> Iterator[Bar]:
    for what, limit in OF_PLAIN_TIME.items():
        values = [(ratio(c, "this", "plain"), c["name"]) for c in chosen(cells, "shape", what=what)]
        yield from most(f"{what} / plain", values, limit)


def _options(cells: list[Cell]) -> Iterator[Bar]:
    for what in dict.fromkeys(c["what"] for c in chosen(cells, "option")):
        values = [(relative_cost(c), c["name"]) for c in chosen(cells, "option", what=what)]
        yield from most(f"{what}: cost for the same FLOP", values, COST.get(what, COST_OF_OTHERS))


def _tangents(cells: list[Cell]) -> Iterator[Bar]:
    timed = chosen(cells, "tangent")
    over_forward = [(ratio(c, "jax_flash", "forward"), c["name"]) for c in timed]
    yield from most(f"{TEXT['jvp']} / forward", over_forward, OF_FORWARD)
    over_xla = [(speedup(c, "xla"), c["name"]) for c in timed]
    yield from least(f"{TEXT['jvp']} × xla", over_xla, OVER_XLA_TANGENT)


def _others(cells: list[Cell]) -> Iterator[Bar]:
    scaling = [(ratio(c, "1 thread", "2 threads"), c["name"]) for c in chosen(cells, "scaling")]
    yield from least("1 to 3 heads, 1 to 2 threads", scaling, TWO_THREADS)
    for layout in ("contiguous", "paged"):
        reads = [
            (ratio(c, "read", "jax_flash"), c["name"])
            for c in chosen(cells, "decode", layout=layout)
            if c["dtype"] in ("float32", "bfloat16")
        ]
        yield from least(f"decode {layout} / streaming read", reads, OF_READ)
    small = [(speedup(c, "xla"), c["name"]) for c in chosen(cells, "small")]
    yield from least("small calls × xla", small, OVER_XLA_SMALL)
    memory = [(c["bytes"] / 2**20, c["name"]) for c in chosen(cells, "memory")]
    yield from most("extra memory, MB", memory, MEGABYTES)


def verdict(cell: Cell) -> str:
    match cell["kind"]:
        case "peer":
            return peer_verdict(cell)
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
