"""The CUDA suite: what the kernels promise about speed, each cell beside its peers and the device's own rates.

python -m benchmarks --suite cuda                                       # all sections
python -m benchmarks --suite cuda --sections "forward d128,decode"      # these, into the report that is there
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from . import bars_cuda, cases, decode_cuda, flop, measure, peers, published, small_cuda, steps_cuda
from .bars import Cell, chosen, ran, relative_cost, speedup
from .cases import Case, gpu_case
from .sections import Suite, draw_rates, time_calls

SUSTAINED, SUSTAINED_REPEATS, MANY = 0.3, 3, 10000  # seconds of each; repeats; calls at most
PEERS = tuple(name for name, peer in peers.PEERS.items() if "gpu" in peer.platforms and name != "xla")


def peer_cell(case: Case, pass_: str, names: tuple[str, ...] = PEERS, **tags: Any) -> Cell:
    """These implementations and the matrix product, in turns."""
    calls, refused = peers.prepare({name: (name, case, pass_) for name in names})
    times = time_calls(calls | {"matmul": measure.matmul_call("gpu", case.dtype)})
    return _tagged("peer", case, pass_) | tags | {"times": times | refused}


def _tagged(kind: str, case: Case, pass_: str) -> Cell:
    tags = {"case": case.name, "pass": pass_, "d": case.d, "s": case.sq, "causal": case.causal}
    return {"kind": kind, "name": f"{case.name} {pass_}", **tags, "flop": flop.attention(case, pass_)}


def matrix_cells(pass_: str, d: int) -> Iterator[Cell]:
    for case in cases.MATRIX:
        if case.d == d:
            yield peer_cell(case, pass_, of="matrix")


def model_cells() -> Iterator[Cell]:
    """Heads of known models: GQA, MLA, windows, packed documents; both passes."""
    packed = [cases.gpu_documents(d, causal=True) for d in (64, 128)]
    for case in (*cases.GQA, cases.MLA, *cases.WINDOWS, *packed):
        for pass_ in ("forward", "backward"):
            yield peer_cell(case, pass_, of="models")


def sustained_cell(pass_: str, case: Case, seconds: float, others: tuple[str, ...] = ()) -> Cell:
    """This library, the matrix product and peers, each for as long as it takes the device to settle at its clock."""
    calls, _ = peers.prepare({name: (name, case, pass_) for name in ("jax_flash", *others)})
    calls["matmul"] = measure.matmul_call("gpu", case.dtype)
    times = measure.interleaved(calls, SUSTAINED_REPEATS, seconds, most=MANY)
    timed = {name: measure.summary(t) for name, t in times.items()}
    return _tagged("sustained", case, pass_) | {"times": timed}


def sustained_cells() -> Iterator[Cell]:
    for pass_, d, causal in bars_cuda.OF_MATMUL:
        for s in (4096, 16384):
            yield sustained_cell(pass_, gpu_case(d, s, causal), SUSTAINED)


def ours_cell(what: str, plain: Case, this: Case, pass_: str = "forward") -> Cell:
    """This library on two cases in turns: what an option or a shape costs for the same FLOP."""
    calls, _ = peers.prepare({"plain": ("jax_flash", plain, pass_), "this": ("jax_flash", this, pass_)})
    work = {"plain": flop.attention(plain, pass_), "this": flop.attention(this, pass_)}
    cell = {"kind": "ratio", "what": what, "d": plain.d, "name": f"{this.name} {pass_}"}
    return cell | {"flop": work, "times": time_calls(calls)}


def option_cells(d: int) -> Iterator[Cell]:
    """Each option beside the plain forward, s 4096, full."""
    for what, case in cases.gpu_options(d).items():
        yield ours_cell(what, gpu_case(d, 4096), case)


def packed_cells(passes: tuple[str, ...]) -> Iterator[Cell]:
    """Documents of 100 to 8,000 tokens beside fixed sequences of 4,096."""
    for d in cases.HEAD_DIMS:
        for causal in (False, True):
            for pass_ in passes:
                plain = gpu_case(d, 4096, causal)
                yield ours_cell(f"packed {pass_}", plain, cases.gpu_documents(d, causal), pass_)


def shape_cells(d: int) -> Iterator[Cell]:
    """GQA, a window, lengths that are no multiple of a tile."""
    plain, long = gpu_case(d, 4096), gpu_case(d, 16384)
    hk = max(1, plain.hq // 8)
    yield ours_cell(f"GQA {plain.hq // hk}:1", plain, plain.replace(name=f"{plain.name} hk{hk}", hk=hk))
    yield ours_cell("window 1024", long, long.replace(name=f"{long.name} window", window=(1024, 0)))
    for s, ragged in ((4096, 4001), (1024, 1000), (768, 777)):
        whole = gpu_case(d, s, b=cases.TOKENS // s)
        yield ours_cell(f"s {ragged}", whole, whole.replace(name=f"d{d} s{ragged}", sq=ragged, sk=ragged))


def published_cells() -> Iterator[Cell]:
    """The shapes of other projects' tables."""
    for case in published.cases():
        yield peer_cell(case, "forward", ("jax_flash", "cudnn"), of="published")


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    **{
        f"{pass_} d{d}": functools.partial(matrix_cells, pass_, d)
        for pass_ in ("forward", "backward")
        for d in cases.HEAD_DIMS
    },
    "models": model_cells,
    "sustained": sustained_cells,
    **{f"options d{d}": functools.partial(option_cells, d) for d in cases.HEAD_DIMS},
    "packed": functools.partial(packed_cells, ("forward", "backward")),
    "shapes": functools.partial(shape_cells, 128),
    "small": small_cuda.small_cells,
    "decode": decode_cuda.decode_cells,
    "decode dtypes": decode_cuda.dtype_cells,
    "prefill": decode_cuda.prefill_cells,
    "tokens": steps_cuda.token_cells,
    "mixed": steps_cuda.mixed_cells,
    "published": published_cells,
}


def verdict(cell: Cell) -> str:
    match cell["kind"]:
        case "peer" | "sustained":
            shown = [f"× {name} {speedup(cell, name):.2f}" for name in PEERS[1:] if ran(cell, name)]
            rate = cell["flop"] / cell["times"]["jax_flash"]["median"] / 1e12
            return ", ".join(
                [f"{rate:.0f} TFLOP/s", f"{bars_cuda.rate_of_matmul(cell):.3f} of matmul", *shown]
            )
        case "ratio":
            return f"{1 / relative_cost(cell):.3f} of the rate of the plain call"
        case "small" | "host":
            return small_cuda.verdict(cell)
        case "tokens" | "mixed":
            return steps_cuda.verdict(cell)
        case "decode":
            shares = (f"{name} {x:.2f}" for name, x in bars_cuda.shares_of_copy(cell).items())
            return f"of a copy at {bars_cuda.copy_rate(cell):.0f} GB/s: {', '.join(shares)}"
    rates = (f"{name} {cell['flop'] / t['median'] / 1e12:.0f}" for name, t in cell["times"].items())
    return f"TFLOP/s: {', '.join(rates)}"


def rates(cells: list[Cell]) -> list[str]:
    """What the device did by itself in the cells' turns; which peers did not run, and why."""
    lines = []
    for kind, how in (("peer", "in bursts"), ("sustained", "sustained")):
        products = [
            flop.matmul("gpu") / c["times"]["matmul"]["median"] / 1e12
            for c in chosen(cells, kind)
            if ran(c, "matmul")
        ]
        if products:
            lines += [f"8192³ product {how}: {min(products):.0f} to {max(products):.0f} TFLOP/s"]
    copies = [bars_cuda.copy_rate(c) for c in chosen(cells, "decode")]
    if copies:
        lines += [f"copy (x + 1), read and written: {min(copies):.0f} to {max(copies):.0f} GB/s"]
    refusals = {
        (name, t["refused"])
        for c in cells
        for name, t in c.get("times", {}).items()
        if name in PEERS and "refused" in t
    }
    return lines + [f"{name} did not run some cells: {reason}" for name, reason in sorted(refusals)]


def _figure(of: str) -> Callable[[list[Cell], Any], Any]:
    def draw(cells: list[Cell], plt: Any) -> Any:
        drawn = chosen(cells, "peer", of=of)
        names = tuple(name for name in PEERS if any(ran(c, name) for c in drawn))
        return draw_rates(drawn, names, plt, 1e12, "TFLOP/s, visible pairs only")

    return draw


SUITE = Suite(
    "cuda",
    "gpu",
    SECTIONS,
    bars_cuda.judge,
    verdict,
    rates,
    lambda cells: [*bars_cuda.peer_tables(cells), *published.table(cells)],
    {name: _figure(name) for name in ("matrix", "models", "published")} | {"decode": decode_cuda.draw_figure},
)
