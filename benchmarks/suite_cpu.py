"""The CPU suite: the speed of the CPU kernels against PyTorch, XLA, a matrix product and a read of memory.

python -m benchmarks --suite cpu                                 # all sections, one after the other
python -m benchmarks --suite cpu --sections decode,small --out out/cpu    # these, into the report of out/cpu
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash

from . import cases, flop, measure, peers
from .bars import Cell, chosen
from .bars_cpu import TEXT, judge, verdict
from .cases import Case, make_inputs
from .child import Child
from .report import draw_rates
from .stream import reader
from .suite import Suite
from .training_step import training_calls

PAUSE = 0.01  # seconds of rest, in which the threads of the library that was called before stop spinning
SETTLE = 0.001  # seconds of untimed calls after the rest
BURST, TURNS_AT_LEAST, TURNS_AT_MOST = 0.05, 3, 15
# Seconds of untimed calls, since allocations are slow for a while after XLA has freed gigabytes.
PEER_SETTLE = 0.2
PASSES = ("forward", "both")


def time_calls(calls: measure.Calls, budget: float = 3.0, settle: float = SETTLE) -> dict[str, Any]:
    """Summaries of calls that alternate, within about `budget` seconds.

    Calls on a CPU may last seconds, and power does not limit them, so only `settle` seconds of calls are not timed, and
    each burst follows a rest.
    """
    once = sum(min(measure.interleaved({name: call}, 1, 0.0, settle=0)[name]) for name, call in calls.items())
    burst = min(BURST, budget / TURNS_AT_MOST / len(calls))
    turn = max(once, settle * len(calls)) + max(once, burst * len(calls))
    turns = max(TURNS_AT_LEAST, min(TURNS_AT_MOST, int(budget / turn)))
    times = measure.interleaved(calls, turns, burst, PAUSE, settle)
    return {name: measure.summary(t) for name, t in times.items()}


def ours(case: Case, pass_: str) -> tuple[measure.Call, list[Any]]:
    return peers.calls("jax_flash", case, pass_, [make_inputs(case)])


def peer_cells(shape: str, dtype: str, pass_: str, causal: bool) -> Iterator[Cell]:
    """This library, PyTorch, XLA and the float32 product of XLA; with causal, the call without a mask as well."""
    case = cases.cpu_case(shape, dtype, causal=causal)
    calls: measure.Calls = {}
    refused = {}
    for name in ("jax_flash", "torch", "xla"):
        try:
            calls[name] = peers.calls(name, case, pass_, [make_inputs(case)])
        except peers.Refused as error:
            refused[name] = {"refused": str(error)}
    calls["matmul"] = measure.matmul_call("cpu", "float32")
    times = time_calls(calls, 12.0, settle=PEER_SETTLE)
    yield {
        "kind": "peer",
        "name": f"{case.name}{' causal' if causal else ''} {TEXT[pass_]}",
        "dtype": dtype,
        "pass": pass_,
        "causal": causal,
        "rows": case.sq,
        "flop": flop.attention(case, pass_),
        "product": flop.matmul("cpu"),
        "times": times | refused,
    }
    if causal and case.sq >= 2048:
        yield shape_cell("causal", cases.cpu_case(shape, dtype), case, pass_)


def shape_cell(what: str, plain: Case, this: Case, pass_: str) -> Cell:
    times = time_calls({"plain": ours(plain, pass_), "this": ours(this, pass_)}, 3.0)
    name = f"{plain.name} {TEXT[pass_]}"
    return {"kind": "shape", "what": what, "name": name, "times": times}


def shape_cells() -> Iterator[Cell]:
    """GQA, documents of equal length, a narrow window on long rows."""
    for dtype in cases.CPU_DTYPES:
        for what, (plain, this) in cases.cpu_pairs(dtype).items():
            for pass_ in PASSES:
                yield shape_cell(what, plain, this, pass_)


def option_cells(dtype: str) -> Iterator[Cell]:
    """The plain call and the call with one option."""
    for what, (plain, this) in cases.cpu_options(dtype).items():
        for pass_ in PASSES:
            times = time_calls({"plain": ours(plain, pass_), "this": ours(this, pass_)}, 2.0)
            work = {"plain": flop.attention(plain, pass_), "this": flop.attention(this, pass_)}
            name = f"{what} {dtype} {TEXT[pass_]}"
            yield {"kind": "option", "what": what, "name": name, "flop": work, "times": times}


def tangent_cells(shape: str, dtype: str) -> Iterator[Cell]:
    """Out and its tangent in forward mode, the forward alone, and out and its tangent in XLA."""
    for causal in (False, True):
        case = cases.cpu_case(shape, dtype, causal=causal)
        calls: measure.Calls = {
            "jax_flash": ours(case, "jvp"),
            "forward": ours(case, "forward"),
            "xla": peers.calls("xla", case, "jvp", [make_inputs(case)]),
        }
        times = time_calls(calls, 12.0, settle=PEER_SETTLE)
        name = f"{case.name}{' causal' if causal else ''} {TEXT['jvp']}"
        yield {"kind": "tangent", "name": name, "flop": flop.attention(case, "jvp"), "times": times}


def scaling_cells() -> Iterator[Cell]:
    """One thread, in a process bound to one core, against two."""
    with Child(cores=1) as one, Child(cores=2) as two:
        for dtype in cases.CPU_DTYPES:
            for heads in (1, 2, 3):
                case = cases.cpu_case("s2048", dtype, causal=True).replace(hq=heads, hk=heads)
                for pass_ in PASSES:
                    calls = {"1 thread": one.call(case, pass_), "2 threads": two.call(case, pass_)}
                    turns = [{name: call() for name, call in calls.items()} for _ in range(9)]
                    times = {name: measure.summary([turn[name] for turn in turns]) for name in calls}
                    name = f"s2048 h{heads} d64 {dtype} causal {TEXT[pass_]}"
                    yield {"kind": "scaling", "name": name, "times": times}


def decode_cells() -> Iterator[Cell]:
    """One query token over long caches, contiguous and in scattered pages, and a streaming read."""
    read = reader()
    for dtype in cases.CPU_DECODE_DTYPES:
        for layout in ("contiguous", "paged"):
            arguments = decode_arguments(dtype, layout)
            calls: measure.Calls = {
                "jax_flash": (decode_call(jax_flash, dtype), [arguments]),
                "read": (read, [arguments[1:3]]),
            }
            name = cases.decode_name(cases.CPU_DECODE)
            size = sum(pool.nbytes for pool in arguments[1:3])
            cell = {"kind": "decode", "name": f"{name} {dtype} {layout}", "dtype": dtype, "layout": layout}
            yield cell | {"bytes": size, "times": time_calls(calls, 2.0)}


def decode_arguments(dtype: str, layout: str) -> tuple[Any, ...]:
    """Query, pools of keys and values, block tables, lengths; contiguous: one page for each sequence."""
    b, hq, hk, d, s = cases.CPU_DECODE
    wide = "bfloat16" if dtype == "float8_e4m3fn" else dtype
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (b, 1, hq, d), wide)
    slots = s if layout == "contiguous" else cases.CPU_PAGE
    k, v = (jax.random.normal(key, (b * s, hk, d), wide).astype(dtype) for key in keys[1:])
    order = jax.random.permutation(jax.random.key(1), b * s // slots)
    pools = (x.reshape(-1, slots, hk, d) for x in (k, v))
    return query, *pools, order.astype(jnp.int32).reshape(b, -1), jnp.full(b, s, jnp.int32)


def decode_call(package: Any, dtype: str) -> measure.Call:
    hk = cases.CPU_DECODE[2]
    scales = {"k_scale": jnp.ones(hk), "v_scale": jnp.ones(hk)} if dtype == "float8_e4m3fn" else {}
    return jax.jit(lambda *arrays: package.paged_attention(*arrays, **scales))


def small_cells() -> Iterator[Cell]:
    for dtype in cases.CPU_DTYPES:
        for pass_ in PASSES:
            case = cases.cpu_small(dtype)
            calls = {
                name: peers.calls(name, case, pass_, [make_inputs(case)]) for name in ("jax_flash", "xla")
            }
            name = f"{case.name} {TEXT[pass_]}"
            yield {"kind": "small", "name": name, "times": time_calls(calls, 2.0)}


def memory_cells() -> Iterator[Cell]:
    """The bytes that the process grows by in forward and backward at s = 32,768, without operands and results."""
    for dtype in cases.CPU_DTYPES:
        s, d = 32768, 64
        case = Case(f"b1 s{s} h1 d{d} {dtype}", b=1, sq=s, sk=s, hq=1, hk=1, d=d, dv=d, dtype=dtype)
        with Child(cores=2) as child:
            yield {"kind": "memory", "name": f"{case.name} {TEXT['both']}", "bytes": child.growth(case)}


def training_cells() -> Iterator[Cell]:
    """A training step of the example, by implementation of its attention."""
    times = time_calls(training_calls(("cpu", "xla")), 8.0)
    yield {"kind": "training", "name": "examples/train_lm.py, one step", "times": times}


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    **{
        f"{shape} {dtype} {'causal ' if causal else ''}{pass_}": functools.partial(
            peer_cells, shape, dtype, pass_, causal
        )
        for shape in cases.CPU_SHAPES
        for dtype in cases.CPU_DTYPES
        for pass_ in PASSES
        for causal in (False, True)
    },
    **{f"options {dtype}": functools.partial(option_cells, dtype) for dtype in cases.CPU_DTYPES},
    **{
        f"tangent {shape} {dtype}": functools.partial(tangent_cells, shape, dtype)
        for shape in ("s2048", "s4096")
        for dtype in cases.CPU_DTYPES
    },
    "shapes": shape_cells,
    "scaling": scaling_cells,
    "decode": decode_cells,
    "small": small_cells,
    "memory": memory_cells,
    "training": training_cells,
}


def rates(cells: list[Cell]) -> list[str]:
    matmul = [c["product"] / c["times"]["matmul"]["median"] / 1e9 for c in chosen(cells, "peer")]
    if not matmul:
        return []
    return [f"XLA's float32 product in the cells' turns: {min(matmul):.0f} to {max(matmul):.0f} GFLOP/s"]


def _peers(cells: list[Cell], plt: Any) -> Any:
    return draw_rates(chosen(cells, "peer"), ("jax_flash", "torch", "xla"), plt)


SUITE = Suite(
    "cpu",
    "cpu",
    SECTIONS,
    judge,
    verdict,
    rates,
    figures={"peers": _peers},
    command=("--suite", "cpu"),
)
