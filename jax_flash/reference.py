"""The equations of docs/architecture.md in jax.numpy: `implementation="xla"`, and the tests' oracle.

Every visible pair of a query row i and a key column j has a score s; p = softmax(s), o = P·V. A packed
(varlen) batch is one batch entry whose sequences are segments. Rows without a visible key and keys that no row
sees (those past a length included) are replaced by zeros before the products, and the results of such rows by
constants after them, so that NaN there reaches neither results nor gradients. A key that other rows see may be NaN
or infinite too. Then its hidden scores are not used; derivatives, and P·V, replace its elements that are not finite
by zeros; and rows of P·V that see such a value become NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from . import philox
from ._jax import same_dim
from .largest import max_or_nan
from .places import Place, place_fixed, place_varlen
from .spec import UNLIMITED, AttentionSpec
from .visible.rows import minus, plus

_INF = float("inf")
_PACKED = ("query", "key", "value")


@partial(jax.jit, static_argnames=("spec", "round_to"), inline=True)
def attention(
    spec: AttentionSpec, operands: dict[str, Array], *, round_to: jnp.dtype | None = None
) -> tuple[Array, ...]:
    """Attention by its equations, in O(sq·sk) memory; JAX differentiates it.

    Args:
      spec: the static options.
      operands: the arrays of `csrc/operands.def`, without leading dimensions (vmap adds them).
      round_to: the dtype that S and P are rounded to, by default none; tests measure the error of kernels with it.

    Returns:
      out `[b, sq, hq, dv]` in query's dtype and lse `[b, hq, sq]` in float32; packed: `[tq, hq, dv]` and
      `[hq, tq]`; and row_max, like lse, if the spec asks for it. Everything is computed in float32, or in float64 if
      query is float64 (lse and row_max then are float64 too).
    """
    if spec.layout == "fixed":
        return _attend(spec, operands, place_fixed(spec, operands), round_to)
    batch = operands | {name: operands[name][None] for name in _PACKED}
    return tuple(x[0] for x in _attend(spec, batch, place_varlen(spec, operands), round_to))


def _attend(
    spec: AttentionSpec, operands: dict[str, Array], place: Place, round_to: jnp.dtype | None
) -> tuple[Array, ...]:
    dtype = operands["query"].dtype
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    visible = _visible(spec, operands, place)  # [b|1, hq|1, sq, sk]
    row_read = jnp.swapaxes(visible.any(3), 1, 2)[..., None]  # [b|1, sq, hq|1, 1]
    column_read = visible.any((1, 2))[..., None, None]  # [b|1, sk, 1, 1]
    q = jnp.where(row_read, operands["query"].astype(wide), 0)
    k = jnp.where(column_read, operands["key"].astype(wide), 0)
    v = k if spec.shared_kv else jnp.where(column_read, operands["value"].astype(wide), 0)

    s = jnp.where(visible, spec.scale * _query_key(q, k), 0)
    s = _score(spec, operands, place, visible, s)  # [b, hq, sq, sk]
    s = jnp.where(visible, _round(s, round_to), -_INF)
    row_max = (max_or_nan(s),) if spec.row_max else ()
    p, lse = _softmax(s, _round(_sink(operands, place, wide), round_to))
    p = jnp.where(visible, p, 0)  # also zero if the row's maximum is NaN
    p = _drop(spec, operands, place, _round(p, round_to))
    nonfinite = jnp.swapaxes(~jnp.isfinite(v).all(3), 1, 2)  # [b, hk, sk]
    group = p.shape[1] // v.shape[2]
    by_query_head = jnp.broadcast_to(nonfinite[:, :, None], (*nonfinite.shape[:2], group, nonfinite.shape[2]))
    nonfinite = by_query_head.reshape(*p.shape[:2], v.shape[1])  # [b, hq, sk]
    sees_nonfinite = jnp.swapaxes((visible & nonfinite[:, :, None]).any(3), 1, 2)[..., None]  # [b, sq, hq, 1]
    o = jnp.where(row_read, _probability_value(p, v, sees_nonfinite), 0)  # [b, sq, hq, dv]
    return o.astype(dtype), lse, *row_max


def band_limits(
    spec: AttentionSpec, operands: dict[str, Array], diagonal: Array, sequence: Array
) -> tuple[Array | None, Array | None]:
    """The first and the last key that the band leaves to each row, in the shape of `diagonal`; None: no limit.

    Args:
      diagonal: c(i), before a window that is data moves it.
      sequence: the batch entry or sequence of each row; those past the last one have no rows.
    """

    def of_rows(name: str) -> Array | None:
        if name not in operands:
            return None
        x = operands[name]
        if not spec.packed or same_dim(x.shape[0], 1):
            return x.reshape(x.shape[0], *(1,) * (diagonal.ndim - 1))
        return jnp.pad(x, (0, 1))[sequence]

    offset = of_rows("window_offset")

    def limit(name: str, static: int, toward: Callable[[Array, Array], Array]) -> Array | None:
        side = of_rows(name)
        if side is None and static == UNLIMITED:
            return None
        side = jnp.full((1,) * diagonal.ndim, static, jnp.int32) if side is None else side
        found: Array = plus(diagonal, toward(jnp.zeros_like(side) if offset is None else offset, side))
        return found

    return limit("window_left", spec.left, minus), limit("window_right", spec.right, plus)


def _offset(place: Place) -> Array:
    """j − c(i), the distance of key j behind the diagonal of row i, `[b|1, 1, sq, sk]`."""
    return place.column[:, None, None, :] - place.diagonal[:, None, :, None]


def _visible(spec: AttentionSpec, operands: dict[str, Array], place: Place) -> Array:
    """Whether query row i sees key j, `[b|1, hq|1, sq, sk]`."""
    visible = place.row_used[:, None, :, None] & place.column_used[:, None, None, :]
    first, last = band_limits(spec, operands, place.diagonal, place.sequence)
    if first is not None:
        visible &= place.column[:, None, None, :] >= first[:, None, :, None]
    if last is not None:
        visible &= place.column[:, None, None, :] <= last[:, None, :, None]
    if place.segments is not None:
        q_segment, k_segment = place.segments
        visible &= q_segment[:, None, :, None] == k_segment[:, None, None, :]
    if "mask" in operands:
        visible &= operands["mask"]
    if "ranges" in operands:
        visible &= _in_ranges(operands["ranges"], place)
    if "block_mask" in operands:
        visible &= _in_blocks(spec, operands, place)
    if "draft_mask" in operands:
        visible &= _drafts(spec, operands["draft_mask"], operands, place)
    if "bias" in operands:
        visible &= operands["bias"] != -_INF
    return visible


def _in_ranges(ranges: Array, place: Place) -> Array:
    """Whether key j lies in one of the ranges of row i, `[b|1, hq|1, sq, sk]`; ranges: `[b|1, hq|1, sq, 2|4]`, packed
    `[hq|1, tq, 2|4]`."""
    if ranges.ndim == 3:
        ranges = ranges[None]
    column = place.column[:, None, None, :]
    lo, hi = ranges[..., 0::2, None], ranges[..., 1::2, None]
    return ((lo[..., 0, :] <= column) & (column < hi[..., 0, :])) | (
        (lo[..., -1, :] <= column) & (column < hi[..., -1, :])
    )


def _in_blocks(spec: AttentionSpec, operands: dict[str, Array], place: Place) -> Array:
    """Whether key j lies in a block that the block of row i sees, `[b|1, hq|1, sq, sk]`."""
    first_row, first_key = operands.get("position", (0, 0))
    if spec.layout == "fixed":
        return seen_blocks(
            spec, operands["block_mask"], place.row[0] + first_row, place.column[0] + first_key
        )
    seen = seen_blocks(spec, operands["block_mask"], place.row[0], place.column[0], place.sequence[0])
    return jnp.swapaxes(seen, 0, 1)[None]


def seen_blocks(
    spec: AttentionSpec, mask: Array, row: Array, column: Array, sequence: Array | None = None
) -> Array:
    """The pairs that a block mask `[b|1, h|1, blocks of rows, blocks of keys]` shows, given the positions of rows and
    those of keys `[sk]`: `[b|1, h|1, sq, sk]`. Rows of several sequences, of shape `…`, give `[…, h|1, sk]`. Rows and
    keys past the last block see nothing. In a packed batch blocks of one row are those of the packed rows."""
    by_row = spec.packed and spec.block[0] == 1
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, int(not by_row)), (0, 1)))
    rows = jnp.clip(row // spec.block[0], 0, mask.shape[2] - 1)
    columns = jnp.minimum(column // spec.block[1], mask.shape[3] - 1)
    if by_row:
        of_rows = jnp.swapaxes(mask[0], 0, 1)
    elif sequence is None:
        of_rows = mask[:, :, rows]
    else:
        of_rows = jnp.swapaxes(mask, 1, 2)[jnp.clip(sequence, 0, mask.shape[0] - 1), rows]
    return of_rows[..., columns]


def _drafts(spec: AttentionSpec, mask: Array, operands: dict[str, Array], place: Place) -> Array:
    """The pairs that the draft mask shows, `[b, 1, sq, sk]`: new token a sees new token b, which is key new + b, if the
    mask is true there. It does not apply to a sequence with more rows than the mask has."""
    size = mask.shape[-1]
    n = operands["query"].shape[0] if spec.layout == "fixed" else operands["cu_seqlens_q"].shape[0] - 1
    of_rows = jnp.broadcast_to(mask, (n, size, size))  # [b, sq, size]
    if spec.packed:
        of_rows = jnp.pad(of_rows, ((0, 1), (0, 0), (0, 0)))
        of_rows = of_rows[place.sequence, jnp.clip(place.row, 0, size - 1)]
    token = place.column[:, None, :] - place.new[..., None]  # [b, sq | 1, sk]
    token = jnp.broadcast_to(token, (*of_rows.shape[:2], token.shape[2]))
    seen = jnp.take_along_axis(of_rows, jnp.clip(token, 0, size - 1), axis=2)
    return (seen | (token < 0) | (place.rows > size)[..., None])[:, None]


def draft_mask(spec: AttentionSpec, operands: dict[str, Array]) -> Array:
    """The draft mask of a fixed call as a mask, `[b, 1, sq, sk]`."""
    return _drafts(spec, operands["draft_mask"], operands, place_fixed(spec, operands))


def _score(spec: AttentionSpec, operands: dict[str, Array], place: Place, visible: Array, s: Array) -> Array:
    """s ← softcap(s) + bias − slope·|c(i) − j|, or softcap(s + bias) − …"""
    bias = jnp.where(visible, operands["bias"].astype(s.dtype), 0) if "bias" in operands else 0
    if spec.bias_first:
        s += bias
    if spec.softcap:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    if "bias" in operands and not spec.bias_first:
        s += bias
    if "alibi_slopes" in operands:
        s -= _slopes(spec, operands, place).astype(s.dtype) * jnp.abs(_offset(place)).astype(s.dtype)
    return s


def _slopes(spec: AttentionSpec, operands: dict[str, Array], place: Place) -> Array:
    """The alibi slope of each row, `[b|1, hq, sq|1, 1]`."""
    slopes = lax.stop_gradient(operands["alibi_slopes"])
    if spec.layout == "fixed":
        return slopes[:, :, None, None]
    slopes = jnp.broadcast_to(slopes, (operands["cu_seqlens_q"].shape[0] - 1, slopes.shape[1]))
    slopes = jnp.pad(slopes, ((0, 1), (0, 0)))[place.sequence[0]]  # [n + 1, hq] → [tq, hq]
    return slopes.T[None, :, :, None]


def _sink(operands: dict[str, Array], place: Place, dtype: DTypeLike) -> Array:
    """The logit of each row's sink, `[b|1, hq|1, sq|1, 1]`: one more column of S, which has no value."""
    if "sinks" not in operands:
        return jnp.full((1, 1, 1, 1), -_INF, dtype)
    sinks = operands["sinks"].astype(dtype)  # [b|1, sq|1, hq], packed [tq|1, hq]
    sinks = jnp.swapaxes(sinks.reshape((1,) * (3 - sinks.ndim) + sinks.shape), 1, 2)[..., None]
    return jnp.where(place.row_used[:, None, :, None], sinks, -_INF)


def _softmax(s: Array, sink: Array) -> tuple[Array, Array]:
    """P and lse = log Σ exp(s), `[b, hq, sq]`; a row of −inf has P = 0 and lse = −inf."""
    m = jnp.maximum(jnp.max(s, axis=3, keepdims=True, initial=-_INF), sink)
    m = lax.stop_gradient(jnp.where(m == -_INF, 0, m))
    behind = s - m  # XLA may round scale · q·k − m once; then it is not 0 where the rounded score is m
    e = jnp.exp(behind - lax.stop_gradient(jnp.where(s >= m, behind, 0)))
    total = jnp.sum(e, axis=3, keepdims=True) + jnp.exp(sink - m)
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    lse = jnp.where(nothing, -_INF, m + jnp.log(total))
    return e / total, lse[..., 0]


def _drop(spec: AttentionSpec, operands: dict[str, Array], place: Place, p: Array) -> Array:
    if "dropout" not in operands:
        return p
    kept = philox.keep(
        operands["dropout"],
        spec.dropout_rate,
        batch=place.sequence[:, None, :, None],
        head=jnp.arange(p.shape[1], dtype=jnp.int32)[None, :, None, None],
        row=place.row[:, None, :, None],
        column=place.column[:, None, None, :],
    )
    return jnp.where(kept, p / (1 - spec.dropout_rate), 0)


@jax.custom_jvp
def _query_key(q: Array, k: Array) -> Array:
    """Q·Kᵀ `[b, hq, sq, sk]`. Its derivative replaces elements of K that are not finite by zeros, because a hidden key
    has dS = 0, and 0 · NaN is NaN. If the key is seen, dS is NaN anyway."""
    return _product_of_keys(q, k)


@_query_key.defjvp
def _query_key_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (q, k), (tq, tk) = primals, tangents
    return _query_key(q, k), _product_of_keys(tq, _finite(k)) + _product_of_keys(q, tk)


@jax.custom_jvp
def _probability_value(p: Array, v: Array, sees_nonfinite: Array) -> Array:
    """P·V `[b, sq, hq, dv]` over the finite elements of V; NaN in rows that see others."""
    return jnp.where(sees_nonfinite, jnp.nan, _product_of_values(p, _finite(v)))


@_probability_value.defjvp
def _probability_value_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    (p, v, sees_nonfinite), (tp, tv, _) = primals, tangents
    of_p = _product_of_values(tp, _finite(v)) * jnp.where(sees_nonfinite, jnp.nan, 1).astype(p.dtype)
    return _probability_value(p, v, sees_nonfinite), of_p + _product_of_values(p, tv)


def _finite(x: Array) -> Array:
    """x, with zeros in place of elements that are not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _product_of_keys(q: Array, k: Array) -> Array:
    """Q·Kᵀ `[b, hq, sq, sk]`; query head h·g + r reads KV head h."""
    b, sq, hq, d = q.shape
    hk = k.shape[2]
    q = q.reshape(b, sq, hk, hq // hk, d)
    s = jnp.einsum("bihrd,bjhd->bhrij", q, k, precision=lax.Precision.HIGHEST)
    return s.reshape(b, hq, sq, k.shape[1])


def _product_of_values(p: Array, v: Array) -> Array:
    """P·V `[b, sq, hq, dv]`."""
    b, hq, sq, sk = p.shape
    hk, dv = v.shape[2:]
    p = p.reshape(b, hk, hq // hk, sq, sk)
    o = jnp.einsum("bhrij,bjhd->bihrd", p, v, precision=lax.Precision.HIGHEST)
    return o.reshape(b, sq, hq, dv)


def _round(x: Array, dtype: jnp.dtype | None) -> Array:
    return x if dtype is None else x.astype(dtype).astype(x.dtype)
