"""Decode and prefill over pages: the CUDA suite's cells of calls that are bound by the bytes of the keys.

Decode's calls are chained, CHAIN in one program, and a cell's times are those of one call. Beside them a device copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

from . import cases, flop, measure
from .bars import Cell, chosen
from .cases import Case
from .peers import why
from .sections import draw_rates, time_calls

CHAIN = 8
EVERY_KIND = 8192  # keys of the shapes at which every kind of call is timed, not only the usual ones

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of query and arrays, and these arrays


@functools.lru_cache(maxsize=1)
def draw(shape: tuple[int, ...], dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, keys and values of a decode shape."""
    b, hq, hk, d, keys = shape
    wide = "bfloat16" if dtype.startswith("float8") else dtype
    dims = ((b, 1, hq, d), (b, keys, hk, d), (b, keys, hk, d))
    keys_of = (jax.random.key(seed, impl="rbg") for seed in range(3))  # the caches may fill gigabytes
    q, k, v = (jax.random.normal(key, x, wide) for key, x in zip(keys_of, dims, strict=True))
    return q, k.astype(dtype), v.astype(dtype)


def scattered(k: jax.Array, v: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """Pools of pages in random order, block tables and lengths."""
    b, keys, hk, d = k.shape
    order = np.random.default_rng(0).permutation(b * keys // size).astype(np.int32)
    pools = (x.reshape(-1, size, hk, d) for x in (k, v))
    return (*pools, jnp.asarray(order.reshape(b, -1)), jnp.full(b, keys, jnp.int32))


def ragged_lengths(shape: tuple[int, ...]) -> np.ndarray:
    """Lengths from 16 to all keys, log-uniform."""
    b, _, _, _, keys = shape
    return np.exp(np.random.default_rng(1).uniform(np.log(16), np.log(keys), b)).astype(np.int32)


def contiguous(package: ModuleType, shape: tuple[int, ...]) -> Call:
    return lambda q, k, v: package.flash_attention(q, k, v), draw(shape)


def paged(package: ModuleType, shape: tuple[int, ...], size: int, **options: Any) -> Call:
    q, k, v = draw(shape)
    return lambda *x: package.paged_attention(*x, **options), (q, *scattered(k, v, size))


def ragged(package: ModuleType, shape: tuple[int, ...]) -> Call:
    call, (*arrays, _) = paged(package, shape, 64)
    return call, (*arrays, jnp.asarray(ragged_lengths(shape)))


def packed(package: ModuleType, shape: tuple[int, ...]) -> Call:
    """The query tokens as packed sequences of one token each."""
    starts = jnp.arange(shape[0] + 1, dtype=jnp.int32)

    def call(q: jax.Array, *arrays: Any) -> Any:
        return package.paged_attention(q[:, 0], *arrays, cu_seqlens_q=starts)[:, None]

    return call, paged(package, shape, 64)[1]


def float8(package: ModuleType, shape: tuple[int, ...]) -> Call:
    q, k, v = draw(shape)
    scales = {"k_scale": jnp.ones(shape[2]), "v_scale": jnp.ones(shape[2])}
    pools = scattered(k.astype(jnp.float8_e4m3fn), v.astype(jnp.float8_e4m3fn), 64)
    return lambda *x: package.paged_attention(*x, **scales), (q, *pools)


def several_queries(package: ModuleType, shape: tuple[int, ...], count: int = 4) -> Call:
    """Some query tokens of each sequence, as with speculative decoding."""
    call, (q, *arrays) = paged(package, shape, 64)
    return call, (jnp.repeat(q, count, axis=1), *arrays)


def kinds(package: ModuleType, shape: tuple[int, ...]) -> dict[str, Callable[[], Call]]:
    """The kinds of calls that are timed at a shape, in bfloat16; made one by one, as pools may be large."""
    made: dict[str, Callable[[], Call]] = {"contiguous": lambda: contiguous(package, shape)}
    for size in (16, 64, 1) if shape[4] == EVERY_KIND else (16, 64):
        made[f"pages of {size}"] = functools.partial(paged, package, shape, size)
    if shape[4] == EVERY_KIND:
        made["packed"] = lambda: packed(package, shape)
        made["batch invariant"] = lambda: paged(package, shape, 64, batch_invariant=True)
        made["ragged"] = lambda: ragged(package, shape)
    return made


def chained(call: Call, count: int = CHAIN) -> tuple[measure.Call, list[Any]]:
    function, arguments = call
    return measure.chained(function, count), [arguments]


def _cell(
    shape: tuple[int, ...], dtype: str, calls: measure.Calls, refused: dict[str, Any] | None = None
) -> Cell:
    """Bytes read are those of the keys and values that a call sees."""
    b, _, hk, d, keys = shape
    copy, arguments, copied = measure.copy_call("gpu")
    times = time_calls(calls | {"copy": (copy, arguments)})
    times = measure.of_one(times, CHAIN) | {"copy": times["copy"]}
    itemsize = jnp.dtype(dtype).itemsize
    seen = {name: ragged_lengths(shape).mean() if name == "ragged" else keys for name in calls}
    sizes = {name: flop.kv_bytes(b, hk, d, float(seen[name]), itemsize) for name in calls}
    name = f"{cases.decode_name(shape)} {dtype}"
    cell = {"kind": "decode", "name": name, "dtype": dtype, "keys": keys, "shape": shape}
    return cell | {"bytes_read": sizes, "copied": copied, "times": times | (refused or {})}


def decode_cells() -> Iterator[Cell]:
    """One query token, bfloat16: contiguous, in pages, and cuDNN on contiguous keys."""
    for shape in (*cases.DECODE, *cases.DECODE_BETWEEN):
        calls = {name: chained(make()) for name, make in kinds(jax_flash, shape).items()}
        refused = {}
        try:
            call = measure.chained(
                lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), CHAIN
            )
            jax.block_until_ready(call(*draw(shape)))
            calls["cudnn"] = call, [draw(shape)]
        except Exception as error:  # cuDNN has errors of its own
            refused["cudnn"] = {"refused": why(error)}
        yield _cell(shape, "bfloat16", calls, refused)


def dtype_cells() -> Iterator[Cell]:
    """The other dtypes of pools: float8 under bfloat16 queries, float32, float16."""
    for shape in ((24, 24, 24, 128, 8192), (64, 32, 8, 128, 8192), (64, 32, 8, 128, 1024)):
        for dtype in ("float8_e4m3fn", "float32", "float16"):
            q, k, v = draw(shape, dtype)
            scaled = dtype.startswith("float8")
            scales = {"k_scale": jnp.ones(shape[2]), "v_scale": jnp.ones(shape[2])} if scaled else {}
            call = functools.partial(jax_flash.paged_attention, **scales)
            calls = {f"pages of {size}": chained((call, (q, *scattered(k, v, size)))) for size in (16, 64)}
            if not scaled:
                calls["contiguous"] = chained((jax_flash.flash_attention, (q, k, v)))
            yield _cell(shape, dtype, calls)


def prefill(package: ModuleType, case: Case, size: int | None) -> tuple[measure.Call, list[Any]]:
    """Whole sequences over pages of some size; None: contiguous."""
    dims = ((case.b, case.sq, case.hq, case.d), *[(case.b, case.sk, case.hk, case.d)] * 2)
    q, k, v = (jax.random.normal(jax.random.key(i), x, case.dtype) for i, x in enumerate(dims))
    call = package.flash_attention if size is None else package.paged_attention
    arguments = (q, k, v) if size is None else (q, *scattered(k, v, size))
    return jax.jit(functools.partial(call, causal=case.causal)), [arguments]


def prefill_cell(heads: tuple[int, int], d: int, causal: bool, b: int = 2, s: int = 4096) -> Cell:
    hq, hk = heads
    name = f"prefill b{b} s{s} {hq}/{hk} d{d}{' causal' if causal else ''}"
    case = Case(name, b=b, sq=s, sk=s, hq=hq, hk=hk, d=d, dv=d, dtype="bfloat16", causal=causal)
    sizes = {"contiguous": None, "pages of 16": 16, "pages of 64": 64}
    calls = {name: prefill(jax_flash, case, size) for name, size in sizes.items()}
    cell = {"kind": "prefill", "name": name, "d": d, "flop": flop.attention(case, "forward")}
    return cell | {"times": time_calls(calls)}


def prefill_cells() -> Iterator[Cell]:
    for heads in ((16, 16), (32, 8)):
        yield prefill_cell(heads, 128, True)


def draw_figure(cells: list[Cell], plt: Any) -> Any:
    """GB/s of keys and values, cell by cell."""
    decode = [c | {"flop": c["bytes_read"]["pages of 64"]} for c in chosen(cells, "decode")]
    names = ("contiguous", "pages of 16", "pages of 64", "cudnn")
    return draw_rates(decode, names, plt, 1e9, "GB/s of keys and values")
