"""The differentiable operation: custom_vjp around the forward and backward primitives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from . import _jax, reference
from .operands import BACKWARD, BIAS_GRADIENT, DROPOUT_ROW, FORWARD
from .paged import gather
from .primitives import bind, equally_varying
from .spec import AttentionSpec

Operands = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]
Gradients = dict[str, jax.Array | None]


def attend(spec: AttentionSpec, operands: Operands) -> Pair:
    """(out, lse) of checked operands, by plain JAX or by the custom call."""
    if "position" in operands and "dropout" in operands:  # bits go by the position in the larger sequence
        first = operands["position"].astype(jnp.uint32)
        operands = operands | {"dropout": operands["dropout"].at[DROPOUT_ROW:].add(first)}
    if spec.implementation == "xla":
        return gather.attention(spec, operands) if spec.paged else reference.attention(spec, operands)
    return _attend(spec, equally_varying(operands))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: AttentionSpec, operands: Operands) -> Pair:
    out, lse = bind(FORWARD, spec, operands)
    return out, lse


def _forward(spec: AttentionSpec, operands: Operands) -> tuple[Pair, Any]:
    out, lse = bind(FORWARD, spec, operands)
    out = checkpoint_name(out, "flash_out")
    lse = checkpoint_name(lse, "flash_lse")
    return (out, lse), (operands, out, lse)


def _backward(spec: AttentionSpec, residuals: Any, cotangents: Pair) -> tuple[Gradients]:
    operands, out, lse = residuals
    gradients = _paged_gradients if spec.paged else _gradients
    return (gradients(spec, operands, (out, lse), cotangents),)


def _gradients(spec: AttentionSpec, operands: Operands, results: Pair, cotangents: Pair) -> Gradients:
    (out, lse), (dout, dlse) = results, cotangents
    delta = _row_products(dout, out, lse) - dlse  # rowsum(dO ∘ O) − dlse
    operands = {**operands, "dout": dout, "lse": lse, "delta": delta}
    gradients: Gradients = dict.fromkeys(spec.operands)
    gradients |= zip(("query", "key", "value"), bind(BACKWARD, spec, operands))
    sinks = operands.get("sinks")
    from_sinks = jnp.zeros_like(lse) if sinks is None else _through_sinks(sinks, lse, delta)
    if sinks is not None:
        gradients["sinks"] = _jax.sharded_like(-_sum_to_heads(from_sinks), sinks)
    if "bias" in spec.operands:
        bias = operands["bias"]
        if bias.shape[-1] == 1:
            gradients["bias"] = _row_bias_gradient(bias, lse, dlse + from_sinks)
        else:
            (gradients["bias"],) = bind(BIAS_GRADIENT, spec, operands)
    return gradients


def _paged_gradients(spec: AttentionSpec, operands: Operands, results: Pair, cotangents: Pair) -> Gradients:
    """Gather the pages, differentiate the contiguous call, add the keys' gradients up where pages are shared.

    Rows that need a page outside the pool are left out: their dquery is NaN and the pools get nothing from them.
    """
    missing = gather.rows_missing_pages(spec, operands)
    by_row, by_lse = missing[..., None, None], missing[..., None, :]
    dense_spec, dense = gather.contiguous(spec, operands)
    (out, lse), (dout, dlse) = results, cotangents
    dense_results = jnp.where(by_row, 0, out), jnp.where(by_lse, -jnp.inf, lse)
    dense_cotangents = jnp.where(by_row, 0, dout).astype(dense["query"].dtype), jnp.where(by_lse, 0, dlse)
    dense_gradients = _gradients(dense_spec, dense, dense_results, dense_cotangents)
    gradients: Gradients = {name: dense_gradients.get(name) for name in spec.operands}
    dquery = dense_gradients["query"]
    assert dquery is not None
    gradients["query"] = jnp.where(by_row, jnp.nan, dquery).astype(operands["query"].dtype)
    for name in ("key", "value"):
        pool, gradient = operands[name], dense_gradients[name]
        assert gradient is not None
        stored = pool.dtype not in gather.FLOAT8
        tables = operands["block_tables"]
        gradients[name] = gather.scatter_gradient(spec, gradient, tables, pool) if stored else None
    return gradients


def _row_products(x: jax.Array, y: jax.Array, lse: jax.Array) -> jax.Array:
    """Σ x·y of the rows of two […, s, h, dv] in lse's order, […, h, s]; 0 for rows that see nothing."""
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    sums = jax.lax.platform_dependent(*wide, cpu=_row_dots, default=lambda x, y: (x * y).sum(-1))
    return jnp.where(lse > -jnp.inf, jnp.swapaxes(sums, -1, -2), 0)


def _row_dots(x: jax.Array, y: jax.Array) -> jax.Array:
    """For CPUs, where XLA makes a library call of a sum: it wakes threads for it, often so late that those of the
    call after it, the backward pass, start milliseconds late as well."""
    return jnp.einsum("...d,...d->...", x, y, precision=jax.lax.Precision.HIGHEST)


def _through_sinks(sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """exp(sink − lse)·delta; 0 for rows not in use, whose lse is −inf."""
    used = lse > -jnp.inf
    others = [axis for axis in range(lse.ndim) if axis != lse.ndim - 2]
    weight = jnp.exp(jnp.where(used, jnp.expand_dims(sinks, others) - lse, -jnp.inf))
    return jnp.where(used, weight * delta, 0)


def _sum_to_heads(x: jax.Array) -> jax.Array:
    """[b, h, s] or [h, s] → [h]."""
    return x.sum([axis for axis in range(x.ndim) if axis != x.ndim - 2])


def _row_bias_gradient(bias: jax.Array, lse: jax.Array, by_row: jax.Array) -> jax.Array:
    """dbias of a bias [b|1, hq|1, sq|1, 1], the same for all keys of a row: it moves lse, and what the sinks take."""
    rows = jnp.where(lse > -jnp.inf, by_row, 0)[..., None]
    summed = [axis for axis in range(rows.ndim) if bias.shape[axis] == 1 != rows.shape[axis]]
    gradient = rows.sum(summed, keepdims=True).astype(bias.dtype)
    return _jax.sharded_like(gradient, bias)


_attend.defvjp(_forward, _backward)
