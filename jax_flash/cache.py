"""Writing new keys and values into a paged cache."""

from __future__ import annotations

from typing import Any

import jax

from . import append, validate_paged


def append_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    key: jax.Array,
    value: jax.Array,
    block_tables: jax.Array,
    kv_lengths: jax.Array,
    *,
    cu_seqlens: jax.Array | None = None,
    page_layout: str = "nhd",
    rotary: tuple[jax.Array, jax.Array] | None = None,
    interleaved: bool = False,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append new tokens to each sequence's pages; in place where the pools are donated or dead afterwards.

    Token t of sequence i goes to position `kv_lengths[i] + t`. Writes to pages outside the pool, and past the
    capacity of a row of block_tables, are dropped and not counted.

    Args:
      k_pages, v_pages: the pools, `[p, ps, hk, d(v)]` (`page_layout="nhd"`) or `[p, hk, ps, d(v)]` (`"hnd"`),
        key's dtype or float8_e4m3fn.
      key, value: `[n, s, hk, d(v)]`, or packed `[t, hk, d(v)]` with cu_seqlens.
      block_tables: int32 `[n, pages]`.
      kv_lengths: int32 `[n]`, keys in the cache before the call.
      cu_seqlens: int32 `[n + 1]`, offsets of the sequences in packed key and value.
      rotary: `(cos, sin)`, each float32 `[positions, d_rot / 2]`: keys are rotated by their position while written.
      interleaved: as in `apply_rotary`.
      k_scale, v_scale: float32 `[hk]`, for float8 pools: stored = value / scale, rounded to nearest and saturated.

    Returns:
      `(k_pages, v_pages, kv_lengths)`, the lengths those after the call.

    Raises:
      ValueError, TypeError, NotImplementedError: as `paged_attention`. Not differentiable.

    Example:
      >>> step = jax.jit(decode_step, donate_argnames=("k_pages", "v_pages"))
    """
    options: dict[str, Any] = dict(
        cu_seqlens=cu_seqlens, page_layout=page_layout, rotary=rotary, interleaved=interleaved, k_scale=k_scale,
        v_scale=v_scale, implementation=implementation,
    )  # fmt: skip
    spec, operands = validate_paged.append(
        "append_kv", k_pages, v_pages, key, value, block_tables, kv_lengths, options
    )
    return append.append(spec, operands)
