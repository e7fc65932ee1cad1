"""The differentiable operation: custom_vjp around the forward and backward primitives."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from . import reference
from .operands import BACKWARD, BIAS_GRADIENT, FORWARD
from .primitives import bind, equally_varying
from .spec import AttentionSpec

Operands = dict[str, jax.Array]
Pair = tuple[jax.Array, jax.Array]


def attend(spec: AttentionSpec, operands: Operands) -> Pair:
    """(out, lse) of checked operands, by plain JAX or by the custom call."""
    if spec.implementation == "xla":
        return reference.attention(spec, operands)
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


def _backward(spec: AttentionSpec, residuals: Any, cotangents: Pair) -> tuple[dict[str, jax.Array | None]]:
    operands, out, lse = residuals
    dout, dlse = cotangents
    delta = _rows(dout.astype(jnp.float32) * out.astype(jnp.float32), spec) - dlse  # rowsum(dO ∘ O) − dlse
    operands = {**operands, "dout": dout, "lse": lse, "delta": delta}
    gradients: dict[str, jax.Array | None] = dict.fromkeys(spec.operands)
    gradients |= zip(("query", "key", "value"), bind(BACKWARD, spec, operands))
    if "bias" in spec.operands:
        (gradients["bias"],) = bind(BIAS_GRADIENT, spec, operands)
    if "sinks" in spec.operands:
        gradients["sinks"] = _sinks_gradient(spec, operands["sinks"], lse, delta)
    return (gradients,)


def _rows(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """[…, s, h, dv] → row sums in lse's order, […, h, s]."""
    return jnp.swapaxes(x.sum(-1), -1, -2)


def _sinks_gradient(spec: AttentionSpec, sinks: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """dsink = −Σ exp(sink − lse)·delta over the rows in use; the others have lse −inf."""
    used = lse > -jnp.inf
    weight = jnp.exp(jnp.where(used, sinks[:, None] - lse, -jnp.inf))
    terms = jnp.where(used, weight * delta, 0)
    return -terms.sum([axis for axis in range(lse.ndim) if axis != lse.ndim - 2])


_attend.defvjp(_forward, _backward)
