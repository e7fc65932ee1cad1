"""Decode and prefill over pages: the CUDA suite's cells of calls that are bound by the bytes of the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

from . import measure
from .bars import Cell
from .sections import draw_rates, time_calls

CHAIN = 8  # calls in one program
# batch, query heads, KV heads, head dim, keys
SHAPES = (
    *((24, 24, 24, 128, keys) for keys in (512, 1024, 2048, 4096, 8192)),
    (64, 32, 8, 128, 1024),
    (64, 32, 8, 128, 8192),
    (8, 32, 8, 128, 65536),
    (1, 32, 8, 128, 131072),
    (128, 64, 8, 128, 4096),
    (64, 8, 1, 256, 8192),
)


def _chained(call: Callable[..., Any]) -> measure.Call:
    return measure.chained(call, CHAIN)


def _draw(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
    wide = "bfloat16" if dtype.startswith("float8") else dtype
    return jax.random.normal(jax.random.key(seed), shape, wide).astype(dtype)


def _pages(k: jax.Array, v: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """Pools of scattered pages, block tables and lengths."""
    b, keys, hk, d = k.shape
    order = np.random.default_rng(0).permutation(b * keys // size).astype(np.int32)
    pools = (x.reshape(-1, size, hk, d) for x in (k, v))
    return (*pools, jnp.asarray(order.reshape(b, -1)), jnp.full(b, keys, jnp.int32))


def _cell(shape: tuple[int, ...], dtype: str, calls: dict[str, Any], refused: dict[str, Any]) -> Cell:
    """Times are those of one call of a chain."""
    b, hq, hk, d, keys = shape
    copy, arguments, copied = measure.copy_call("gpu")
    times = time_calls(calls | {"copy": (copy, arguments)}, 1.0)
    for name in calls:
        times[name]["median"] /= CHAIN
        times[name]["times"] = [t / CHAIN for t in times[name]["times"]]
    size = 2 * b * hk * d * keys * jnp.dtype(dtype).itemsize
    cell = {"kind": "decode", "name": f"b{b} {hq}/{hk} d{d} kv{keys} {dtype}", "dtype": dtype, "keys": keys}
    return cell | {"shape": shape, "bytes": size, "copied": copied, "times": times | refused}


def decode_cells() -> Iterator[Cell]:
    """One query token, bfloat16: contiguous, in pages, and cuDNN on contiguous keys."""
    for shape in SHAPES:
        b, hq, hk, d, keys = shape
        q, k, v = (
            _draw(dims, "bfloat16", i) for i, dims in enumerate([(b, 1, hq, d), *[(b, keys, hk, d)] * 2])
        )
        cudnn = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")  # noqa: E731
        calls = {"contiguous": (_chained(jax_flash.flash_attention), [(q, k, v)])}
        for size in (16, 64):
            calls[f"pages of {size}"] = (_chained(jax_flash.paged_attention), [(q, *_pages(k, v, size))])
        refused = {}
        try:
            call = _chained(cudnn)
            jax.block_until_ready(call(q, k, v))
            calls["cudnn"] = call, [(q, k, v)]
        except Exception as error:  # the peer may refuse a shape
            refused["cudnn"] = {"refused": f"{type(error).__name__}: {error}"[:200]}
        yield _cell(shape, "bfloat16", calls, refused)


def dtype_cells() -> Iterator[Cell]:
    """The other dtypes of pools: float8 under bfloat16 queries, and float32."""
    for shape in ((24, 24, 24, 128, 8192), (64, 32, 8, 128, 8192), (64, 32, 8, 128, 1024)):
        b, hq, hk, d, keys = shape
        for dtype, wide in (("float8_e4m3fn", "bfloat16"), ("float32", "float32"), ("float16", "float16")):
            q = _draw((b, 1, hq, d), wide, 0)
            k, v = (_draw((b, keys, hk, d), dtype, seed) for seed in (1, 2))
            scales = {"k_scale": jnp.ones(hk), "v_scale": jnp.ones(hk)} if dtype != wide else {}
            call = lambda q, *arrays, scales=scales: jax_flash.paged_attention(q, *arrays, **scales)  # noqa: E731
            calls = {f"pages of {size}": (_chained(call), [(q, *_pages(k, v, size))]) for size in (16, 64)}
            if not scales:
                calls["contiguous"] = (_chained(jax_flash.flash_attention), [(q, k, v)])
            yield _cell(shape, dtype, calls, {})


def prefill_cell(heads: tuple[int, int], d: int, causal: bool, b: int = 2, s: int = 4096) -> Cell:
    """Whole sequences over pages, and contiguous."""
    hq, hk = heads
    q, k, v = (_draw((b, s, h, d), "bfloat16", i) for i, h in enumerate((hq, hk, hk)))
    fixed = jax.jit(lambda q, k, v: jax_flash.flash_attention(q, k, v, causal=causal))
    paged = jax.jit(lambda *arrays: jax_flash.paged_attention(*arrays, causal=causal))
    calls = {"contiguous": (fixed, [(q, k, v)])}
    calls |= {f"pages of {size}": (paged, [(q, *_pages(k, v, size))]) for size in (16, 64)}
    name = f"prefill b{b} s{s} {hq}/{hk} d{d}{' causal' if causal else ''}"
    work = (2.0 if causal else 4.0) * b * hq * s * (s + causal) * d
    return {"kind": "prefill", "name": name, "d": d, "flop": work, "times": time_calls(calls, 1.0)}


def prefill_cells() -> Iterator[Cell]:
    for heads in ((16, 16), (32, 8)):
        yield prefill_cell(heads, 128, True)


def draw(cells: list[Cell], plt: Any) -> Any:
    """GB/s of keys and values, cell by cell."""
    chosen = [c | {"flop": c["bytes"]} for c in cells if c["kind"] == "decode"]
    names = ("contiguous", "pages of 16", "pages of 64", "cudnn")
    return draw_rates(chosen, names, plt, 1e9, "GB/s of keys and values")
