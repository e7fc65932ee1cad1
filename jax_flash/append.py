"""append_kv below its public function: the custom call, or the same in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from . import paging
from .operands import APPEND
from .primitives import bind, equally_varying
from .rotary import apply_rotary
from .spec import AppendSpec

Operands = dict[str, jax.Array]
FLOAT8_MAX = 448.0


def append(spec: AppendSpec, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(k_pages, v_pages, kv_lengths) after the checked call."""
    if spec.implementation == "xla":
        return _scatter(spec, operands)
    operands = equally_varying(operands)
    k_pages, v_pages = bind(APPEND, spec, operands)
    _, _, valid = _slots(spec, operands)
    return k_pages, v_pages, _lengths_after(spec, operands, valid)


def _scatter(spec: AppendSpec, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    position, (page, slot), valid = _slots(spec, operands)
    key = operands["key"]
    if "cos" in operands:
        key = apply_rotary(key, position, operands["cos"], operands["sin"], interleaved=spec.interleaved)
    pools = []
    for name, new, scale in (("k_pages", key, "k_scale"), ("v_pages", operands["value"], "v_scale")):
        pool = paging.tokens_first(operands[name], spec.page_layout)
        rows = quantise(new, operands.get(scale), pool.dtype)
        nowhere = jnp.where(valid, page, pool.shape[0])
        pools.append(paging.tokens_first(pool.at[nowhere, slot].set(rows, mode="drop"), spec.page_layout))
    return pools[0], pools[1], _lengths_after(spec, operands, valid)


def quantise(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x [..., hk, d] as the pool stores it: float8 pools hold x / scale, saturated."""
    if dtype != jnp.float8_e4m3fn:
        return x
    wide = x.astype(jnp.float32)
    if scale is not None:
        wide = wide / scale[:, None]
    return jnp.clip(wide, -FLOAT8_MAX, FLOAT8_MAX).astype(dtype)


def _slots(spec: AppendSpec, operands: Operands) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """Of each new token: its position, its (page, slot), and whether it is written. `[n, s]` or `[t]`."""
    tables = operands["block_tables"]
    pool = paging.tokens_first(operands["k_pages"], spec.page_layout)
    pages, page_size = pool.shape[:2]
    if "cu_seqlens" in operands:
        sequence, row, _ = paging.locate(operands["cu_seqlens"], operands["key"].shape[0])
    else:
        n, s = operands["key"].shape[:2]
        sequence, row = jnp.arange(n, dtype=jnp.int32)[:, None], jnp.arange(s, dtype=jnp.int32)[None]
    capacity = paging.table_capacity(tables, page_size)
    position = jnp.pad(jnp.clip(operands["kv_lengths"], 0, capacity), (0, 1))[sequence] + row
    inside = (row >= 0) & (position < capacity)
    at = jnp.where(inside, position // page_size, 0)
    page = jnp.pad(tables, ((0, 1), (0, 1)), constant_values=-1)[sequence, at]  # padded: there may be none
    return position, (page, position % page_size), inside & (page >= 0) & (page < pages)


def _lengths_after(spec: AppendSpec, operands: Operands, valid: jax.Array) -> jax.Array:
    """Lengths grow by the tokens written."""
    tables = operands["block_tables"]
    capacity = paging.table_capacity(
        tables, paging.tokens_first(operands["k_pages"], spec.page_layout).shape[1]
    )
    before = jnp.clip(operands["kv_lengths"], 0, capacity)
    if "cu_seqlens" not in operands:
        return before + valid.sum(1, dtype=jnp.int32)
    sequence, _, _ = paging.locate(operands["cu_seqlens"], valid.shape[0])
    return before.at[sequence].add(valid.astype(jnp.int32))
