"""Attention over a paged key/value cache, for decode, prefill and a mix of both in one call."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from jax import Array

from .. import largest
from ..autodiff import attend
from ..masks import Mask
from ..options import (
    Align,
    ArrayLike,
    Implementation,
    IndexLike,
    LengthsLike,
    Number,
    PagedArguments,
    PagedOptions,
    PageLayout,
    Scale,
    Window,
)
from . import validate


# fmt: off
@overload
def paged_attention(
    query: ArrayLike, k_pages: ArrayLike, v_pages: ArrayLike | None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, return_lse: Literal[False] = ..., return_max: Literal[False] = ..., **options: Unpack[PagedOptions],
) -> Array: ...
@overload
def paged_attention(
    query: ArrayLike, k_pages: ArrayLike, v_pages: ArrayLike | None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, return_lse: Literal[True], return_max: Literal[False] = ..., **options: Unpack[PagedOptions],
) -> tuple[Array, Array]: ...
@overload
def paged_attention(
    query: ArrayLike, k_pages: ArrayLike, v_pages: ArrayLike | None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, return_lse: Literal[False] = ..., return_max: Literal[True], **options: Unpack[PagedOptions],
) -> tuple[Array, Array]: ...
@overload
def paged_attention(
    query: ArrayLike, k_pages: ArrayLike, v_pages: ArrayLike | None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, return_lse: Literal[True], return_max: Literal[True], **options: Unpack[PagedOptions],
) -> tuple[Array, Array, Array]: ...
@overload
def paged_attention(
    query: ArrayLike, k_pages: ArrayLike, v_pages: ArrayLike | None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, return_lse: bool, return_max: Literal[False] = ..., **options: Unpack[PagedOptions],
) -> Array | tuple[Array, Array]: ...
@overload
def paged_attention(
    query: ArrayLike, k_pages: ArrayLike, v_pages: ArrayLike | None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, return_lse: bool = ..., return_max: bool, **options: Unpack[PagedOptions],
) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def paged_attention(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def paged_attention(  # type: ignore[misc]  # only an overload has `unpacked`
    query: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    block_tables: IndexLike,
    kv_lengths: LengthsLike,
    *,
    cu_seqlens_q: IndexLike | None = None,
    page_layout: PageLayout = "nhd",
    num_splits: int | None = None,
    batch_invariant: bool = False,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    mask: Mask | None = None,
    draft_mask: ArrayLike | None = None,
    value_dim: int | None = None,
    value_start: int = 0,
    causal: bool = False,
    window: Window | None = None,
    align: Align = "bottom_right",
    scale: Number | None = None,
    softcap: Number | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    return_max: bool = False,
    deterministic: bool = False,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, ...]:
    """Attention of new queries to keys and values in the pages of a shared pool.

    Key j of sequence i is in slot `j % ps` of page `block_tables[i, j // ps]`. Entries past a sequence's length are
    never read. Rows that need a page outside the pool give NaN. A contiguous cache `[b, s_max, hk, d]` is a pool of b
    pages of size s_max with `block_tables = arange(b)[:, None]`.

    Args:
      query: `[n, sq, hq, d]`, or packed `[tq, hq, d]` with cu_seqlens_q; float16, bfloat16 or float32.
      k_pages: `[p, ps, hk, d]` (`page_layout="nhd"`) or `[p, hk, ps, d]` (`"hnd"`), query's dtype,
        float8_e4m3fn or float8_e5m2.
      v_pages: `[p, ps, hk, dv]` or `[p, hk, ps, dv]`, k_pages' dtype; None: V is columns of k_pages.
      block_tables: int32 `[n, pages]`; sequences may share pages.
      kv_lengths: int32 `[n]`, keys in the cache of each sequence, the newest included, as `append_kv` returns them; or
        one number for all.
      cu_seqlens_q: int32 `[n + 1]`, offsets of the sequences in a packed query.
      num_splits: number of parts that a sequence's keys are split into for parallelism; None leaves the choice to
        the library.
      batch_invariant: makes a sequence's result bit-identical whatever else is in the batch and however wide the tables
        are; not with `implementation="xla"`.
      k_scale, v_scale: float32 `[hk]`, `[p, hk]` (by page), or a number for all heads, only for float8 pools, where
        value = stored · scale; 1 by default. Scales of pages that are not read may hold anything.
      mask: a value of `jax_flash.masks`. Row 0 is the first of the call's queries, whatever the cache holds: a diagonal
        that moves with it is `masks.window(left, 0, offset=kv_lengths - sq)`. Arrays are `[n, hq | 1, sq]`, or
        `[hq | 1, tq]` with cu_seqlens_q.
      draft_mask: boolean `[n, sq, sq]`, or `[1, sq, sq]` for all sequences, for the token trees of speculative
        decoding (Medusa, EAGLE): whether new token a, query row a, sees new token b, key `kv_lengths[i] − sq + b`. The
        keys before the new tokens are visible as without it. It hides and never uncovers: with causal=True a token sees
        none after it either, which changes nothing for a tree that lists parents before their children. Causal, window
        and ALiBi count tokens in the order in which they are given, not by their depth in a tree. With cu_seqlens_q it
        is `[n, s, s]`, of which a sequence of t ≤ s tokens uses the first t rows and columns; it does not apply to a
        sequence of more than s tokens, such as a chunk of a prompt. Needs align="bottom_right".
      value_dim, value_start: with `v_pages=None`, values are the columns [value_start, value_start + value_dim) of
        k_pages, and keys its first d columns, of which the pool may have more; without value_dim, values have d columns
        too, so that V is K where value_start is 0. The gradient of k_pages is the sum of both. So a pool that stores
        [K | V] in one row is read in place, and so is one of heads K0 V0 K1 V1 … after the reshape to `[p, ps, hk, 2
        d]`. Keys and values may overlap: with value_start=0, values are the first columns of the keys, stored once,
        as in multi-head latent attention. d may be up to 640, and value_dim up to 512; with d above 512 GPUs need
        value_start=0, d ≤ 576, 16 bits and sm_80. Columns that are no multiples of 8 make GPUs copy the pool. Without
        v_scale, k_scale is the scale of both.
      causal, window, align, scale, softcap, return_lse, deterministic, implementation: as in `flash_attention`.
      return_max: also return the largest visible S of each sequence and head, float32 `[n, hq]`; no gradient.
      sinks: float32 `[hq]`, or for each token `[n, sq, hq]`, with cu_seqlens_q `[tq, hq]`.
      alibi_slopes: float32 `[hq]` or `[n, hq]`.

    Returns:
      `[n, sq, hq, dv]` or `[tq, hq, dv]` in query's dtype, or a tuple of the requested ones of (out, lse, max),
      with float32 lse `[n, hq, sq]` or `[hq, tq]`.
      Differentiable in both modes with respect to query, sinks and the pools, except for float8 pools; with
      cu_seqlens_q and draft_mask, and with head dims above 512, only by `implementation="xla"`.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: Kwon et al., PagedAttention (2023); Cai et al., Medusa (2024); DeepSeek-AI, DeepSeek-V2 (2024).

    Example:
      >>> k_pages, v_pages, lengths = append_kv(k_pages, v_pages, k, v, tables, lengths)
      >>> out = paged_attention(q, k_pages, v_pages, tables, lengths, causal=True)
      >>> tree = jnp.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], bool)  # a root with two children
      >>> out = paged_attention(q, k_pages, v_pages, tables, lengths, draft_mask=tree)
      >>> latent = paged_attention(q_576, pool, None, tables, lengths, value_dim=512, scale=192**-0.5)
    """
    arguments = PagedArguments(
        query=query,
        k_pages=k_pages,
        v_pages=v_pages,
        block_tables=block_tables,
        kv_lengths=kv_lengths,
        cu_seqlens_q=cu_seqlens_q,
        page_layout=page_layout,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        k_scale=k_scale,
        v_scale=v_scale,
        mask=mask,
        draft_mask=draft_mask,
        value_dim=value_dim,
        value_start=value_start,
        causal=causal,
        window=window,
        align=align,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        return_lse=return_lse,
        return_max=return_max,
        deterministic=deterministic,
        implementation=implementation,
    )
    spec, operands = validate.attention("paged_attention", arguments)
    return largest.results(arguments, spec, operands, attend(spec, operands))
