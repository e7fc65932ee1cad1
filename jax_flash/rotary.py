"""Rotary position embedding, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ._jax import in_automatic_axes
from .checker import Checker
from .options import ArrayLike, IndexLike


def apply_rotary(
    x: ArrayLike, positions: IndexLike | int, cos: ArrayLike, sin: ArrayLike, *, interleaved: bool = False
) -> jax.Array:
    """Rotates the first features of each head by angles that grow with the token's position.

    Args:
      x: `[..., s, h, d]`, queries or keys, in float16, bfloat16 or float32; packed ones are `[t, h, d]`.
      positions: int32, broadcastable to `[..., s]`: the row of cos and sin that each token takes. Numbers outside the
        tables take the first or the last row.
      cos, sin: float32 `[positions, d_rot / 2]` of the angles. The first `d_rot ≤ d` features are rotated.
      interleaved: pairs features (2i, 2i + 1) instead of (i, i + d_rot / 2).

    Returns:
      An array with x's shape and dtype, computed in float32.

    Raises:
      ValueError, TypeError: the message names the argument, its value and what is allowed.

    Source: Su et al., RoFormer (2021).

    Example:
      >>> angles = jnp.arange(1024)[:, None] / 10000 ** (jnp.arange(0, 64, 2) / 64)
      >>> q = apply_rotary(q, jnp.arange(q.shape[1]), jnp.cos(angles), jnp.sin(angles))
    """
    check = Checker("apply_rotary")
    x = check.array("x", x)
    if x.ndim < 3:
        raise check.fail(f"x must have shape [..., s, h, d], got {x.shape}")
    check.dtype("x", x)
    positions = check.broadcastable("positions", check.int32("positions", positions), x.shape[:-2], "... s")
    cos, sin = rotary_tables(check, (cos, sin), x.shape[-1])
    angle_shape = (*x.shape[:-2], 1, cos.shape[1])

    def of_tokens(given: tuple[jax.Array, ...]) -> list[jax.Array]:
        at, *tables = given
        rows = [jnp.take(t, at, axis=0, mode="clip")[..., None, :] for t in tables]
        return [jnp.broadcast_to(t, angle_shape) for t in rows]

    of_x = jax.typeof(x).sharding
    by_token = of_x.update(spec=PartitionSpec(*of_x.spec[:-2], None, None))
    c, s = in_automatic_axes(of_tokens, (positions, cos, sin), [by_token, by_token])
    count = 2 * cos.shape[1]
    pairs = check.flag("interleaved", interleaved) and count > 0
    features = x[..., :count].astype(jnp.float32)
    if pairs:
        a, b = (jax.lax.slice_in_dim(features, i, None, 2, -1) for i in (0, 1))
    else:
        a, b = jnp.split(features, 2, axis=-1)
    parts = a * c - b * s, b * c + a * s  # (a + ib)·exp(iθ)
    rotated = jnp.stack(parts, -1).reshape(features.shape) if pairs else jnp.concatenate(parts, -1)
    rotated = rotated.astype(x.dtype)
    if count == x.shape[-1]:  # jax 0.10 has no arrays without elements on explicit meshes outside jit
        return rotated
    return jnp.concatenate([rotated, x[..., count:]], -1)


def rotary_pair(check: Checker, rotary: Any) -> tuple[Any, Any]:
    """The two items of the argument `rotary`."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise check.fail(f"rotary must be a pair (cos, sin), got {type(rotary).__name__}", TypeError)
    return rotary[0], rotary[1]


def rotary_tables(check: Checker, rotary: Any, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of the argument `rotary`, checked against the head dim."""
    cos, sin = (check.float32(name, x) for name, x in zip(("cos", "sin"), rotary_pair(check, rotary)))
    check.rank("cos", cos, "positions d_rot/2")
    check.shape("sin", sin, cos.shape, "positions d_rot/2")
    if 2 * cos.shape[1] > head_dim:
        raise check.fail(
            f"cos has {cos.shape[1]} columns, for {2 * cos.shape[1]} features; the head dim is {head_dim}"
        )
    if cos.shape[0] < 1:
        raise check.fail("cos must have at least one position, got 0")
    return cos, sin
