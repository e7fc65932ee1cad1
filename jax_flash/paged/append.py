"""`append_kv`: writes new keys and values into a paged cache, by the custom call or in plain JAX."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, Unpack, overload

import jax
import jax.numpy as jnp
from jax import Array

from .. import no_derivative, offsets
from .._jax import equally_varying, in_automatic_axes, whole_beside_manual
from ..operands import APPEND, APPEND_DYNAMIC
from ..options import (
    AppendArguments,
    AppendOptions,
    ArrayLike,
    Implementation,
    IndexLike,
    LengthsLike,
    PageLayout,
    Scale,
    Scaling,
)
from ..primitives import bind
from ..rotary import apply_rotary
from ..spec import AppendSpec
from . import gather, quantise, validate

Operands = dict[str, jax.Array]


# fmt: off
@overload
def append_kv(
    k_pages: ArrayLike, v_pages: ArrayLike, key: ArrayLike, value: ArrayLike, block_tables: IndexLike,
    kv_lengths: LengthsLike,
    *, scale: Literal["static"] = ..., **options: Unpack[AppendOptions],
) -> tuple[Array, Array, Array]: ...
@overload
def append_kv(
    k_pages: ArrayLike, v_pages: ArrayLike, key: ArrayLike, value: ArrayLike, block_tables: IndexLike,
    kv_lengths: LengthsLike,
    *, scale: Literal["dynamic"], **options: Unpack[AppendOptions],
) -> tuple[Array, Array, Array, Array, Array]: ...
@overload
def append_kv(
    k_pages: ArrayLike, v_pages: None, key: ArrayLike, value: None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, scale: Literal["static"] = ..., **options: Unpack[AppendOptions],
) -> tuple[Array, None, Array]: ...
@overload
def append_kv(
    k_pages: ArrayLike, v_pages: None, key: ArrayLike, value: None, block_tables: IndexLike, kv_lengths: LengthsLike,
    *, scale: Literal["dynamic"], **options: Unpack[AppendOptions],
) -> tuple[Array, None, Array, Array, None]: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def append_kv(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def append_kv(  # type: ignore[misc]  # only an overload has `unpacked`
    k_pages: ArrayLike,
    v_pages: ArrayLike | None,
    key: ArrayLike,
    value: ArrayLike | None,
    block_tables: IndexLike,
    kv_lengths: LengthsLike,
    *,
    cu_seqlens: IndexLike | None = None,
    page_layout: PageLayout = "nhd",
    rotary: tuple[ArrayLike, ArrayLike] | None = None,
    interleaved: bool = False,
    k_scale: Scale | None = None,
    v_scale: Scale | None = None,
    scale: Scaling = "static",
    implementation: Implementation | None = None,
) -> tuple[Array | None, ...]:
    """Appends new tokens to each sequence's pages, in place if the pools are donated or not used afterwards.

    Token t of sequence i is written to position `kv_lengths[i] + t`. Writes to pages outside the pool and writes past
    the capacity of a row of block_tables are dropped and not counted in the new lengths.

    Args:
      k_pages, v_pages: the pools, `[p, ps, hk, d(v)]` (`page_layout="nhd"`) or `[p, hk, ps, d(v)]` (`"hnd"`),
        key's dtype, float8_e4m3fn or float8_e5m2. v_pages is None, and value too, where values are columns of k_pages
        (value_dim of `paged_attention`); k_pages may then be `[p, ps, hk, x, d / x]` too.
      key, value: `[n, s, hk, d(v)]`, or packed `[t, hk, d(v)]` with cu_seqlens. For a float8 pool they may have its
        dtype; they are then stored unchanged, without scales and rotary.
      block_tables: int32 `[n, pages]`, the pages of each sequence.
      kv_lengths: int32 `[n]`, keys in the cache of each sequence before the call, or one number for all.
      cu_seqlens: int32 `[n + 1]`, offsets of the sequences in packed key and value.
      rotary: `(cos, sin)`, each float32 `[positions, d_rot / 2]`. Keys are rotated by the angles of their position, as
        by `apply_rotary`, before they are written.
      interleaved: as in `apply_rotary`; without rotary it has no effect.
      k_scale, v_scale: float32 `[hk]`, `[p, hk]` (by page), or a number, only for float8 pools, where stored =
        value / scale, rounded to nearest and saturated at the largest number of the dtype, infinities too; 1 by
        default.
      scale: `"static"` takes k_scale and v_scale as they are. `"dynamic"`, for float8 pools, updates them: they are
        `[p, hk]`, and the call overwrites those of the pages that it writes to, in place. A page's scale is the
        smallest power of two with which its largest finite element does not saturate. A page begins with the token at
        its first slot, whatever scale and elements it had before. When a later token is larger than its scale allows,
        the page's earlier tokens are requantised in the same call, which changes none of them but those that become
        subnormal: a finite x is stored with an error of at most `|x| / 16 + scale / 512` (float8_e4m3fn) or `|x| / 8 +
        scale / 65536` (float8_e5m2), however often its page's scale has grown. No two sequences may then write to one
        page.
      implementation: as in `flash_attention`.

    Returns:
      `(k_pages, v_pages, kv_lengths)` after the call, followed by `(k_scale, v_scale)` with `scale="dynamic"`;
      v_pages and v_scale are None if v_pages was.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `paged_attention`. There is no derivative, in
        either mode: one that is used raises.

    Source: Kwon et al., PagedAttention (2023).

    Example:
      >>> append = jax.jit(append_kv, donate_argnames=("k_pages", "v_pages"))
      >>> k_pages, v_pages, lengths = append(k_pages, v_pages, k, v, tables, lengths)
    """
    arguments = AppendArguments(
        k_pages=k_pages,
        v_pages=v_pages,
        key=key,
        value=value,
        block_tables=block_tables,
        kv_lengths=kv_lengths,
        cu_seqlens=cu_seqlens,
        page_layout=page_layout,
        rotary=rotary,
        interleaved=interleaved,
        k_scale=k_scale,
        v_scale=v_scale,
        scale=scale,
        implementation=implementation,
    )
    spec, operands = validate.append("append_kv", arguments)
    results = (_in_plain_jax if spec.implementation == "xla" else _call)(spec, operands)
    return (
        results if v_pages is not None else tuple(None if i in (1, 4) else x for i, x in enumerate(results))
    )


def _call(spec: AppendSpec, operands: Operands) -> tuple[jax.Array, ...]:
    """The pools and scales from the custom call, and the lengths from plain JAX."""
    # The lengths do not vary over axes that split only heads.
    varying = equally_varying(operands)
    k_pages, v_pages, *scales = bind(APPEND_DYNAMIC if spec.dynamic else APPEND, spec, varying)
    before = jax.typeof(operands["kv_lengths"]).sharding
    lengths = in_automatic_axes(lambda x: _lengths_after(x, _slots(spec, x)), operands, before)
    return k_pages, v_pages, lengths, *scales


def _in_plain_jax(spec: AppendSpec, operands: Operands) -> tuple[jax.Array, ...]:
    names = ("k_pages", "v_pages", "kv_lengths", *(("k_scale", "v_scale") if spec.dynamic else ()))
    shardings = tuple(jax.typeof(operands[name]).sharding for name in names)
    moving = {name: x for name, x in operands.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    operands |= {
        name: no_derivative.without_derivative(x, no_derivative.APPEND) for name, x in moving.items()
    }
    results: tuple[jax.Array, ...] = in_automatic_axes(partial(_scatter, spec), operands, shardings)
    return results


def _scatter(spec: AppendSpec, operands: Operands) -> tuple[jax.Array, ...]:
    """All results in plain JAX."""
    if "cu_seqlens" in operands:
        operands = whole_beside_manual(operands, ("key", "value"))
    slots = _slots(spec, operands)
    key = operands["key"]
    if "cos" in operands:
        key = apply_rotary(
            key, slots.position, operands["cos"], operands["sin"], interleaved=spec.interleaved
        )
    pools, scales = [], []
    for name, new, scale in (("k_pages", key, "k_scale"), ("v_pages", operands["value"], "v_scale")):
        pool = gather.tokens_first(operands[name], spec.page_layout)
        shape = pool.shape
        if spec.split_columns and name == "k_pages":
            pool = pool.reshape(*shape[:3], shape[3] * shape[4])
        page, slot = jnp.where(slots.written, slots.page, pool.shape[0]), slots.position % pool.shape[1]
        if spec.dynamic:
            rows = new.reshape(page.size, *new.shape[-2:])
            pool, after = quantise.append(pool, operands[scale], rows, page.reshape(-1), slot.reshape(-1))
            scales.append(after)
        else:
            by_row = gather.scale_of_pages(operands[scale], page) if scale in operands else None
            pool = pool.at[page, slot].set(quantise.stored(new, by_row, pool.dtype), mode="drop")
        pools.append(gather.tokens_first(pool.reshape(shape), spec.page_layout))
    return pools[0], pools[1], _lengths_after(operands, slots), *scales


class _Slots(NamedTuple):
    """The destination of each new token, `[n, s]` or `[t]`, and the sequences' lengths before the call, `[n]`."""

    sequence: jax.Array
    position: jax.Array
    page: jax.Array
    written: jax.Array
    lengths: jax.Array


def _slots(spec: AppendSpec, operands: Operands) -> _Slots:
    packed = "cu_seqlens" in operands
    if packed:
        operands = whole_beside_manual(operands, ("block_tables", "kv_lengths"))
    tables = operands["block_tables"]
    pool = gather.tokens_first(operands["k_pages"], spec.page_layout)
    pages, page_size = pool.shape[:2]
    if packed:
        sequence, row, _ = offsets.locate(operands["cu_seqlens"], operands["key"].shape[0])
    else:
        n, s = operands["key"].shape[:2]
        sequence, row = jnp.arange(n, dtype=jnp.int32)[:, None], jnp.arange(s, dtype=jnp.int32)[None]
    capacity = gather.table_capacity(tables, page_size)
    lengths = jnp.clip(operands["kv_lengths"], 0, capacity)
    position = (jnp.pad(lengths, (0, 1))[sequence] if packed else lengths[:, None]) + row
    inside = (row >= 0) & (position < capacity)
    at = jnp.where(inside, position // page_size, 0)
    # The tables are padded, because they may be empty. XLA's partitioner aborts where tables that are split among
    # devices are read by two indices inside shard_map (jaxlib 0.12.0).
    padded = jnp.pad(tables, ((0, 1), (0, 1)), constant_values=-1)
    page = padded[sequence, at] if packed else jnp.take_along_axis(padded[:-1], at, 1)
    return _Slots(sequence, position, page, inside & (page >= 0) & (page < pages), lengths)


def _lengths_after(operands: Operands, slots: _Slots) -> jax.Array:
    """The lengths before the call plus the tokens written."""
    if "cu_seqlens" not in operands:
        return slots.lengths + slots.written.sum(1, dtype=jnp.int32)
    return slots.lengths.at[slots.sequence].add(slots.written.astype(jnp.int32))
