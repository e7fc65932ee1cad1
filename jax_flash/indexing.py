"""Reads at indices that may lie outside an array.

Only indices inside reach JAX: `checkify.index_checks` reports any other, whichever mode says what it means.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def is_inside(x: jax.Array, index: jax.Array) -> jax.Array:
    """Whether each index lies in the first dimension of x, from which negative ones do not count backwards."""
    return (index >= 0) & (index < x.shape[0])


def take(x: jax.Array, index: jax.Array, fill: float) -> jax.Array:
    """The elements of x along its first dimension; `fill` for an index outside it."""
    inside = is_inside(x, index)
    found = x.at[jnp.where(inside, index, 0)].get(mode="promise_in_bounds")
    inside = jnp.expand_dims(inside, range(index.ndim, found.ndim))
    return jnp.where(inside, found, jnp.asarray(fill, x.dtype))
