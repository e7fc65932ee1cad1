"""The CUDA suite: what the kernels promise about speed, each cell beside its peers and the device's own rates.

python -m benchmarks --suite cuda                                       # all sections
python -m benchmarks --suite cuda --sections "forward d128,decode"      # those, into the report that is there
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from . import bars_cuda, decode_cuda, measure, peers, seeds, small_cuda
from .bars import Cell
from .cases import Case, flop, make_inputs, varlen
from .sections import Suite, Timed, draw_rates, time_calls

TOKENS, WIDTH = 16384, 2048  # b · s, and heads · head dim
SUSTAINED = 0.3  # seconds
PEERS = ("jax_flash", "cudnn", "pallas", "mosaic", "tokamax")
DOCUMENTS = (100, 8000, 300, 2500, 1200, 4284)  # lengths of packed sequences, TOKENS in all


def fixed(d: int, s: int, causal: bool = False, **options: Any) -> Case:
    h = WIDTH // d
    name = f"d{d} s{s}{' causal' if causal else ''}"
    sizes = {
        "b": max(1, TOKENS // s),
        "sq": s,
        "sk": s,
        "hq": h,
        "hk": h,
        "d": d,
        "dv": d,
        "dtype": "bfloat16",
    }
    return Case(name, causal=causal, **(sizes | options))


def prepared(what: dict[str, tuple[str, Case, str]]) -> tuple[Timed, dict[str, Any]]:
    """name → (peer, case, pass), compiled side by side; and those that were refused, with their reasons."""
    inputs: dict[str, Any] = {}
    for _, case, _ in what.values():
        if case.name not in inputs:
            first = make_inputs(case, 0, on_device=True)
            copies = measure.copies_for((first.positional, first.dout), "gpu")
            others = (make_inputs(case, seed, on_device=True) for seed in range(1, copies))
            inputs[case.name] = [first, *others]

    def prepare(item: tuple[str, Case, str]) -> Any:
        peer, case, pass_ = item
        try:
            call, arguments = peers.calls(peer, case, pass_, inputs[case.name])
            jax.block_until_ready(call(*arguments[0]))
            return call, arguments
        except Exception as error:  # peers fail in ways of their own
            if peer == "jax_flash":
                raise
            return {"refused": f"{type(error).__name__}: {error}".split("\n")[0][:200]}

    with ThreadPoolExecutor() as pool:
        made = dict(zip(what, pool.map(prepare, what.values()), strict=True))
    return (
        {name: call for name, call in made.items() if isinstance(call, tuple)},
        {name: reason for name, reason in made.items() if isinstance(reason, dict)},
    )


def matmul(dtype: str = "bfloat16") -> tuple[measure.Call, list[Any]]:
    call, arguments, _ = measure.matmul_call("gpu", dtype)
    return call, arguments


def peer_cell(case: Case, pass_: str, names: tuple[str, ...] = PEERS, **tags: Any) -> Cell:
    """These implementations and the matrix product, in turns."""
    calls, refused = prepared({name: (name, case, pass_) for name in names})
    times = time_calls(calls | {"matmul": matmul(case.dtype)}, 1.0)
    name = f"{case.name} {pass_}"
    cell = {"kind": "peer", "name": name, "pass": pass_, "d": case.d, "s": case.sq, "causal": case.causal}
    return cell | tags | {"flop": flop(case, pass_), "times": times | refused}


def matrix_cells(pass_: str, d: int) -> Iterator[Cell]:
    for s in (1024, 4096, 16384):
        for causal in (False, True):
            yield peer_cell(fixed(d, s, causal), pass_, of="matrix")


def sustained_cell(pass_: str, case: Case, seconds: float, peers: tuple[str, ...] = ()) -> Cell:
    """This library, the matrix product and peers, each for as long as it takes the device to settle at its clock."""
    calls, _ = prepared({name: (name, case, pass_) for name in ("jax_flash", *peers)})
    times = measure.interleaved(calls | {"matmul": matmul(case.dtype)}, 3, seconds, most=10000)
    cell = {"kind": "sustained", "name": f"{case.name} {pass_}", "pass": pass_, "d": case.d, "s": case.sq}
    timed = {name: measure.summary(t) for name, t in times.items()}
    return cell | {"causal": case.causal, "flop": flop(case, pass_), "times": timed}


def sustained_cells() -> Iterator[Cell]:
    for pass_, d, causal in bars_cuda.OF_MATMUL:
        for s in (4096, 16384):
            yield sustained_cell(pass_, fixed(d, s, causal), SUSTAINED)


def ours_cell(what: str, plain: Case, this: Case, pass_: str = "forward") -> Cell:
    """This library on two cases in turns: what an option or a shape costs for the same FLOP."""
    calls, _ = prepared({"plain": ("jax_flash", plain, pass_), "this": ("jax_flash", this, pass_)})
    work = {"plain": flop(plain, pass_), "this": flop(this, pass_)}
    cell = {"kind": "ratio", "what": what, "d": plain.d, "name": f"{this.name} {pass_}"}
    return cell | {"flop": work, "times": time_calls(calls, 0.8)}


def option_cells(d: int) -> Iterator[Cell]:
    """Each option beside the plain forward, s 4096, full."""
    plain = fixed(d, 4096)
    s = plain.sq
    options: dict[str, dict[str, Any]] = {
        "bias": {"bias": (1, 1, s, s), "bias_dtype": "bfloat16"},
        "bias of each head": {"bias": (1, plain.hq, s, s), "bias_dtype": "bfloat16"},
        "alibi": {"alibi_slopes": (plain.hq,)},
        "softcap": {"softcap": 20.0},
        "dropout": {"dropout_rate": 0.1},
        "sinks": {"sinks": True},
        "segments": {"segments": 4},
    }
    for what, option in options.items():
        yield ours_cell(what, plain, plain.replace(name=f"{plain.name} {what}", **option))


def packed_cells(passes: tuple[str, ...]) -> Iterator[Cell]:
    """Documents of 100 to 8,000 tokens beside fixed sequences of 4,096."""
    for d in (64, 128, 256):
        for causal in (False, True):
            for pass_ in passes:
                plain = fixed(d, 4096, causal)
                sizes = {"hq": plain.hq, "hk": plain.hk, "d": d, "dv": d, "dtype": plain.dtype}
                name = f"d{d} documents{' causal' if causal else ''}"
                yield ours_cell(
                    f"packed {pass_}", plain, varlen(name, DOCUMENTS, causal=causal, **sizes), pass_
                )


def shape_cells(d: int) -> Iterator[Cell]:
    """GQA, a window, odd lengths."""
    plain, long = fixed(d, 4096), fixed(d, 16384)
    hk = max(1, plain.hq // 8)
    yield ours_cell(f"GQA {plain.hq // hk}:1", plain, plain.replace(name=f"{plain.name} hk{hk}", hk=hk))
    yield ours_cell("window 1024", long, long.replace(name=f"{long.name} window", window=(1024, 0)))
    for s, odd in ((4096, 4001), (1024, 1000), (768, 777)):
        near = fixed(d, s, b=TOKENS // s)
        yield ours_cell(f"s {odd}", near, near.replace(name=f"d{d} s{odd}", sq=odd, sk=odd))


def seed_cells() -> Iterator[Cell]:
    """The shapes of the tables of this library's predecessors."""
    for case in seeds.cases():
        yield peer_cell(case, "forward", PEERS[:2], of="seeds")


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    **{
        f"{pass_} d{d}": functools.partial(matrix_cells, pass_, d)
        for pass_ in ("forward", "backward")
        for d in (64, 128, 256)
    },
    "sustained": sustained_cells,
    **{f"options d{d}": functools.partial(option_cells, d) for d in (64, 128, 256)},
    "packed": functools.partial(packed_cells, ("forward", "backward")),
    "shapes": functools.partial(shape_cells, 128),
    "small": small_cuda.small_cells,
    "decode": decode_cuda.decode_cells,
    "decode dtypes": decode_cuda.dtype_cells,
    "prefill": decode_cuda.prefill_cells,
    "seeds": seed_cells,
}


def verdict(cell: Cell) -> str:
    match cell["kind"]:
        case "peer" | "sustained":
            known = [name for name in PEERS[1:] if "median" in cell["times"].get(name, {})]
            shown = [f"× {name} {bars_cuda.speedup(cell, name):.2f}" for name in known]
            rate = cell["flop"] / cell["times"]["jax_flash"]["median"] / 1e12
            return ", ".join([f"{rate:.0f} TFLOP/s", f"{bars_cuda.of_matmul(cell):.3f} of matmul", *shown])
        case "ratio":
            return f"{bars_cuda.rate_of_plain(cell):.3f} of the plain rate"
        case "small" | "host":
            return small_cuda.verdict(cell)
        case "decode":
            shares = (f"{name} {x:.2f}" for name, x in bars_cuda.shares_of_copy(cell).items())
            return f"of a copy at {bars_cuda.copy_rate(cell):.0f} GB/s: {', '.join(shares)}"
    rates = (f"{name} {cell['flop'] / t['median'] / 1e12:.0f}" for name, t in cell["times"].items())
    return f"TFLOP/s: {', '.join(rates)}"


def rates(cells: list[Cell]) -> list[str]:
    bursts, long = (
        [2 * 8192**3 / c["times"]["matmul"]["median"] / 1e12 for c in cells if c["kind"] == kind]
        for kind in ("peer", "sustained")
    )
    copies = [bars_cuda.copy_rate(c) for c in cells if c["kind"] == "decode"]
    lines = []
    for products, how in ((bursts, "in short bursts with rests"), (long, "sustained")):
        if products:
            lines += [f"8192³ product {how}: {min(products):.0f} to {max(products):.0f} TFLOP/s"]
    if copies:
        lines += [f"copy (x + 1), read and written: {min(copies):.0f} to {max(copies):.0f} GB/s"]
    refusals = {
        (name, t["refused"])
        for c in cells
        for name, t in c["times"].items()
        if name in PEERS and "refused" in t
    }
    return lines + [f"{name} did not run some cells: {reason}" for name, reason in sorted(refusals)]


def _figure(of: str) -> Callable[[list[Cell], Any], Any]:
    def draw(cells: list[Cell], plt: Any) -> Any:
        chosen = [c for c in cells if c["kind"] == "peer" and c["of"] == of]
        names = tuple(n for n in PEERS if any("median" in c["times"].get(n, {}) for c in chosen))
        return draw_rates(chosen, names, plt, 1e12, "TFLOP/s, visible pairs only")

    return draw


SUITE = Suite(
    "cuda",
    "gpu",
    SECTIONS,
    bars_cuda.judge,
    verdict,
    rates,
    lambda cells: [*bars_cuda.peer_tables(cells), *seeds.table(cells)],
    {"matrix": _figure("matrix"), "seeds": _figure("seeds"), "decode": decode_cuda.draw},
)
