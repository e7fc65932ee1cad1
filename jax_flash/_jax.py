"""Every private JAX name that this library uses, with the reason for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

# definitely_equal compares symbolic dimensions without raising.
from jax._src import core as _core

# apply_primitive runs a primitive eagerly; prim_requires_devices_during_lowering is for multi-process programs.
from jax._src import dispatch as _dispatch

# lower_with_sharding_in_types serves explicit mesh axes.
from jax._src.interpreters import mlir as _mlir
from jax.interpreters import mlir

apply_primitive = _dispatch.apply_primitive


def require_devices_during_lowering(primitive: Any) -> None:
    """Registers a primitive whose lowering reads the device assignment, as custom partitioning does."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)


def same_dim(a: Any, b: Any) -> bool:
    """Whether two dimensions, symbolic ones included, are known to be equal."""
    return bool(_core.definitely_equal(a, b))


def full_dim(sizes: Iterable[Any]) -> Any:
    """The size of a leading dimension that each operand has in full or as 1."""
    return next((size for size in sizes if not same_dim(size, 1)), 1)


def is_symbolic(dim: Any) -> bool:
    """Whether a dimension is a symbol of shape polymorphism (`jax.export`)."""
    return not isinstance(dim, int)


def manual_axes() -> frozenset[str]:
    """The mesh axes over which the code being traced is already per-device (inside shard_map)."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes over which x differs between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def sharded_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, resharded to the sharding in other's type where explicit mesh axes make them differ.

    An array made outside the mesh has no such type; outside jit, JAX places it by itself.
    """
    have, wanted = jax.typeof(x).sharding, jax.typeof(other).sharding
    if jax.sharding.AxisType.Explicit not in wanted.mesh.axis_types:
        return x
    if not isinstance(x, jax.core.Tracer) if have.mesh.empty else have.spec == wanted.spec:
        return x
    moved: jax.Array = jax.sharding.reshard(x, wanted)
    return moved


def uses_shardy() -> bool:
    """False if the user chose the GSPMD partitioner, which does not read sharding rules."""
    return bool(getattr(jax.config, "jax_use_shardy_partitioner", True))


def exporting(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether the program is lowered for `jax.export`."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def device_count(ctx: mlir.LoweringRuleContext) -> int:
    """The number of devices of the program being lowered; 1 inside a fully manual region."""
    axis_context = ctx.module_context.axis_context
    mesh = getattr(axis_context, "mesh", None)
    if mesh is not None:
        return int(mesh.size)
    return int(getattr(axis_context, "num_devices", 1) or 1)


def with_declared_sharding(ctx: mlir.LoweringRuleContext, value: Any, aval: Any) -> Any:
    """value, constrained to the sharding in its type (explicit mesh axes)."""
    return _mlir.lower_with_sharding_in_types(ctx, value, aval)
