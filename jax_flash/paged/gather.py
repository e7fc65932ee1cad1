"""Gathers pages into contiguous keys in plain JAX, for the backward pass and for `implementation="xla"`."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import offsets, reference
from .._jax import same_dim, whole_beside_manual
from ..checker import INT32_MAX
from ..indexing import is_inside, take
from ..operands import OPTIONAL, WINDOW
from ..places import first_offset
from ..spec import AttentionSpec, Layout

Operands = dict[str, jax.Array]
# Page pools may have query's dtype or one of these; the value is the largest finite number of the dtype.
FLOAT8 = {jnp.dtype(jnp.float8_e4m3fn): 448.0, jnp.dtype(jnp.float8_e5m2): 57344.0}
# Operands that are read by the index of a row's sequence.
BY_SEQUENCE = (
    "block_tables",
    "kv_lengths",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "draft_mask",
    "block_mask",
    "alibi_slopes",
    *WINDOW,
)
_PAGED_ONLY = ("block_tables", "k_scale", "v_scale")


def attention(spec: AttentionSpec, operands: Operands) -> tuple[jax.Array, ...]:
    """The equations over gathered keys. Rows that need a page outside the pool are NaN, and so is their dquery."""
    by_index = whole_beside_manual(operands, BY_SEQUENCE)
    dense_spec, dense = contiguous(spec, by_index if spec.packed else operands)
    out, *by_row = reference.attention(dense_spec, dense)
    missing = rows_missing_pages(spec, by_index)[..., None]
    query = jnp.where(missing, operands["query"], 0).astype(by_row[0].dtype)
    # NaN has a derivative, which is NaN too; no NaN is made for other rows, where jax_debug_nans would report it.
    nothing = query.sum(-1, keepdims=True) * jnp.where(missing, jnp.nan, 0)  # [..., hq, 1]
    out = jnp.where(missing, nothing.astype(out.dtype), out)
    by_lse, nothing_by_lse = (jnp.swapaxes(x[..., 0], -1, -2) for x in (missing, nothing))
    return out.astype(operands["query"].dtype), *(jnp.where(by_lse, nothing_by_lse, x) for x in by_row)


def contiguous(spec: AttentionSpec, operands: Operands) -> tuple[AttentionSpec, Operands]:
    """The same call over gathered keys, fixed or packed: every sequence has `capacity` keys, kv_lengths of them in use.

    Keys on pages outside the pool are zeros. With float8 pools, keys and values are float32 and multiplied by their
    scale, and the query is float32 too.
    """
    n = operands["block_tables"].shape[0]
    dense = {name: x for name, x in operands.items() if name not in _PAGED_ONLY}
    for name, scale in (("key", "k_scale"), ("value", "v_scale")):
        dense[name] = _gather(operands[name], operands["block_tables"], spec.page_layout, operands.get(scale))
    d = operands["query"].shape[-1]
    # V is K, which contiguous keys may express as well.
    whole = spec.value_start == 0 and same_dim(spec.value_dim, d)
    if spec.shared_kv:
        dense["key"] = dense["key"][..., :d]
        values = dense["value"][..., spec.value_start : spec.value_start + spec.value_dim]
        dense["value"] = dense["key"] if whole else values
    dense["query"] = operands["query"].astype(dense["key"].dtype)
    layout: Layout = "fixed" if spec.layout == "paged" else "varlen"
    if layout == "varlen":
        capacity = dense["key"].shape[1]
        dense["cu_seqlens_k"] = jnp.arange(n + 1, dtype=jnp.int32) * jnp.int32(capacity)
        dense |= {
            name: dense[name].reshape(n * capacity, *dense[name].shape[2:]) for name in ("key", "value")
        }
    names = tuple(name for name in OPTIONAL if name in dense)
    return replace(
        spec,
        layout=layout,
        page_layout="nhd",
        num_splits=0,
        batch_invariant=False,
        value_dim=spec.value_dim if whole else 0,
        value_start=0,
        operands=names,
    ), dense


def differentiable(spec: AttentionSpec, operands: Operands) -> tuple[AttentionSpec, Operands]:
    """`contiguous`, for the custom calls of derivatives, which have masks but no draft masks."""
    spec, dense = contiguous(spec, operands)
    if "draft_mask" not in dense:
        return spec, dense
    if spec.layout == "varlen":
        raise NotImplementedError(
            "paged_attention: draft_mask with cu_seqlens_q has no derivative in the custom calls; "
            'implementation="xla" has it, and so has query [n, sq, hq, d]'
        )
    dense["mask"] = reference.draft_mask(spec, dense)
    del dense["draft_mask"]
    return replace(spec, operands=tuple(name for name in OPTIONAL if name in dense)), dense


def scatter_gradient(
    spec: AttentionSpec, gradient: jax.Array, tables: jax.Array, pool: jax.Array
) -> jax.Array:
    """The gradient of a pool, from that of the gathered keys in its first columns. It is summed in float32 if sequences
    share pages."""
    by_token = tokens_first(pool, spec.page_layout)
    page_size = by_token.shape[1]
    rows = in_columns(gradient, by_token.shape[-1]).reshape(*tables.shape, page_size, *by_token.shape[-2:])
    inside = is_inside(by_token, tables)
    rows = jnp.where(inside[..., None, None, None], rows, 0)
    total = jnp.zeros(by_token.shape, jnp.float32).at[jnp.where(inside, tables, 0)].add(rows, mode="drop")
    return tokens_first(total, spec.page_layout).astype(pool.dtype)


def in_columns(x: jax.Array, columns: Any, start: int = 0) -> jax.Array:
    """x in float32, placed at columns from `start` on in an array of `columns` columns, with zeros elsewhere."""
    after = columns - start - x.shape[-1]
    return jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(start, after)])


def rows_missing_pages(spec: AttentionSpec, operands: Operands) -> jax.Array:
    """Whether a query row sees a key on a page outside the pool, `[n, sq, h]` or `[tq, h]`; h is 1 if all heads see
    the same keys. The operands BY_SEQUENCE are whole (`whole_beside_manual`)."""
    tables = operands["block_tables"]
    page_size = tokens_first(operands["key"], spec.page_layout).shape[1]
    outside = (tables < 0) | (tables >= operands["key"].shape[0])
    before = jnp.pad(jnp.cumsum(outside, axis=1, dtype=jnp.int32), ((0, 1), (1, 0)))  # [n + 1, pages + 1]
    sequence, row, nq = (x[..., None] for x in _query_rows(spec, operands))
    nk = jnp.clip(operands["kv_lengths"], 0, table_capacity(tables, page_size))
    nk = jnp.pad(nk, (0, 1))[sequence]  # the padding is needed if there is no sequence at all
    diagonal = row + (nk - nq) if spec.align == "bottom_right" else row
    diagonal = diagonal + first_offset(operands)
    first, last = reference.band_limits(spec, operands, diagonal, sequence)
    first = jnp.zeros_like(diagonal) if first is None else jnp.clip(first, 0, nk)
    last = nk - 1 if last is None else jnp.clip(last, -1, nk - 1)
    seen = [(first, last)]
    if "ranges" in operands:
        limits = jnp.moveaxis(jnp.maximum(operands["ranges"], 0), -3, -2)  # […, sq, h, 2|4], [tq, h, 2|4]
        seen = [
            (jnp.maximum(first, limits[..., i]), jnp.minimum(last, limits[..., i + 1] - 1))
            for i in range(0, limits.shape[-1], 2)
        ]
    if "block_mask" in operands:
        return (row >= 0) & (row < nq) & _missing_in_blocks(spec, operands, outside, sequence, row, seen)
    missing = jnp.zeros((), bool)
    for first, last in seen:
        if "draft_mask" in operands:
            mask, new = operands["draft_mask"], nk - nq
            masked = nq <= mask.shape[-1]
            missing |= masked & _drafts_missing(mask, outside, page_size, (sequence, row, new), (first, last))
            last = jnp.where(masked, jnp.minimum(last, new - 1), last)
        missing |= _any_missing(before, sequence, first, last, page_size)
    return (row >= 0) & (row < nq) & missing


def _missing_in_blocks(
    spec: AttentionSpec,
    operands: Operands,
    outside: jax.Array,
    sequence: jax.Array,
    row: jax.Array,
    seen: list[tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Whether a row sees a key on a page outside the pool in one of the blocks and ranges that it sees."""
    page_size = tokens_first(operands["key"], spec.page_layout).shape[1]
    key = jnp.arange(table_capacity(operands["block_tables"], page_size), dtype=jnp.int32)
    visible = reference.seen_blocks(spec, operands["block_mask"], row[..., 0], key, sequence[..., 0])
    key = key.reshape((1,) * sequence.ndim + (-1,))
    inside = [(first[..., None] <= key) & (key <= last[..., None]) for first, last in seen]
    missing = jnp.pad(outside, ((0, 1), (0, 0)))[sequence[..., None], key // page_size]
    return (visible & reduce(or_, inside) & missing).any(-1)


def _drafts_missing(
    mask: jax.Array,
    outside: jax.Array,
    page_size: Any,
    rows: tuple[jax.Array, jax.Array, jax.Array],
    seen: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Whether a row sees, by its draft mask, a new token on a page outside the pool.

    rows: each row's sequence, its position in it, and the sequence's first new token; seen: the first and the last key
    that the band and the ranges leave.
    """
    sequence, row, new = rows
    size, n = mask.shape[-1], outside.shape[0]
    token = jnp.arange(size, dtype=jnp.int32).reshape((1,) * new.ndim + (size,))
    key = new[..., None] + token  # [n, 1, 1, size] or [tq, 1, size]
    inside = (seen[0][..., None] <= key) & (key <= seen[1][..., None])
    entry = jnp.clip(key // page_size, 0, outside.shape[1])
    missing = jnp.pad(outside, ((0, 1), (0, 1)))[sequence[..., None], entry]
    mask = jnp.pad(jnp.broadcast_to(mask, (n, size, size)), ((0, 1), (0, 0), (0, 0)))
    rows_of_mask = mask[sequence, jnp.clip(row, 0, size - 1)]
    return (rows_of_mask & missing & inside).any(-1)


def _any_missing(
    before: jax.Array, sequence: jax.Array, first: jax.Array, last: jax.Array, page_size: Any
) -> jax.Array:
    """Whether one of the keys from `first` to `last` is on a page outside the pool; `before` counts such pages."""
    # If a sequence has fewer keys than drafts, `last` may lie before them all.
    end = jnp.maximum(last, -1) // page_size + 1
    return (first <= last) & (before[sequence, end] - before[sequence, first // page_size] > 0)


def _query_rows(spec: AttentionSpec, operands: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each query row: its sequence, its position in it (−1 outside every sequence), and the sequence's rows."""
    query = operands["query"]
    if spec.layout == "paged":
        n, sq = query.shape[:2]
        row = jnp.arange(sq, dtype=jnp.int32)[None]
        return jnp.arange(n, dtype=jnp.int32)[:, None], row, jnp.full((n, 1), sq, jnp.int32)
    return offsets.locate(operands["cu_seqlens_q"], query.shape[0])


def _gather(pool: jax.Array, tables: jax.Array, layout: str, scale: jax.Array | None) -> jax.Array:
    """The keys or values of every sequence, [n, pages · ps, hk, d], with zeros for pages outside the pool.

    Those of a float8 pool are multiplied by their scale.
    """
    by_token = tokens_first(pool, layout)
    if same_dim(pool.shape[0], 0):
        by_token = jnp.zeros((1, *by_token.shape[1:]), pool.dtype)
        scale = None
    rows = take(by_token, tables, 0)
    if pool.dtype in FLOAT8:  # neither these pools nor their scales have a gradient
        rows = lax.stop_gradient(rows).astype(jnp.float32)
        if scale is not None:
            scale = lax.stop_gradient(scale)
            rows = rows * scale_of_pages(scale, tables)[:, :, None, :, None]
    return rows.reshape(tables.shape[0], tables.shape[1] * rows.shape[2], *rows.shape[3:])


def scale_of_pages(scale: jax.Array, pages: jax.Array) -> jax.Array:
    """The scales `[1, hk]` or `[p, hk]` of these pages, […, hk]; 1 for a page outside the pool."""
    if same_dim(scale.shape[0], 1):
        pages = jnp.zeros_like(pages)
    return take(scale, pages, 1)


def table_capacity(tables: jax.Array, page_size: int) -> Any:
    """Keys that a row of the tables can hold, limited to int32; a symbolic size is returned as it is."""
    keys = tables.shape[1] * page_size
    return min(keys, INT32_MAX) if isinstance(keys, int) else keys


def tokens_first(pool: jax.Array, layout: str) -> jax.Array:
    """The pool as `[p, ps, hk, d]` from either layout; the function is its own inverse."""
    return pool if layout == "nhd" else jnp.swapaxes(pool, 1, 2)
