"""Attention over a paged key/value cache, for decode, prefill and a mix of both in one call."""

from __future__ import annotations

from typing import Any

import jax

from ..attention import Window
from ..autodiff import attend
from . import validate


def paged_attention(
    query: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lengths: jax.Array,
    *,
    cu_seqlens_q: jax.Array | None = None,
    page_layout: str = "nhd",
    num_splits: int | None = None,
    batch_invariant: bool = False,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    causal: bool = False,
    window: Window | None = None,
    align: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention of new queries to keys and values in the pages of a shared pool.

    Key j of sequence i is in slot `j % ps` of page `block_tables[i, j // ps]`. Entries past a sequence's length are
    never read. Rows that need a page outside the pool give NaN. A contiguous cache `[b, s_max, hk, d]` is a pool of b
    pages of size s_max with `block_tables = arange(b)[:, None]`.

    Args:
      query: `[n, sq, hq, d]`, or packed `[tq, hq, d]` with cu_seqlens_q; float16, bfloat16 or float32.
      k_pages: `[p, ps, hk, d]` (`page_layout="nhd"`) or `[p, hk, ps, d]` (`"hnd"`), query's dtype,
        float8_e4m3fn or float8_e5m2.
      v_pages: `[p, ps, hk, dv]` or `[p, hk, ps, dv]`, k_pages' dtype.
      block_tables: int32 `[n, pages]`; sequences may share pages.
      kv_lengths: int32 `[n]`, keys in the cache of each sequence, the newest included, as `append_kv` returns them.
      cu_seqlens_q: int32 `[n + 1]`, offsets of the sequences in a packed query.
      num_splits: number of parts that a sequence's keys are split into for parallelism; None leaves the choice to
        the library.
      batch_invariant: makes a sequence's result bit-identical whatever else is in the batch.
      k_scale, v_scale: float32 `[hk]`, only for float8 pools, where value = stored · scale; 1 by default.
      causal, window, align, scale, softcap, sinks, return_lse, deterministic, implementation: as in
        `flash_attention`.
      alibi_slopes: float32 `[hq]` or `[n, hq]`.

    Returns:
      `[n, sq, hq, dv]` or `[tq, hq, dv]` in query's dtype, or the pair `(out, lse)` with float32 lse `[n, hq, sq]` or
      `[hq, tq]`.
      Differentiable with respect to query, sinks and the pools, except for float8 pools.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: Kwon et al., PagedAttention (2023).

    Example:
      >>> k_pages, v_pages, lengths = append_kv(k_pages, v_pages, k, v, tables, lengths)
      >>> out = paged_attention(q, k_pages, v_pages, tables, lengths, causal=True)
    """
    options = dict(
        cu_seqlens_q=cu_seqlens_q, page_layout=page_layout, num_splits=num_splits, batch_invariant=batch_invariant,
        k_scale=k_scale, v_scale=v_scale, causal=causal, window=window, align=align, scale=scale, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, deterministic=deterministic, implementation=implementation,
    )  # fmt: skip
    spec, operands = validate.attention(
        "paged_attention", query, k_pages, v_pages, block_tables, kv_lengths, options
    )
    out, lse = attend(spec, operands)
    return (out, lse) if return_lse else out
