"""Every private name of JAX that this library needs, in one place, with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax._src import core as _core  # definitely_equal: comparisons of symbolic dimensions that never raise
from jax._src import (
    dispatch as _dispatch,
)  # apply_primitive; devices during lowering (multi-process programs)
from jax._src.interpreters import mlir as _mlir  # lower_with_sharding_in_types: explicit mesh axes
from jax.interpreters import mlir

apply_primitive = _dispatch.apply_primitive


def require_devices_during_lowering(primitive: Any) -> None:
    """Custom partitioning looks at the device assignment while lowering; JAX wants such primitives named."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)


def same_dim(a: Any, b: Any) -> bool:
    """True when two dimensions, symbolic ones included, are certainly equal."""
    return bool(_core.definitely_equal(a, b))


def full_dim(sizes: Iterable[Any]) -> Any:
    """The size of a leading dimension that each operand has whole or as 1."""
    return next((size for size in sizes if not same_dim(size, 1)), 1)


def is_symbolic(dim: Any) -> bool:
    return not isinstance(dim, int)


def manual_axes() -> frozenset[str]:
    """The mesh axes over which the code being traced is already per-device (inside shard_map)."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes over which x differs between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def sharded_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, resharded to the type of other where explicit mesh axes tell them apart."""
    have, wanted = jax.typeof(x).sharding, jax.typeof(other).sharding
    if jax.sharding.AxisType.Explicit not in have.mesh.axis_types or have.spec == wanted.spec:
        return x
    moved: jax.Array = jax.sharding.reshard(x, have.update(spec=wanted.spec))
    return moved


def uses_shardy() -> bool:
    """False where the user asked for the old partitioner, which knows no sharding rules."""
    return bool(getattr(jax.config, "jax_use_shardy_partitioner", True))


def exporting(ctx: mlir.LoweringRuleContext) -> bool:
    return bool(ctx.module_context.lowering_parameters.for_export)


def device_count(ctx: mlir.LoweringRuleContext) -> int:
    """Number of devices of the program being lowered; 1 inside a fully manual region."""
    axis_context = ctx.module_context.axis_context
    mesh = getattr(axis_context, "mesh", None)
    if mesh is not None:
        return int(mesh.size)
    return int(getattr(axis_context, "num_devices", 1) or 1)


def with_declared_sharding(ctx: mlir.LoweringRuleContext, value: Any, aval: Any) -> Any:
    """value, constrained to the sharding of its type (explicit mesh axes)."""
    return _mlir.lower_with_sharding_in_types(ctx, value, aval)
