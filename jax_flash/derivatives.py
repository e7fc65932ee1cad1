"""The tangents and the gradients of one call: the custom calls, and sums over rows in plain JAX around them.

Sinks and a bias of one column change all scores of a row by the same amount, so that their contribution follows from
out and lse. Paged calls gather their pages and differentiate the contiguous call. Arrays have no leading dimensions
here (vmap adds them).
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp

from . import _jax
from .delta import delta_spec, row_products
from .operands import BACKWARD, BIAS_GRADIENT, DELTA, MAX_HEAD_DIM, OPTIONAL, TANGENT, TANGENTS
from .paged import gather
from .primitives import bind
from .spec import AttentionSpec

Operands = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]
Gradients = dict[str, jax.Array]

# --- forward mode --------------------------------------------------------------------------------------------------


def tangents(spec: AttentionSpec, operands: Operands) -> Pair:
    """(tout, tlse) from the call's operands, its results out and lse, and its nonzero tangents, all in `operands`."""
    if spec.paged:
        _check_head_dim(spec, operands)
        return _paged_tangents(spec, operands)
    moving = {name for name in TANGENTS if name in operands}
    by_score = moving & {"tquery", "tkey", "tvalue"}
    tout, tlse = _zeros(operands["out"]), _zeros(operands["lse"])
    if "tbias" in operands and not _by_row(spec, operands):
        spec = replace(spec, operands=tuple(x for x in OPTIONAL if x in (*spec.operands, "tbias")))
        by_score.add("tbias")
    if by_score:
        zeros = {"t" + n: _zeros(operands[n]) for n in ("query", "key", "value")}
        finite = (_finite_rows(operands[name]) for name in ("query", "tquery") if name in operands)
        clean = reduce(jnp.logical_and, finite)
        made = zeros | operands | {"lse": _seen_lse(operands, clean)}
        if spec.shared_kv:
            made["tvalue"] = made["tkey"]
        tout, tlse = bind(TANGENT, spec, made)
    return (tout, tlse) if by_score == moving else _with_row_tangents(spec, operands, tout, tlse)


def _with_row_tangents(spec: AttentionSpec, operands: Operands, tout: jax.Array, tlse: jax.Array) -> Pair:
    """Adds the tangents of a bias of one column, t, and of the sinks: with x = p_sink·(tsink − t), tlse += t + x and
    tout −= x·out."""
    out, lse = operands["out"], operands["lse"]
    moved = _zeros(lse)
    if "tbias" in operands and _by_row(spec, operands):
        bias, tbias = (_jax.sharded_like(operands[name], lse[..., None]) for name in ("bias", "tbias"))
        seen = (lse[..., None] != -jnp.inf) & (bias != -jnp.inf)
        moved = jnp.where(seen, tbias.astype(jnp.float32), 0)[..., 0]
    tlse += moved
    if "sinks" in operands:
        tsinks = _by_row_of_lse(operands["tsinks"], lse) if "tsinks" in operands else 0
        through = _through_sinks(operands["sinks"], lse, tsinks - moved)
        tlse += through
        wide = tout.astype(jnp.float32) - jnp.swapaxes(through, -1, -2)[..., None] * out.astype(jnp.float32)
        tout = wide.astype(tout.dtype)
    return tout, tlse


def _check_head_dim(spec: AttentionSpec, operands: Operands) -> None:
    """Only the forward has kernels for the head dims of latent pools."""
    d = max(operands["query"].shape[-1], spec.value_dim)
    if d > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"paged_attention: the head dim is {d}, and the kernels of derivatives have at most {MAX_HEAD_DIM}; "
            'implementation="xla" differentiates it'
        )


def _zeros(x: jax.Array) -> jax.Array:
    """Zeros of x's type, which jnp.zeros_like makes without explicit sharding."""
    return _jax.sharded_like(jnp.zeros_like(x), x)


def _by_row(spec: AttentionSpec, operands: Operands) -> bool:
    """Whether the bias moves all scores of a row alike, which a softcap after it prevents."""
    return not spec.bias_first and _jax.same_dim(operands["bias"].shape[-1], 1)


def _paged_tangents(spec: AttentionSpec, operands: Operands) -> Pair:
    """Gathers the pages of the pools and of their tangents; rows that need a page outside the pool are NaN."""
    by_row, by_lse = _missing_rows(spec, operands)
    dense_spec, dense = gather.differentiable(spec, operands)
    dtype = dense["query"].dtype
    dense["out"] = jnp.where(by_row, 0, operands["out"]).astype(dtype)
    dense["lse"] = jnp.where(by_lse, -jnp.inf, operands["lse"])
    named = {name: operands.get("t" + name) for name in ("query", "key", "value")}
    if spec.shared_kv:
        named["value"] = named["key"]
    zeros = {name: _zeros(operands[name]) for name, x in named.items() if x is None}
    _, moving = gather.contiguous(spec, operands | {n: x for n, x in named.items() if x is not None} | zeros)
    dense |= {"t" + name: moving[name] for name, x in named.items() if x is not None}
    tout, tlse = tangents(dense_spec, dense)
    tout = jnp.where(by_row, jnp.nan, tout).astype(operands["out"].dtype)
    return tout, jnp.where(by_lse, jnp.nan, tlse)


# --- reverse mode --------------------------------------------------------------------------------------------------


def gradients(spec: AttentionSpec, wanted: tuple[str, ...], operands: Operands) -> Gradients:
    """The gradients of the operands `wanted`, from the cotangents dout and dlse in `operands`; a missing one is 0."""
    if spec.paged:
        _check_head_dim(spec, operands)
        return _paged_gradients(spec, wanted, operands)
    out, lse = operands["out"], operands["lse"]
    dout, dlse = operands.get("dout"), operands.get("dlse")
    # rowsum(dO ∘ O) − dlse; its readers ignore rows that see nothing, but for those of sinks
    delta = _row_products(spec, operands)
    seen = _seen_lse(operands, jnp.isfinite(delta))
    if "sinks" in operands:
        delta = jnp.where(seen == -jnp.inf, 0, delta)
    if dlse is not None:
        delta = delta - dlse
    operands = {**operands, "lse": seen, "dout": _zeros(out) if dout is None else dout, "delta": delta}
    found: Gradients = {}
    if any(name in wanted for name in ("query", "key", "value")):
        found |= zip(("query", "key", "value"), bind(BACKWARD, spec, operands))
    if "bias" in wanted and not _by_row(spec, operands):
        (found["bias"],) = bind(BIAS_GRADIENT, spec, operands)
    through = _through_sinks(operands["sinks"], lse, delta) if "sinks" in operands else _zeros(lse)
    if "sinks" in wanted:
        found["sinks"] = _sinks_gradient(operands["sinks"], -through)
    if "bias" in wanted and _by_row(spec, operands):
        by_row = through if dlse is None else dlse + through
        found["bias"] = _row_bias_gradient(operands["bias"], lse, by_row)
    return {name: found[name] for name in wanted}


def _paged_gradients(spec: AttentionSpec, wanted: tuple[str, ...], operands: Operands) -> Gradients:
    """Gathers the pages, differentiates the contiguous call, adds the keys' gradients up where pages are shared.

    Rows that need a page outside the pool are left out: their dquery is NaN and the pools get nothing from them.
    """
    by_row, by_lse = _missing_rows(spec, operands)
    dense_spec, dense = gather.differentiable(spec, operands)
    dtype = dense["query"].dtype  # float32 over float8 pools
    dense["out"] = jnp.where(by_row, 0, operands["out"]).astype(dtype)
    dense["lse"] = jnp.where(by_lse, -jnp.inf, operands["lse"])
    if "dout" in operands:
        dense["dout"] = jnp.where(by_row, 0, operands["dout"]).astype(dtype)
    if "dlse" in operands:
        dense["dlse"] = jnp.where(by_lse, 0, operands["dlse"])
    # K and V are different columns of one pool.
    apart = spec.shared_kv and not dense_spec.shared_kv and "key" in wanted
    found = gradients(dense_spec, (*wanted, "value") if apart else wanted, dense)
    if apart:
        columns = operands["key"].shape[-1]
        of_values = gather.in_columns(found.pop("value"), columns, spec.value_start)
        found["key"] = gather.in_columns(found["key"], columns) + of_values
    if "query" in wanted:
        found["query"] = jnp.where(by_row, jnp.nan, found["query"]).astype(operands["query"].dtype)
    for name in ("key", "value"):
        if name in wanted:
            tables, pool = operands["block_tables"], operands[name]
            found[name] = gather.scatter_gradient(spec, found[name], tables, pool)
    return found


def _missing_rows(spec: AttentionSpec, operands: Operands) -> Pair:
    """Whether a row needs a page outside the pool, in the shapes of out's rows and of lse."""
    missing = gather.rows_missing_pages(spec, _jax.whole_beside_manual(operands, gather.BY_SEQUENCE))
    return missing[..., None], jnp.swapaxes(missing, -1, -2)


def _row_products(spec: AttentionSpec, operands: Operands) -> jax.Array:
    """rowsum(dO ∘ O) in lse's order, 0 without dO; with sinks, NaN where q is not finite."""
    out, dout = operands["out"], operands.get("dout")
    finite = operands["query"] if "sinks" in operands else None
    if dout is not None and not spec.deterministic:
        by_row: jax.Array = row_products(dout, out, finite)
        return by_row
    products = _zeros(operands["lse"])
    if dout is not None:
        pair = {"dout": _jax.sharded_like(dout, out), "out": out}
        (products,) = bind(DELTA, delta_spec(spec), operands | pair)
    return products if finite is None else jnp.where(_finite_rows(finite), products, jnp.nan)


def _finite_rows(x: jax.Array) -> jax.Array:
    """Whether all elements of the rows of x […, s, h, d] are finite, in lse's order."""
    return jnp.swapaxes(jnp.isfinite(x).all(-1), -1, -2)


def _seen_lse(operands: Operands, clean: jax.Array) -> jax.Array:
    """lse, but −inf for rows that see nothing and have a sink, too, unless they are `clean`: their q, and dO or tq, may
    be multiplied. Such a row's lse is its sink, and its out 0. So are those of a row whose values are 0, and beside
    whose sink the scores are small, but that row has gradients. The first column of out stands for all."""
    lse = operands["lse"]
    if "sinks" not in operands:
        return lse
    nothing = jnp.swapaxes(operands["out"][..., 0] == 0, -1, -2)
    is_sink = lse == _by_row_of_lse(operands["sinks"], lse)
    return jnp.where(is_sink & nothing & ~clean, -jnp.inf, lse)


def _through_sinks(sinks: jax.Array, lse: jax.Array, x: jax.Array) -> jax.Array:
    """exp(sink − lse)·x, with a weight of at most 1, however lse was rounded; 0 for rows not in use, whose lse is
    −inf."""
    used = lse != -jnp.inf
    weight = jnp.exp(jnp.minimum(_by_row_of_lse(sinks, lse) - jnp.where(used, lse, jnp.inf), 0))
    return jnp.where(used, weight * x, 0)


def _by_row_of_lse(sinks: jax.Array, lse: jax.Array) -> jax.Array:
    """Sinks [b|1, s|1, h] or [t|1, h] as they broadcast to lse, [b, h, s] or [h, t], and split as it is."""
    return _jax.sharded_like(jnp.swapaxes(sinks, -1, -2), lse)


def _sinks_gradient(sinks: jax.Array, by_row: jax.Array) -> jax.Array:
    """The gradients by row, in lse's order, summed over the tokens that share a sink."""
    return _jax.sharded_like(sum_where_one(jnp.swapaxes(by_row, -1, -2), sinks), sinks)


def sum_where_one(x: jax.Array, like: Any) -> jax.Array:
    """The sum of x over the first dimensions in which `like` has size 1."""
    shared = [
        axis
        for axis, (size, full) in enumerate(zip(like.shape, x.shape))
        if _jax.same_dim(size, 1) and not _jax.same_dim(full, 1)
    ]
    return x.sum(shared, keepdims=True) if shared else x


def _row_bias_gradient(bias: jax.Array, lse: jax.Array, by_row: jax.Array) -> jax.Array:
    """dbias of a bias [b|1, hq|1, sq|1, 1], the same for all keys of a row: it shifts lse and the sinks' weights."""
    rows = jnp.where(lse != -jnp.inf, by_row, 0)[..., None]
    return _jax.sharded_like(sum_where_one(rows, bias).astype(bias.dtype), bias)
