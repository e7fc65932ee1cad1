"""`flash_attn_with_kvcache`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from jax import Array

from ..checker import Checker, is_int
from ..options import ArrayLike, Implementation, IndexLike, LengthsLike, Number
from ..paged.append import append_kv
from ..paged.attention import paged_attention
from ..rotary import apply_rotary
from . import arguments
from .options import KVCacheOptions, WindowSize


# fmt: off
@overload
def flash_attn_with_kvcache(
    q: ArrayLike, k_cache: ArrayLike, v_cache: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None,
    rotary_cos: ArrayLike | None = None, rotary_sin: ArrayLike | None = None,
    *, return_softmax_lse: Literal[False] = ..., **options: Unpack[KVCacheOptions],
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attn_with_kvcache(
    q: ArrayLike, k_cache: ArrayLike, v_cache: ArrayLike, k: ArrayLike | None = None, v: ArrayLike | None = None,
    rotary_cos: ArrayLike | None = None, rotary_sin: ArrayLike | None = None,
    *, return_softmax_lse: Literal[True], **options: Unpack[KVCacheOptions],
) -> tuple[Array, Array, Array, Array]: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attn_with_kvcache(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def flash_attn_with_kvcache(  # type: ignore[misc]  # only an overload has `unpacked`
    q: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    rotary_cos: ArrayLike | None = None,
    rotary_sin: ArrayLike | None = None,
    cache_seqlens: LengthsLike | None = None,
    cache_batch_idx: IndexLike | None = None,
    cache_leftpad: IndexLike | None = None,
    block_table: IndexLike | None = None,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: Number = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: ArrayLike | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """Appends to a cache (`append_kv`), then attends to it (`paged_attention`), with flash_attn's arguments.

    Args:
      q: `[b, sq, hq, d]`.
      k_cache, v_cache: `[b_cache, s_max, hk, d]` and `[b_cache, s_max, hk, dv]`, q's dtype; with block_table page
        pools `[p, ps, hk, d]` and `[p, ps, hk, dv]`, of any page size.
      k, v: `[b, s_new, hk, d]` and `[b, s_new, hk, dv]`, appended at cache_seqlens; pass both or neither.
      rotary_cos, rotary_sin: `[positions, d_rot / 2]`, float, with at least as many positions as a sequence's cache has
        keys; only with k and v. Row i of k is rotated at position cache_seqlens + i, and so is row i of q if causal or
        window_size is set; otherwise all rows of q are at position cache_seqlens.
      cache_seqlens: int or int32 `[b]`, the end of each sequence in its cache before the call. None, which is allowed
        without k, means that the caches are full.
      cache_batch_idx: int32 `[b]`, the cache row of each batch entry of q, by default 0, 1, …; not with block_table.
      cache_leftpad: int32 `[b]`, the start of each sequence in its cache; not with block_table. Rotary positions count
        from the start of the cache, as in flash_attn.
      block_table: int32 `[b, pages]`, the pages of each sequence.
      softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`; sk includes the
        new keys.
      rotary_interleaved: pairs features (2i, 2i + 1), which is flash_attn's default, instead of (i, i + d_rot / 2).
      num_splits: number of parts that the keys are split into for parallelism; 0 leaves the choice to the library.
      return_softmax_lse: also return log Σ exp(S), float32 `[b, hq, sq]`.
      implementation: as in `flash_attention`.

    Returns:
      `(out, k_cache, v_cache)`, or `(out, softmax_lse, k_cache, v_cache)`; without k the caches are returned
      unchanged.

    Raises:
      ValueError: for arguments that exclude each other, and for one without another that it needs.
      ValueError, TypeError, NotImplementedError: as in `append_kv` and `paged_attention`.

    Source: Dao, Flash-Decoding (2023); the interface is flash_attn's.

    Example:
      >>> step = jax.jit(partial(flash_attn_with_kvcache, causal=True), donate_argnums=(1, 2))
      >>> out, k_cache, v_cache = step(q, k_cache, v_cache, k, v, cache_seqlens=lengths)
    """
    check = Checker("flash_attn_with_kvcache")
    query = arguments.ranked(check, "q", q, "b sq hq d")
    arguments.check_new(check, k, v, rotary_cos, rotary_sin, cache_seqlens)
    check.flag("causal", causal)
    check.flag("return_softmax_lse", return_softmax_lse)
    check.flag("rotary_interleaved", rotary_interleaved)
    if is_int(num_splits) and num_splits < 0:
        raise check.fail(
            f"num_splits must be at least 0, which leaves the choice to the library, got {num_splits}"
        )
    window = arguments.window(check, window_size)
    cache = arguments.Cache.of(
        check, query.shape[0], k_cache, v_cache, cache_batch_idx, cache_leftpad, block_table
    )
    ends = cache.ends(check, query.shape[0], cache_seqlens)
    if k is not None and v is not None:
        rotary = arguments.rotary_tables(check, rotary_cos, rotary_sin, cache.capacity)
        if rotary is not None:
            rotate = partial(apply_rotary, cos=rotary[0], sin=rotary[1], interleaved=rotary_interleaved)
            position = ends[:, None]  # in the row of the cache, left padding included, as append_kv rotates k
            limited = causal or window is not None
            query = rotate(query, position + _rows(query) if limited else position)
        k_pages, v_pages, ends = append_kv(
            cache.k_pages,
            cache.v_pages,
            k,
            v,
            cache.tables,
            ends,
            rotary=rotary,
            interleaved=rotary_interleaved,
            implementation=implementation,
        )
        cache = replace(cache, k_pages=k_pages, v_pages=v_pages)
    read = cache.without_padding()
    out, lse = paged_attention(
        query,
        read.k_pages,
        read.v_pages,
        read.tables,
        cache.lengths(ends),
        num_splits=num_splits or None,
        causal=causal,
        window=window,
        scale=softmax_scale,
        softcap=arguments.softcap(check, softcap),
        alibi_slopes=alibi_slopes,
        return_lse=True,
        implementation=implementation,
    )
    caches = cache.k_pages, cache.v_pages
    return (out, lse, *caches) if return_softmax_lse else (out, *caches)


def _rows(x: ArrayLike) -> Array:
    return jnp.arange(jnp.shape(x)[1], dtype=jnp.int32)[None]
