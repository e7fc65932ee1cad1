"""The CPU suite: every promise about CPU speed measured beside what it is compared with.

python -m benchmarks --suite cpu                                 # all sections, one after the other
python -m benchmarks --suite cpu --sections decode,small --out out/cpu    # those, into the report that is there
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jax_flash

from . import measure, peers, report_cpu
from .bars import Cell, judge
from .cases import Case, flop, make_inputs, varlen
from .child import Child
from .sections import Suite, Timed, time_calls
from .stream import reader
from .training_step import training_calls

PEER_SETTLE = 0.2  # seconds: XLA frees up to gigabytes, and all that allocates is slow for a while
DTYPES = ("float32", "bfloat16")
SHAPES = {"s512": (4, 512, 4, 64), "s2048": (1, 2048, 8, 64), "s4096": (1, 4096, 8, 128)}
PASSES = {"forward": "forward", "both": "forward + backward"}


def shape_case(name: str, dtype: str, **options: Any) -> Case:
    b, s, h, d = SHAPES[name]
    return Case(
        f"b{b} s{s} h{h} d{d} {dtype}", b=b, sq=s, sk=s, hq=h, hk=h, d=d, dv=d, dtype=dtype, **options
    )


def ours(case: Case, pass_: str) -> tuple[measure.Call, list[Any]]:
    return peers.calls("jax_flash", case, pass_, [make_inputs(case)])


def peer_cells(shape: str, dtype: str, pass_: str, causal: bool) -> Iterator[Cell]:
    """This library, PyTorch, XLA and XLA's float32 product; with causal, beside the full call as well."""
    case = shape_case(shape, dtype, causal=causal)
    calls: Timed = {}
    refused = {}
    for name in ("jax_flash", "torch", "xla"):
        try:
            calls[name] = peers.calls(name, case, pass_, [make_inputs(case)])
        except peers.Refused as error:
            refused[name] = {"refused": str(error)}
    matmul, arguments, _ = measure.matmul_call("cpu", "float32")
    times = time_calls(calls | {"matmul": (matmul, arguments)}, 12.0, settle=PEER_SETTLE)
    yield {
        "kind": "peer",
        "name": f"{case.name}{' causal' if causal else ''} {PASSES[pass_]}",
        "dtype": dtype,
        "pass": pass_,
        "causal": causal,
        "rows": case.sq,
        "flop": flop(case, pass_),
        "times": times | refused,
    }
    if causal and case.sq >= 2048:
        yield shape_cell("causal", shape_case(shape, dtype), case, pass_)


def shape_cell(what: str, plain: Case, this: Case, pass_: str, budget: float = 3.0) -> Cell:
    times = time_calls({"plain": ours(plain, pass_), "this": ours(this, pass_)}, budget)
    name = f"{plain.name} {PASSES[pass_]}"
    return {"kind": "shape", "what": what, "name": name, "times": times}


def shape_cells() -> Iterator[Cell]:
    """GQA, documents of equal length, a narrow window on long rows."""
    for dtype in DTYPES:
        for pass_ in PASSES:
            heads = shape_case("s2048", dtype)
            yield shape_cell("GQA 8:1", heads, heads.replace(hk=1), pass_)
            batched = Case(f"b8 s512 h4 d64 {dtype}", b=8, sq=512, sk=512, hq=4, hk=4, d=64, dv=64)
            batched = batched.replace(dtype=dtype, causal=True)
            sizes = dict(hq=4, hk=4, d=64, dv=64, dtype=dtype, causal=True)
            yield shape_cell("equal documents", batched, varlen("documents", (512,) * 8, **sizes), pass_)
        long = Case(f"b1 s16384 h2 d64 {dtype}", b=1, sq=16384, sk=16384, hq=2, hk=2, d=64, dv=64)
        long = long.replace(dtype=dtype)
        narrow = long.replace(window=(256, 0))
        for pass_ in PASSES:
            yield shape_cell("window 256 at s 16,384", long, narrow, pass_, 4.0)


def option_cells(dtype: str) -> Iterator[Cell]:
    """Each option alone beside the plain call; FLOP are those of the keys that the band leaves."""
    plain = shape_case("s2048", dtype)
    s, h = plain.sq, plain.hq
    batch = plain.replace(b=2, sq=s // 2, sk=s // 2)
    sizes = dict(hq=h, hk=h, d=plain.d, dv=plain.d, dtype=dtype)
    pairs = {
        "window": (plain, plain.replace(window=(s // 4, s // 4))),
        "segments": (plain, plain.replace(segments=4)),
        "softcap": (plain, plain.replace(softcap=30.0)),
        "bias": (plain, plain.replace(bias=(1, h, s, s))),
        "ALiBi": (plain, plain.replace(alibi_slopes=(h,))),
        "sinks": (plain, plain.replace(sinks=True)),
        "lengths": (batch, batch.replace(kv_lengths=(s // 2, s // 4 + 77))),
        "varlen": (batch, varlen("documents", (700, 324, 1024), **sizes)),
        "dropout": (plain, plain.replace(dropout_rate=0.1)),
    }
    for what, (base, case) in pairs.items():
        for pass_, text in PASSES.items():
            times = time_calls({"plain": ours(base, pass_), "this": ours(case, pass_)}, 2.0)
            work = {"plain": flop(base, pass_), "this": flop(case, pass_)}
            name = f"{what} {dtype} {text}"
            yield {"kind": "option", "what": what, "name": name, "flop": work, "times": times}


def scaling_cells() -> Iterator[Cell]:
    """One thread, in a process bound to one core, against all."""
    with Child(cores=1) as one, Child(cores=2) as two:
        for dtype in DTYPES:
            for heads in (1, 2, 3):
                case = shape_case("s2048", dtype, causal=True).replace(hq=heads, hk=heads)
                for pass_, text in PASSES.items():
                    calls = {"1 thread": one.call(case, pass_), "2 threads": two.call(case, pass_)}
                    turns = [{name: call() for name, call in calls.items()} for _ in range(9)]
                    times = {name: [turn[name] for turn in turns] for name in calls}
                    timed = {name: measure.summary(t) for name, t in times.items()}
                    name = f"s2048 h{heads} d64 {dtype} causal {text}"
                    yield {"kind": "scaling", "name": name, "times": timed}


def decode_cells() -> Iterator[Cell]:
    """One query token over long caches: contiguous, and in scattered pages of 16, beside a streaming read."""
    b, s, hq, hk, d, page = 8, 4096, 32, 8, 128, 16
    read = reader()
    order = jax.random.permutation(jax.random.key(1), b * s // page)
    tables = {
        "contiguous": (s, jnp.arange(b, dtype=jnp.int32)[:, None]),
        "paged": (page, order.astype(jnp.int32).reshape(b, -1)),
    }
    lengths = jnp.full(b, s, jnp.int32)
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        wide = "bfloat16" if dtype == "float8_e4m3fn" else dtype
        keys = jax.random.split(jax.random.key(0), 3)
        query = jax.random.normal(keys[0], (b, 1, hq, d), wide)
        pools = [jax.random.normal(key, (b * s, hk, d), wide).astype(dtype) for key in keys[1:]]
        for layout, (slots, table) in tables.items():
            k, v = (pool.reshape(-1, slots, hk, d) for pool in pools)
            scales = dict(k_scale=jnp.ones(hk), v_scale=jnp.ones(hk)) if dtype != wide else {}
            call = jax.jit(lambda q, k, v, t, n, scales: jax_flash.paged_attention(q, k, v, t, n, **scales))
            times = time_calls(
                {"jax_flash": (call, [(query, k, v, table, lengths, scales)]), "read": (read, [(k, v)])}, 2.0
            )
            name = f"b{b} {hq}/{hk} d{d} keys {s} {dtype} {layout}"
            size = sum(pool.nbytes for pool in pools)
            cell = {"kind": "decode", "name": name, "dtype": dtype, "layout": layout, "bytes": size}
            yield cell | {"times": times}


def small_cells() -> Iterator[Cell]:
    """A call so small that what surrounds the arithmetic counts."""
    for dtype in DTYPES:
        for pass_, text in PASSES.items():
            case = Case(f"b1 s64 h4 d64 {dtype} {text}", b=1, sq=64, sk=64, hq=4, hk=4, d=64, dv=64)
            case = case.replace(dtype=dtype)
            calls = {
                name: peers.calls(name, case, pass_, [make_inputs(case)]) for name in ("jax_flash", "xla")
            }
            yield {"kind": "small", "name": case.name, "times": time_calls(calls, 2.0)}


def memory_cells() -> Iterator[Cell]:
    """Forward and backward at s = 32,768: what the process grows by, operands and results apart."""
    for dtype in DTYPES:
        s, d = 32768, 64
        case = Case(f"b1 s{s} h1 d{d} {dtype}", b=1, sq=s, sk=s, hq=1, hk=1, d=d, dv=d, dtype=dtype)
        with Child(cores=2) as child:
            yield {"kind": "memory", "name": f"{case.name} forward + backward", "bytes": child.growth(case)}


def training_cells() -> Iterator[Cell]:
    """A step of the example's training, by whose attention it uses."""
    times = time_calls(training_calls(("cpu", "xla")), 8.0)
    yield {"kind": "training", "name": "examples/train_lm.py, one step", "times": times}


SECTIONS: dict[str, Callable[[], Iterator[Cell]]] = {
    **{
        f"{shape} {dtype} {'causal ' if causal else ''}{pass_}": functools.partial(
            peer_cells, shape, dtype, pass_, causal
        )
        for shape in SHAPES
        for dtype in DTYPES
        for pass_ in PASSES
        for causal in (False, True)
    },
    **{f"options {dtype}": functools.partial(option_cells, dtype) for dtype in DTYPES},
    "shapes": shape_cells,
    "scaling": scaling_cells,
    "decode": decode_cells,
    "small": small_cells,
    "memory": memory_cells,
    "training": training_cells,
}
SUITE = Suite("cpu", "cpu", SECTIONS, judge, report_cpu.verdict, report_cpu.rates, figures=report_cpu.FIGURES)
