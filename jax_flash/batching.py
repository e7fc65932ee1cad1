"""The vmap rule: a mapped axis becomes one more leading dimension, of size 1 for operands that are not mapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from . import _jax
from .spec import Spec


def batch(primitive: Primitive, in_full: int, args: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
    """Binds the primitive with the mapped axes in front.

    The first `in_full` operands, such as those that the call overwrites, are repeated for every entry of the mapped
    axis.
    """
    size = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    moved = [
        jnp.expand_dims(x, 0) if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(args, axes)
    ]
    for i in range(in_full):
        moved[i] = jnp.broadcast_to(moved[i], (size, *moved[i].shape[1:]))
    results = primitive.bind(*moved, **params)
    return results, [0] * len(results)


def leading(spec: Spec, name: str, ndim: int) -> int:
    """How many leading batch dimensions an operand of this rank carries."""
    return ndim - len(spec.dims[name])


def named_sizes(spec: Spec, shapes: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The sizes of dimensions by their names in csrc/operands.def, without those that may be broadcast."""
    found = {
        dim: size
        for name, shape in shapes.items()
        for dim, size in zip(spec.dims[name], shape[leading(spec, name, len(shape)) :])
        if not dim.endswith("*")
    }
    if spec.value_dim:
        found["dv"] = spec.value_dim
    return found


def over_leading(
    run: Callable[[dict[str, jax.Array]], Any], spec: Spec, operands: dict[str, jax.Array]
) -> Any:
    """Maps `run`, which has no leading dimensions, over the leading dimensions of the operands."""
    if not leading(spec, "query", operands["query"].ndim):
        return run(operands)
    size = _jax.full_dim(x.shape[0] for x in operands.values())
    full = {name: _jax.same_dim(x.shape[0], size) for name, x in operands.items()}
    mapped = {name: x if full[name] else x[0] for name, x in operands.items()}
    axes = {name: 0 if full[name] else None for name in operands}
    return jax.vmap(lambda row: over_leading(run, spec, row), in_axes=(axes,))(mapped)
