"""flash_attn's three functions with its arguments, in its order and with its defaults (versions 2.7 and 2.8).

The only differences are those that JAX requires:

- `flash_attn_with_kvcache` cannot write to its arguments, and always returns the updated caches as its last results.
  If they are donated to a jitted step, they are updated in place.
- Dropout has no hidden generator: `dropout_p > 0` needs the extra keyword `dropout_key`.
- `return_attn_probs` returns `(out, softmax_lse, None)`, because attention weights are never stored. With dropout, for
  which flash_attn would return them, it raises.
- All three functions have the extra keyword `implementation`, as in `jax_flash.flash_attention`.

They also support what flash_attn does not: float32, any page size, dv ≠ d, CPUs, and gradients through pages. Errors
about shapes and dtypes are raised by the function that does the work and use its names (`query` for q, `kv_lengths` for
cache_seqlens, …).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..attention import flash_attention
from ..paged.append import append_kv
from ..paged.attention import paged_attention
from ..rotary import apply_rotary
from ..validate import Checker
from ..varlen import flash_attention_varlen
from . import arguments

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]

WindowSize = tuple[int, int]


def flash_attn_func(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: jax.Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> Any:
    """`flash_attention` with flash_attn's arguments.

    Args:
      q: `[b, sq, hq, d]`, float16, bfloat16 or float32.
      k, v: `[b, sk, hk, d]` and `[b, sk, hk, dv]`, q's dtype; `hk` divides `hq`.
      dropout_p: probability that an attention weight is dropped; needs dropout_key.
      softmax_scale: factor of q·kᵀ, 1/√d by default.
      causal: query i attends to keys 0 … i + (sk − sq).
      window_size: (left, right) keys visible around that diagonal; −1 for unlimited.
      softcap: c in `S ← c·tanh(S/c)`; 0.0 for none.
      alibi_slopes: float32 `[hq]` or `[b, hq]`; adds −slope·|i + sk − sq − j|.
      deterministic: makes the backward pass bit-for-bit reproducible.
      return_attn_probs: returns `(out, softmax_lse, None)` with float32 softmax_lse `[b, hq, sq]`.
      dropout_key: `jax.random.key`. It drops other weights than flash_attn's generator.
      implementation: as in `flash_attention`.

    Returns:
      `[b, sq, hq, dv]` in q's dtype. Differentiable with respect to q, k and v, also through softmax_lse.

    Raises:
      NotImplementedError: for return_attn_probs with dropout.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> out = flash_attn_func(q, k, v, causal=True, window_size=(256, 0))
    """
    check = Checker("flash_attn_func")
    arguments.refuse_weights(check, return_attn_probs, dropout_p, "flash_attention")
    out, lse = flash_attention(
        q,
        k,
        v,
        causal=causal,
        window=arguments.window(check, window_size),
        scale=softmax_scale,
        softcap=arguments.softcap(check, softcap),
        alibi_slopes=alibi_slopes,
        dropout_rate=dropout_p,
        dropout_key=dropout_key,
        return_lse=True,
        deterministic=deterministic,
        implementation=implementation,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: jax.Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: jax.Array | None = None,
    *,
    dropout_key: jax.Array | None = None,
    implementation: str | None = None,
) -> Any:
    """`flash_attention_varlen`, or `paged_attention` with a block_table, with flash_attn's arguments.

    Args:
      q: `[tq, hq, d]`, packed sequences.
      k, v: `[tk, hk, d]` and `[tk, hk, dv]`, packed; with block_table page pools `[p, ps, hk, d]` and
        `[p, ps, hk, dv]`.
      cu_seqlens_q, cu_seqlens_k: int32 `[n + 1]`, offsets of the sequences; with block_table the differences of
        cu_seqlens_k are the numbers of keys of each sequence.
      max_seqlen_q, max_seqlen_k: ignored; they may be traced.
      alibi_slopes: float32 `[hq]` or `[n, hq]`.
      return_attn_probs: returns `(out, softmax_lse, None)` with float32 softmax_lse `[hq, tq]`.
      block_table: int32 `[n, pages]`, the pages of each sequence.
      dropout_p, softmax_scale, causal, window_size, softcap, deterministic, dropout_key, implementation: as in
        `flash_attn_func`, per sequence.

    Returns:
      `[tq, hq, dv]` in q's dtype. Differentiable with respect to q, k and v, pools included.

    Raises:
      NotImplementedError: for dropout with block_table, and for return_attn_probs with dropout.
      ValueError, TypeError, NotImplementedError: as in `flash_attention_varlen` and `paged_attention`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> cu_seqlens = jnp.array([0, 3, 10], jnp.int32)
      >>> out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, causal=True)
    """
    check = Checker("flash_attn_varlen_func")
    arguments.refuse_weights(check, return_attn_probs, dropout_p, "flash_attention_varlen")
    options: dict[str, Any] = dict(
        causal=causal,
        window=arguments.window(check, window_size),
        scale=softmax_scale,
        softcap=arguments.softcap(check, softcap),
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        implementation=implementation,
    )
    if block_table is None:
        dropout: dict[str, Any] = dict(dropout_rate=dropout_p, dropout_key=dropout_key)
        out, lse = flash_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, **options, **dropout, return_lse=True
        )
    else:
        if dropout_p:
            raise check.fail(
                f"dropout_p is {dropout_p} with a block_table; pages have no dropout, pass dropout_p=0.0",
                NotImplementedError,
            )
        offsets = check.int32("cu_seqlens_k", cu_seqlens_k)
        check.rank("cu_seqlens_k", offsets, "n+1")
        out, lse = paged_attention(
            q, k, v, block_table, jnp.diff(offsets), cu_seqlens_q=cu_seqlens_q, **options, return_lse=True
        )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    k: jax.Array | None = None,
    v: jax.Array | None = None,
    rotary_cos: jax.Array | None = None,
    rotary_sin: jax.Array | None = None,
    cache_seqlens: int | jax.Array | None = None,
    cache_batch_idx: jax.Array | None = None,
    cache_leftpad: jax.Array | None = None,
    block_table: jax.Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: jax.Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    implementation: str | None = None,
) -> Any:
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
      cache_leftpad: int32 `[b]`, the start of each sequence in its cache, which is its position 0; not with
        block_table.
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
    q = arguments.ranked(check, "q", q, "b sq hq d")
    arguments.check_new(check, k, v, rotary_cos, rotary_sin, cache_seqlens)
    window = arguments.window(check, window_size)
    cache = arguments.Cache.of(
        check, q.shape[0], k_cache, v_cache, cache_batch_idx, cache_leftpad, block_table
    )
    ends = cache.ends(check, q.shape[0], cache_seqlens)
    if k is not None and v is not None:
        rotary = arguments.rotary_tables(check, rotary_cos, rotary_sin, cache.capacity)
        if rotary is not None:
            rotate = partial(apply_rotary, cos=rotary[0], sin=rotary[1], interleaved=rotary_interleaved)
            position = cache.lengths(ends)[:, None]
            limited = causal or window is not None
            q = rotate(q, position + _rows(q) if limited else position)
            if cache.start is not None:  # append_kv would count positions from the padding
                k, rotary = rotate(k, position + _rows(k)), None
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
        q,
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


def _rows(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[1], dtype=jnp.int32)
