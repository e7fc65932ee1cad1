"""The vmap rule: a mapped axis becomes one more leading dimension, of size 1 for operands that are not mapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive


def batch(
    primitive: Primitive, in_place: int, args: Sequence[Any], axes: Sequence[Any], **params: Any
) -> Any:
    """Binds the primitive with the mapped axes in front; `in_place` operands come first and are broadcast in full."""
    size = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    moved = [
        jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes)
    ]
    for i in range(in_place):  # an operand that is overwritten must be as large as its result
        moved[i] = jnp.broadcast_to(moved[i], (size, *moved[i].shape[1:]))
    results = primitive.bind(*moved, **params)
    return results, [0] * len(results)
