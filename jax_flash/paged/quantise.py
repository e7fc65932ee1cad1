"""The elements of float8 pools, and the scales that `append_kv(scale="dynamic")` keeps (as csrc/core/float8.h does).

A page's scale is the smallest power of two that brings the largest of its finite elements into the float8 dtype's
range. When a page begins, at slot 0, it is the scale of the first token. It grows with later tokens: earlier ones are
then requantised, which is exact for a power of two except for numbers that become subnormal. So however often it grows,
|stored · scale − x| ≤ |x| / 16 + scale / 512 for float8_e4m3fn, |x| / 8 + scale / 65536 for float8_e5m2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from .._jax import is_symbolic, same_dim
from ..indexing import take
from .gather import FLOAT8

SMALLEST = -100  # the exponent of the smallest scale, which a page of zeros has
# log2 of the largest number of a dtype, 1.75 · 2^…
_LARGEST_EXPONENT = {dtype: {448.0: 8, 57344.0: 15}[largest] for dtype, largest in FLOAT8.items()}


def scale_for(largest: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The smallest power of two with largest ≤ scale · the dtype's largest number, for finite float32 largest ≥ 0."""
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    rounded_up = (bits + 0x1FFFFF) >> 23  # the exponent is one more where the mantissa exceeds 1.75
    exponent = jnp.maximum(rounded_up - _LARGEST_EXPONENT[dtype], 127 + SMALLEST)
    return lax.bitcast_convert_type(exponent << 23, jnp.float32)


def append(
    pool: jax.Array, scale: jax.Array, rows: jax.Array, page: jax.Array, slot: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A pool `[p, ps, hk, d]` and its scales `[p, hk]` after rows `[t, hk, d]` went to (page, slot), each `[t]`.

    Rows whose page is p are dropped.
    """
    if same_dim(pool.shape[0], 0) or same_dim(rows.shape[0], 0):
        return pool, scale
    pages, page_size = pool.shape[:2]
    wide = rows.astype(jnp.float32)
    largest = jnp.max(jnp.abs(jnp.where(jnp.isfinite(wide), wide, 0)), axis=-1, initial=0)  # [t, hk]
    needed = scale_for(jnp.zeros(scale.shape, jnp.float32).at[page].max(largest, mode="drop"), pool.dtype)
    # The first slot of each page that is written.
    first = jnp.full(pages, page_size, jnp.int32).at[page].min(slot, mode="drop")
    continues = ((first > 0) & (first < page_size))[:, None] & (scale > 0) & jnp.isfinite(scale)
    before = jnp.where(continues, scale, 0)
    after = jnp.where((first < page_size)[:, None], jnp.maximum(before, needed), scale)
    pool = _requantised(pool, before / after, first, page)
    by_row = take(after, page, 1)
    return pool.at[page, slot].set(stored(rows, by_row, pool.dtype), mode="drop"), after


def _requantised(pool: jax.Array, factor: jax.Array, first: jax.Array, page: jax.Array) -> jax.Array:
    """The pool with slots before `first [p]` of the pages in `page [t]` multiplied by their factor `[p, hk]`."""
    pages, page_size = pool.shape[:2]
    count = page.shape[0]
    written = jnp.unique(page, size=count, fill_value=pages) if not is_symbolic(count) else page
    before = take(pool, written, 0)  # [t, ps, hk, d]
    by_head = take(factor, written, 1)[:, None, :, None]
    slot = jnp.arange(page_size, dtype=jnp.int32)
    earlier = slot[None] < take(first, written, 0)[:, None]
    moved = (before.astype(jnp.float32) * by_head).astype(pool.dtype)
    return pool.at[written].set(jnp.where(earlier[..., None, None], moved, before), mode="drop")


def stored(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x [..., hk, d] in the pool's dtype; float8 pools store x / scale [..., hk], saturated."""
    if dtype not in FLOAT8 or x.dtype == dtype:
        return x
    wide = x.astype(jnp.float32)
    if scale is not None:
        wide = wide / scale[..., None]
    return jnp.clip(wide, -FLOAT8[dtype], FLOAT8[dtype]).astype(dtype)
