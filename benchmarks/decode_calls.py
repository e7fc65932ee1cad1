"""Calls of decode and of prefill over pages, for the peers' suite and for comparisons of two checkouts.

Each function takes the package that it calls: jax_flash of this checkout or of another one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import measure
from .cases import Case

CHAIN = 8  # calls of decode in one program
SHORTEST = 16  # keys of ragged batches

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of query and arrays, and these arrays


@functools.lru_cache(maxsize=1)
def draw(shape: tuple[int, ...], dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query, keys and values of a decode shape."""
    b, hq, hk, d, keys = shape
    dims = ((b, 1, hq, d), (b, keys, hk, d), (b, keys, hk, d))
    # rbg is fast; the caches may fill gigabytes
    seeds = (jax.random.key(seed, impl="rbg") for seed in range(3))
    q, k, v = (jax.random.normal(seed, x, dtype) for seed, x in zip(seeds, dims, strict=True))
    return q, k, v


def scattered(k: jax.Array, v: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """Pools of pages in random order, block tables and lengths."""
    b, keys, hk, d = k.shape
    order = np.random.default_rng(0).permutation(b * keys // size).astype(np.int32)
    pools = (x.reshape(-1, size, hk, d) for x in (k, v))
    return (*pools, jnp.asarray(order.reshape(b, -1)), jnp.full(b, keys, jnp.int32))


def contiguous(package: ModuleType, shape: tuple[int, ...]) -> Call:
    return lambda q, k, v: package.flash_attention(q, k, v), draw(shape)


def paged(
    package: ModuleType, shape: tuple[int, ...], size: int, dtype: str = "bfloat16", **options: Any
) -> Call:
    q, k, v = draw(shape, dtype)
    return lambda *x: package.paged_attention(*x, **options), (q, *scattered(k, v, size))


def ragged(package: ModuleType, shape: tuple[int, ...]) -> tuple[Call, float]:
    """Lengths from SHORTEST to all keys, log-uniform, in scattered pages of 64; and the mean number of keys."""
    b, hq, hk, d, longest = shape
    size, rng = 64, np.random.default_rng(1)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(longest), b)).astype(np.int32)
    counts = -(-lengths // size)
    tables = np.zeros((b, longest // size), np.int32)
    order = iter(rng.permutation(int(counts.sum())))
    for row, count in zip(tables, counts, strict=True):
        row[:count] = [next(order) for _ in range(count)]
    pools = (int(counts.sum()), size, hk, d)
    keys = (jax.random.key(seed, impl="rbg") for seed in range(3))
    dims = ((b, 1, hq, d), pools, pools)
    q, k, v = (jax.random.normal(key, x, jnp.bfloat16) for key, x in zip(keys, dims, strict=True))
    arrays = (q, k, v, jnp.asarray(tables), jnp.asarray(lengths))
    return (package.paged_attention, arrays), float(lengths.mean())


def packed(package: ModuleType, shape: tuple[int, ...]) -> Call:
    """The query tokens, as packed sequences of one token each."""
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


LATENT = (64, 8192, 64)  # sequences, keys and page size over latent pools
LATENT_DIM, LATENT_VALUES = 576, 512  # columns of K and of V


def latent(package: ModuleType, heads: int, columns: int = LATENT_DIM) -> Call:
    """DeepSeek's absorbed decode: one latent KV head, stored once, whose first 512 columns are the values."""
    b, keys, size = LATENT
    k = jax.random.normal(jax.random.key(0, impl="rbg"), (b * keys // size, size, 1, columns), jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1, impl="rbg"), (b, 1, heads, columns), jnp.bfloat16)
    order = np.random.default_rng(0).permutation(len(k)).astype(np.int32).reshape(b, -1)

    def call(q: Any, pool: Any, tables: Any, lengths: Any) -> Any:
        options: dict[str, Any] = {"value_dim": LATENT_VALUES, "scale": 192**-0.5}
        out = package.paged_attention(q, pool, None, tables, lengths, **options)
        return jnp.concatenate([out, q[..., LATENT_VALUES:]], -1)  # the next call's query

    return call, (q, k, jnp.asarray(order), jnp.full(b, keys, jnp.int32))


def chained(call: Call, count: int = CHAIN) -> tuple[measure.Call, list[Any]]:
    function, arguments = call
    return measure.chained(function, count), [arguments]


def prefill(
    package: ModuleType, case: Case, size: int | None, **options: Any
) -> tuple[measure.Call, list[Any]]:
    """Whole sequences over pages of this size, or over contiguous keys if it is None."""
    dims = ((case.b, case.sq, case.hq, case.d), *[(case.b, case.sk, case.hk, case.d)] * 2)
    q, k, v = (jax.random.normal(jax.random.key(i), x, case.dtype) for i, x in enumerate(dims))
    call = package.flash_attention if size is None else package.paged_attention
    arguments = (q, k, v) if size is None else (q, *scattered(k, v, size))
    return jax.jit(functools.partial(call, causal=case.causal, **options)), [arguments]
