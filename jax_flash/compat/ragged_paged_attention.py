"""Ragged paged attention, as TPU serving engines call it: a batch of packed queries over one pool of keys and values.

`ragged_paged_attention` has the arguments of `jax.experimental.pallas.ops.tpu.ragged_paged_attention`.
`ragged_paged_attention_update` first writes the new keys and values; it has the arguments of tpu-inference's v3 and
hd64 kernels and of EasyDeL's; compat.sglang_jax has them in sglang-jax's order. Both use the pool in place, without a
copy.

What differs:

- Where no key is visible the result is 0, so `mask_value` has no effect. Tuning parameters are ignored.
- Entries past the sequences in use may hold anything. Rows that belong to no sequence are 0, and a page outside the
  pool gives NaN.
- `ragged_paged_attention` has gradients for queries and pool; `…_update` for queries, sinks and the pool that is read,
  if nothing is written (`update_kv_cache=False`).
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .._jax import explicit_parts
from ..checker import DTYPES, Checker, is_int
from ..options import ArrayLike, Implementation, IndexLike
from ..paged import quantise
from ..paged.attention import paged_attention
from ..paged.gather import FLOAT8
from ..paged.validate import check_pool_dtype
from .ragged_pages import Batch, Layout, Pool

_TUNING = {
    "chunk_prefill_size", "d_block_sizes", "debug_mode", "disable_bounds_checks", "disable_semaphore_checks",
    "m_block_sizes", "num_kv_pages_per_block", "num_queries_per_block", "p_block_sizes", "skip_kv_mask",
    "vmem_limit_bytes",
}  # fmt: skip


def ragged_paged_attention(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: IndexLike,
    page_indices: IndexLike,
    cu_q_lens: IndexLike,
    num_seqs: IndexLike,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    mask_value: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    attention_sink: ArrayLike | None = None,
    implementation: Implementation | None = None,
    **tuning: Any,
) -> jax.Array:
    """Causal attention of packed queries to the keys and values in the pages of one pool.

    Args:
      q: `[tokens, hq, d]`, float16, bfloat16 or float32.
      kv_pages: `[p, ps, 2 hk, d]`, the heads K0 V0 K1 V1 …, q's dtype or float8.
      kv_lens: int32 `[n]`, keys of each sequence, the newest included.
      page_indices: int32 `[n, pages]`, or flat `[n · pages]`.
      cu_q_lens: int32 `[n + 1]`, offsets of the sequences in q.
      num_seqs: int32 `[1]`, or a number, of sequences; later entries of kv_lens and cu_q_lens are not used.
      sm_scale: factor of q·k; note the default of 1.
      sliding_window: W keys are visible, the row's own among them: `window=(W − 1, 0)` of this library.
      soft_cap: c · tanh(S / c).
      k_scale, v_scale: numbers that stored keys and values are multiplied by.
      attention_sink: float `[hq]`, or one for all heads, as `sinks` of `flash_attention`.
      implementation: as in `flash_attention`.
      mask_value, tuning: not used.

    Returns:
      `[tokens, hq, d]`, q's dtype. Differentiable with respect to q, attention_sink and kv_pages but float8 ones.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `paged_attention`.

    Source: the interface is `jax.experimental.pallas.ops.tpu.ragged_paged_attention`'s.

    Example:
      >>> out = ragged_paged_attention(q, kv_pages, kv_lens, page_indices, cu_q_lens, num_seqs, sm_scale=d**-0.5)
    """
    check = Checker("ragged_paged_attention")
    _refuse_unknown(check, tuning)
    query = check.array("q", q)
    check.rank("q", query, "tokens hq d")
    pool = Pool.of(check, "kv_pages", kv_pages, "interleaved", None)
    _check_heads(check, "q", query, pool)
    batch = Batch.of(check, kv_lens, page_indices, cu_q_lens, num_seqs, "num_seqs", None, pool)
    scale = _softmax_scale(check, query, sm_scale)
    k_scale, v_scale = _factors(check, k_scale, v_scale, pool.dtype)
    scores = _Scores(scale, sliding_window, soft_cap, k_scale, v_scale, attention_sink)
    return _attend(check, query, pool, batch, scores, implementation)


def ragged_paged_attention_update(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache: ArrayLike,
    kv_lens: IndexLike,
    page_indices: IndexLike,
    cu_q_lens: IndexLike,
    distribution: IndexLike,
    attention_sink: ArrayLike | None = None,
    *,
    layout: Layout = "interleaved",
    cu_kv_lens: IndexLike | None = None,
    use_causal_mask: bool = True,
    update_kv_cache: bool = True,
    draft_mask: ArrayLike | None = None,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    out_dtype: Any = None,
    mask_value: float | None = None,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    implementation: Implementation | None = None,
    **tuning: Any,
) -> tuple[jax.Array, jax.Array]:
    """Writes new keys and values into a cache, in place if it is donated, and attends to it.

    Args:
      queries: `[tokens, hq, d]`.
      keys, values: `[tokens, hk, d]`, written to the last positions of each sequence: kv_cache's dtype, or a wider one
        for a float8 cache, which then stores x / k_scale and x / v_scale.
      kv_cache: with layout="interleaved" `[p, ps, 2 hk / packing, packing, D]` or `[p, ps, 2 hk, D]`, the heads
        K0 V0 K1 V1 …; with "concatenated" `[p, ps, hk / packing, packing, 2 D]` or `[p, ps, hk, 2 D]`, whose rows
        are K and V side by side (hd64). D is at least d. Columns past d, and heads that packing adds, are padding.
      kv_lens: int32 `[n]`, keys of each sequence, the new ones included.
      page_indices: int32, flat `[n · pages]` or `[n, pages]`; with cu_kv_lens flat, a sequence's pages from entry
        `⌈cu_kv_lens / ps⌉` on, at most as many as the pool has.
      cu_q_lens: int32 `[n + 1]`, offsets of the sequences in queries.
      distribution: int32 `[3]`, whose last is the number of sequences; or that number. Later entries of kv_lens and
        cu_q_lens are not used.
      attention_sink: float `[hq]`, or one for all heads.
      layout, cu_kv_lens: the library's kind of cache and of page_indices.
      use_causal_mask: False lets a row see all keys except those before its window.
      update_kv_cache: False if kv_cache already holds the new keys (layers that share a cache).
      draft_mask: as in `paged_attention` with cu_seqlens_q, for speculative decoding.
      sm_scale, sliding_window, soft_cap, implementation: as in `ragged_paged_attention`.
      out_dtype: the result's dtype, queries' by default.
      q_scale: rounds queries to the cache's dtype as `q / q_scale`, and multiplies scores by it.
      k_scale, v_scale: numbers that stored keys and values are multiplied by.
      mask_value, tuning: not used.

    Returns:
      `(out [tokens, hq, d], kv_cache)`.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `append_kv` and `paged_attention`.

    Source: the interface is that of tpu-inference's `ragged_paged_attention` (v3) and `ragged_paged_attention_hd64`.

    Example:
      >>> step = jax.jit(ragged_paged_attention_update, donate_argnames="kv_cache")
      >>> out, cache = step(q, k, v, cache, kv_lens, page_indices, cu_q_lens, distribution)
    """
    check = Checker("ragged_paged_attention_update")
    _refuse_unknown(check, tuning)
    query, key, value = (
        check.array(name, x) for name, x in (("queries", queries), ("keys", keys), ("values", values))
    )
    for name, x in (("queries", query), ("keys", key), ("values", value)):
        check.rank(name, x, "tokens heads d")
    if key.shape != value.shape or key.shape[0] != query.shape[0]:
        raise check.fail(
            f"keys and values must have queries' {query.shape[0]} tokens and the same shape, got {key.shape} and "
            f"{value.shape}"
        )
    causal = check.flag("use_causal_mask", use_causal_mask)
    pool = Pool.of(check, "kv_cache", kv_cache, layout, key.shape[1])
    allowed = (pool.dtype.name, *(DTYPES if pool.dtype in FLOAT8 else ()))
    for name, x in (("keys", key), ("values", value)):
        check.dtype(name, x, allowed, f", as kv_cache has {pool.dtype}; cast {name} with .astype")
    scale = _softmax_scale(check, query, sm_scale)
    q_scale = None if q_scale is None else check.divisor("q_scale", q_scale)
    k_scale, v_scale = _factors(check, k_scale, v_scale, pool.dtype)
    batch = Batch.of(check, kv_lens, page_indices, cu_q_lens, distribution, "distribution", cu_kv_lens, pool)
    _check_heads(check, "queries", query, pool)
    if check.flag("update_kv_cache", update_kv_cache):
        stored = _stored(key, k_scale, pool.dtype), _stored(value, v_scale, pool.dtype)
        pool = pool.append(batch, stored, implementation)
    if q_scale is not None:
        scale = scale * q_scale
        query = _rounded(query, q_scale, pool.dtype)
    scores = _Scores(scale, sliding_window, soft_cap, k_scale, v_scale, attention_sink, causal, draft_mask)
    out = _attend(check, query, pool, batch, scores, implementation)
    return out if out_dtype is None else out.astype(out_dtype), pool.cache


def _stored(x: jax.Array, scale: float | None, dtype: Any) -> jax.Array:
    """x `[tokens, h, d]` converted to the cache's dtype."""
    by_row = None if scale is None else jnp.full(x.shape[:-1], scale, jnp.float32)
    return quantise.stored(x, by_row, dtype)


def _rounded(query: jax.Array, scale: float, dtype: Any) -> jax.Array:
    """query / scale, rounded to the cache's dtype."""
    if dtype in FLOAT8:
        return _stored(query, scale, dtype).astype(query.dtype)
    return (query.astype(jnp.float32) / scale).astype(dtype).astype(query.dtype)


def _refuse_unknown(check: Checker, tuning: dict[str, Any]) -> None:
    unknown = sorted(tuning.keys() - _TUNING)
    if unknown:
        raise check.fail(f"{unknown[0]} is no argument; tuning parameters are {sorted(_TUNING)}", TypeError)


def _check_heads(check: Checker, name: str, query: jax.Array, pool: Pool) -> None:
    check.dtype(name, query)
    check_pool_dtype(check, pool.name, pool.cache, name, query)
    hq, d = query.shape[1:]
    if hq % pool.used:
        raise check.fail(f"the cache has {pool.used} heads of keys, which does not divide the {hq} of {name}")
    if d > pool.width:
        raise check.fail(f"{name} has head dim {d}, and the cache's keys have {pool.width} columns")
    if pool.heads != pool.used and explicit_parts(query)[1] > 1:
        raise check.fail(
            f"{name} is {jax.typeof(query)}, but explicit mesh axes may not split its heads where {pool.name} has "
            f"room for {pool.pairs} heads of keys and holds {pool.used}; reshard {name} to whole heads"
        )


@dataclass(frozen=True)
class _Scores:
    scale: float
    window: int | None
    softcap: float | None
    k_scale: float | None
    v_scale: float | None
    sinks: ArrayLike | None
    causal: bool = True
    draft_mask: ArrayLike | None = None


def check_window(check: Checker, window: Any) -> int | None:
    """The number of keys that a row sees, if it is limited."""
    if window is not None and (not is_int(window) or window < 1):
        raise check.fail(f"sliding_window must be an int of at least 1 or None, got {window!r}")
    return None if window is None else int(window)


def _softmax_scale(check: Checker, query: jax.Array, given: Any) -> float:
    return (
        query.shape[-1] ** -0.5
        if given is None
        else check.number("sm_scale", given, "multiply q by it and pass 1.0")
    )


def _factors(check: Checker, k_scale: Any, v_scale: Any, dtype: Any) -> tuple[Any, Any]:
    """The scales of stored keys and values: numbers or, for a float8 cache, also what paged_attention checks. The
    v_scale of another cache multiplies the result, so it may be traced."""
    found = []
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        is_array = not isinstance(x, numbers.Real)
        if (
            x is None
            or (is_array and dtype in FLOAT8)
            or (name == "v_scale" and isinstance(x, jax.core.Tracer))
        ):
            found.append(x)
        else:
            found.append(check.divisor(name, x, "multiply q by it and pass 1.0"))
    return found[0], found[1]


def _attend(
    check: Checker,
    query: jax.Array,
    pool: Pool,
    batch: Batch,
    scores: _Scores,
    implementation: Implementation | None,
) -> jax.Array:
    hq, d = query.shape[1:]
    window = check_window(check, scores.window)
    sinks = scores.sinks
    if sinks is not None:
        given = check.array("attention_sink", sinks).astype(jnp.float32)
        sinks = jnp.broadcast_to(check.broadcastable("attention_sink", given, (hq,), "hq"), (hq,))
    group = hq // pool.used
    unused = (pool.heads - pool.used) * group  # query heads that belong to the KV heads that packing adds
    if unused:
        query = jnp.pad(query, ((0, 0), (0, unused), (0, 0)))
        sinks = None if sinks is None else jnp.pad(sinks, (0, unused))
    is_float8 = pool.dtype in FLOAT8
    scale, k_scale, v_scale = scores.scale, scores.k_scale, scores.v_scale
    if (k_scale is None) != (v_scale is None):  # a k_scale alone would be that of both
        k_scale, v_scale = (1.0 if x is None else x for x in (k_scale, v_scale))
    if not is_float8 and scores.k_scale is not None:
        scale = scale * scores.k_scale
    out: jax.Array = paged_attention(
        query,
        pool.shared(),
        None,
        batch.tables,
        batch.lengths,
        cu_seqlens_q=batch.offsets,
        value_dim=d,
        value_start=pool.width,
        k_scale=k_scale if is_float8 else None,
        v_scale=v_scale if is_float8 else None,
        causal=scores.causal,
        window=None if window is None else (window - 1, 0 if scores.causal else None),
        scale=scale,
        softcap=scores.softcap,
        sinks=sinks,
        draft_mask=scores.draft_mask,
        implementation=implementation,
    )
    out = out[:, :hq] if unused else out
    if not is_float8 and scores.v_scale is not None:
        out = (out.astype(jnp.float32) * scores.v_scale).astype(out.dtype)
    return out
