"""Searches in ascending lists."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._jax import equally_varying, same_dim
from .checker import INT32_MAX
from .indexing import take


def first_from(
    elements: Array, start: Array, count: Array, wanted: Array, most: Any, *, above: bool = False
) -> Array:
    """The index of the first element of each list that is ≥ `wanted`, or > it with `above`.

    Args:
      elements: of all lists, [n], or of the lists of each batch entry, [b, n].
      start, count: a list consists of the `count` elements from `start` on. They broadcast with `wanted`.
      wanted: int32, one number for each list.
      most: no count exceeds this, a number or a symbolic dimension.
    """
    wide = jnp.broadcast_shapes(wanted.shape, count.shape, start.shape)
    given = {"lo": jnp.zeros_like(wanted), "hi": count, "start": start, "wanted": wanted}
    given = {name: jnp.broadcast_to(x, wide) for name, x in given.items()}
    if same_dim(most, 0):
        return given["lo"]
    steps = most.bit_length() if isinstance(most, int) else 31
    values = tuple(equally_varying(given | {"elements": elements}).values())
    found: Array = _bisect(values, above, steps)
    return found


# Jitted, because outside jit JAX would compile platform_dependent in every call.
@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _bisect(values: tuple[Array, ...], above: bool, steps: int) -> Array:
    def search(values: tuple[Array, ...], unroll: bool) -> Array:
        lo, hi, start, wanted, elements = values
        element_of = partial(take, fill=INT32_MAX)
        if elements.ndim == 2:
            element_of = jax.vmap(element_of)

        def step(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            lo, hi = bounds
            middle = (lo + hi) // 2
            element = element_of(elements, start + middle)
            before = (element <= wanted if above else element < wanted) & (lo < hi)
            return jnp.where(before, middle + 1, lo), jnp.where(before, hi, middle)

        found: Array = lax.fori_loop(0, steps, step, (lo, hi), unroll=unroll)[0]
        return found

    # Unrolled, XLA would fuse the steps on CPUs and compile each twice as often as the next one (jax 0.12). On GPUs a
    # loop launches several kernels for each step.
    index: Array = lax.platform_dependent(
        values, cpu=partial(search, unroll=False), default=partial(search, unroll=True)
    )
    return index
