"""Dimensions, meshes, shardings and lowering, where JAX has no public function for what this library needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from . import _private


def require_devices_during_lowering(primitive: Any) -> None:
    """Registers a primitive whose lowering reads the device assignment, as custom partitioning does."""
    _private.require_devices.add(primitive)


def same_dim(a: Any, b: Any) -> bool:
    """Whether two dimensions, symbolic ones included, are known to be equal."""
    return bool(_private.definitely_equal(a, b))


def full_dim(sizes: Iterable[Any]) -> Any:
    """The size of a leading dimension that each operand has in full or as 1."""
    return next((size for size in sizes if not same_dim(size, 1)), 1)


def is_symbolic(dim: Any) -> bool:
    """Whether a dimension is a symbol of shape polymorphism (`jax.export`)."""
    return not isinstance(dim, int)


def manual_axes() -> tuple[bool, bool]:
    """Whether any, and whether all, mesh axes are manual where the code being traced runs (inside shard_map)."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.manual_axes), mesh.are_all_axes_manual


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes over which x differs between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def equally_varying(operands: dict[str, jax.Array], also: Sequence[str] = ()) -> dict[str, jax.Array]:
    """The operands, cast to vary over the union of their manual axes and the axes `also`; the cast's transpose sums
    gradients."""
    axes = frozenset(also).union(*map(varying_axes, operands.values()))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return repeated(lambda x: jax.lax.pcast(x, missing, to="varying"), x) if missing else x

    return {name: cast(x) for name, x in operands.items()}


def repeated(repeat: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """repeat(x), whose transpose sums gradients in float32 at least.

    XLA's CPU backend aborts on bfloat16 sums over manual axes beside automatic ones (jaxlib 0.10 to 0.12).
    """
    wide = np.float32 if x.dtype in ("float16", "bfloat16") else x.dtype
    return repeat(x.astype(wide)).astype(x.dtype)


def explicit_sharding(x: jax.Array) -> NamedSharding | None:
    """The sharding in x's type, or None if no mesh axis is explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def sharded_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """x, which broadcasts to other, resharded to the sharding in other's type where explicit mesh axes make them
    differ. A dimension that x broadcasts stays whole.

    An array made outside the mesh has no such type; outside jit, JAX places it by itself.
    """
    have, wanted = jax.typeof(x).sharding, explicit_sharding(other)
    if wanted is None:
        return x
    entries = [axes if same_dim(*sizes) else None for axes, *sizes in zip(wanted.spec, x.shape, other.shape)]
    wanted = wanted.update(spec=PartitionSpec(*entries))
    if not isinstance(x, jax.core.Tracer) if have.mesh.empty else have.spec == wanted.spec:
        return x
    moved: jax.Array = jax.sharding.reshard(x, wanted)
    return moved


def constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x with this sharding: along explicit mesh axes JAX takes no constraint, but a reshard."""
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types))
    explicit = any(kinds[axis] is AxisType.Explicit for entry in sharding.spec for axis in _axes(entry))
    place: Any = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    placed: jax.Array = place(x, sharding)
    return placed


def parts_of(sharding: NamedSharding, entry: Any) -> int:
    """The number of parts into which an entry of a sharding's spec splits a dimension."""
    return math.prod(sharding.mesh.shape[axis] for axis in _axes(entry))


def whole_along(x: jax.Array, dim: int) -> jax.Array:
    """x, resharded if explicit mesh axes split this dimension, so that none does."""
    sharding = explicit_sharding(x)
    if sharding is None or sharding.spec[dim] is None:
        return x
    entries = [None if i == dim else entry for i, entry in enumerate(sharding.spec)]
    whole: jax.Array = jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*entries)))
    return whole


def whole_beside_manual(operands: dict[Any, jax.Array], names: Sequence[Any]) -> dict[Any, jax.Array]:
    """The operands, of which in a partly manual region those of these names are gathered over the automatic axes that
    split their first dimensions.

    XLA's partitioner aborts where an array that is split over one of several such axes is read or written by indices
    (jaxlib 0.12.0).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or mesh.are_all_axes_manual:
        return operands

    def whole(x: jax.Array) -> jax.Array:
        spec = PartitionSpec(None, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
        gathered: jax.Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return gathered

    return operands | {name: whole(operands[name]) for name in names if name in operands}


def split_alike(x: jax.Array, dim: int, other: jax.Array) -> jax.Array:
    """x, resharded where explicit mesh axes split its dimension `dim` in other ways than the first one of `other`:
    jax.vmap does not map over both then."""
    like = explicit_sharding(other)
    if like is None or like.spec[0] is None:
        return whole_along(x, dim)
    axes, have = _axes(like.spec[0]), explicit_sharding(x)
    entries = [()] * x.ndim if have is None else [_axes(entry) for entry in have.spec]
    if entries[dim] == axes:
        return x
    entries = [tuple(axis for axis in entry if axis not in axes) for entry in entries]
    entries[dim] = axes
    spec = PartitionSpec(*(entry or None for entry in entries))
    place: Any = like if isinstance(other, jax.core.Tracer) else other.sharding
    moved: jax.Array = jax.sharding.reshard(x, NamedSharding(place.mesh, spec))
    return moved


def explicit_parts(x: jax.Array) -> list[int]:
    """The number of parts into which explicit mesh axes split each dimension of x."""
    sharding = jax.typeof(x).sharding
    return [parts_of(sharding, entry) for entry in sharding.spec]


def reshaped(x: jax.Array, shape: tuple[Any, ...], kept: int) -> jax.Array:
    """x.reshape(shape). Explicit mesh axes split the first `kept` dimensions as before, and no others."""
    sharding = explicit_sharding(x)
    if sharding is None or shape == x.shape:
        return x.reshape(shape)
    spec = PartitionSpec(*sharding.spec[:kept], *[None] * (len(shape) - kept))
    return x.reshape(shape, out_sharding=sharding.update(spec=spec))


def with_dim_split(x: jax.Array, dim: int, sizes: Sequence[int]) -> jax.Array:
    """x with a dimension split into several. JAX splits none whose first part an explicit axis does not divide, so that
    such a dimension is gathered first."""
    if next((size for size in sizes if size > 1), 1) % explicit_parts(x)[dim]:
        x = whole_along(x, dim)
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def with_dims_merged(x: jax.Array, first: int, count: int) -> jax.Array:
    """x with `count` dimensions merged into one. JAX merges none that explicit axes split beside a whole one before
    it, so that all but the first are gathered first."""
    dims = range(first, first + count)
    for dim in [dim for dim in dims if x.shape[dim] > 1][1:]:
        x = whole_along(x, dim)
    merged = math.prod(x.shape[dim] for dim in dims)
    return x.reshape(*x.shape[:first], merged, *x.shape[first + count :])


def in_automatic_axes(run: Callable[[Any], Any], operands: Any, shardings: Any) -> Any:
    """run(operands) with automatic instead of explicit mesh axes inside; `shardings` are those of the results' types,
    or a function that makes them from the results' shapes.

    Under explicit axes JAX refuses gathers, scatters and padding whose result it does not know how to shard.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands)]
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return run(operands)
    if callable(shardings):
        types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
        shardings = shardings(jax.eval_shape(run, types))
    whole = NamedSharding(mesh, PartitionSpec())  # for results whose type has no sharding
    on_mesh = jax.tree.map(lambda sharding: whole if sharding.mesh.empty else sharding, shardings)
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind is AxisType.Explicit)
    concrete = [x for x in jax.tree.leaves(operands) if not isinstance(x, jax.core.Tracer)]
    real = next((x.sharding.mesh for x in concrete if not jax.typeof(x).sharding.mesh.empty), None)
    if real is None:
        traced = jax.sharding.auto_axes(run, axes=axes, out_sharding=on_mesh)
        # Beside manual axes JAX cannot keep intermediate results for a gradient if their axes are automatic.
        return (jax.checkpoint(traced) if AxisType.Manual in mesh.axis_types else traced)(operands)

    def placed(x: Any) -> Any:
        """An array of one device, copied to the mesh of the others, as jit does and reshard does not."""
        alone = not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, SingleDeviceSharding)
        return jax.device_put(x, NamedSharding(real, PartitionSpec())) if alone else x

    # Results may depend on no array of the mesh.
    inside = jax.sharding.auto_axes(lambda x: jax.tree.map(placed, run(x)), axes=axes, out_sharding=on_mesh)
    return inside(jax.tree.map(placed, operands))


@dataclass(frozen=True)
class Region:
    """A partially manual region of a program: its whole mesh, and the axes over which XLA partitions inside it."""

    mesh: Mesh
    free: AbstractMesh

    @property
    def has_order(self) -> bool:
        """Whether there are several free axes, so that the devices may be numbered along one or another first."""
        return len([size for size in self.free.axis_sizes if size > 1]) > 1


def partly_manual_region(ctx: mlir.LoweringRuleContext) -> Region | None:
    """The region being lowered; None where XLA has no axis to partition over, or where no mesh can be made."""
    context: Any = ctx.module_context.axis_context
    mesh, manual = context.mesh, context.manual_axes
    free = {name: size for name, size in mesh.shape.items() if name not in manual}
    if all(size == 1 for size in free.values()):
        return None
    if not isinstance(mesh, Mesh):  # a nested shard_map forgets its devices; here only their number matters
        devices = jax.devices()[: mesh.size]
        if len(devices) < mesh.size:
            return None
        mesh = Mesh(np.array(devices).reshape(mesh.axis_sizes), mesh.axis_names)
    return Region(mesh, AbstractMesh(tuple(free.values()), tuple(free)))


def marker(ctx: mlir.LoweringRuleContext, region: Region) -> tuple[Any, Any]:
    """Zeros with a dimension for each free axis, split over it, and their type."""
    free, mesh = region.free, region.mesh
    kinds = [AxisType.Explicit if name in free.shape else AxisType.Manual for name in mesh.axis_names]
    typed = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=tuple(kinds))
    aval = jax.core.ShapedArray(free.axis_sizes, np.dtype("int8"))
    split = aval.update(sharding=NamedSharding(typed, PartitionSpec(*free.axis_names)))
    lower = mlir.lower_fun(lambda: [jax.numpy.zeros(aval.shape, aval.dtype)], multiple_results=True)
    (zeros,) = lower(ctx.replace(avals_in=[], avals_out=[aval]))
    return _private.lower_with_sharding_in_types(ctx, zeros, split), aval


def as_numbered(free: AbstractMesh, marked: Any) -> AbstractMesh:
    """The free axes of a region in the order in which XLA numbers its devices, by the sharding of the marker; no axes
    if the numbers have no such order.

    That order may differ from the mesh's: XLA numbers them by the tiles of an operand, so that collectives along an
    axis of the mesh would connect other devices.
    """
    tiles = marked._to_xla_hlo_sharding(len(free.axis_sizes))
    numbers = np.asarray(tiles.tile_assignment_devices())
    if tuple(tiles.tile_assignment_dimensions()) != free.axis_sizes:
        return AbstractMesh((), ())
    numbers = numbers.reshape(free.axis_sizes)
    strides = [int(numbers.take(min(1, size - 1), axis).min()) for axis, size in enumerate(free.axis_sizes)]
    order = np.argsort(strides, kind="stable")[::-1]
    if not np.array_equal(numbers.transpose(order).ravel(), np.arange(free.size)):
        return AbstractMesh((), ())
    return AbstractMesh(*(tuple(x[axis] for axis in order) for x in (free.axis_sizes, free.axis_names)))


def within(ctx: mlir.LoweringRuleContext, region: Region) -> mlir.LoweringRuleContext:
    """The context with the region's mesh of concrete devices."""
    context: Any = ctx.module_context.axis_context
    module = ctx.module_context.replace(axis_context=replace(context, mesh=region.mesh))
    moved: mlir.LoweringRuleContext = ctx.replace(module_context=module)
    return moved


def dimension_axes(x: Any, mesh: Any) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension of an array that XLA shows its partitioner.

    No axes at all where no PartitionSpec describes the sharding, since Shardy may split a dimension over a part of an
    axis.
    """
    whole: list[tuple[str, ...]] = [()] * len(x.shape)
    if mesh.empty:
        return whole
    try:
        (spec,) = _private.parse_flatten_op_sharding(x.sharding._to_xla_hlo_sharding(len(x.shape)), mesh)
    except Exception:  # the errors of a parser that JAX keeps to itself
        return whole
    entries = [_axes(entry) for entry in spec]
    return entries + whole[len(entries) :]


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


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


class _Kept:
    """Keeps an object alive as long as a compiled program. The object is not pickled: serialised programs need none."""

    def __init__(self, held: Any = None):
        self._held = held

    def __reduce__(self) -> Any:
        return _Kept, ()


def lower_partitioned(ctx: mlir.LoweringRuleContext, run: Any, values: Any, identity: str) -> Any:
    """Lowers a jitted function that is one custom partitioning. `identity` names everything that it depends on,
    except the mesh and the platforms.

    `jax.experimental.serialize_executable` pickles every object that a compiled program keeps alive, but the objects
    that JAX keeps alive for XLA's partitioner cannot be pickled.
    """
    kept = ctx.module_context.keepalives
    count = len(kept)
    with jax.disable_jit(False):  # without a call of its own, the partitioner could not be found again
        results = mlir.lower_fun(run, multiple_results=True)(ctx, *values)
    kept[count:] = [_Kept(x) for x in (*kept[count:], *_with_stable_keys(ctx, results, identity))]
    return results


def _with_stable_keys(ctx: mlir.LoweringRuleContext, results: Any, identity: str) -> list[Any]:
    """Renames the partitioner of the call that made these results, so that its name is the same in every process.

    JAX names it by an address, which becomes part of the compilation cache's key, so no later process would find the
    program. Equal names mean equal partitioners here, so all programs of a process share the first one. Returns the
    partitioners, which the programs must keep alive because JAX's table does not.
    """
    shared = []
    call = results[0].owner
    while "callee" not in call.attributes:  # jax 0.12 constrains a call's results under explicit axes
        call = call.operands[0].owner
    function = ctx.module_context.symbol_table[call.attributes["callee"].value]
    for op in function.regions[0].blocks[0].operations:
        if op.operation.name != "stablehlo.custom_call":
            continue
        table, address = _private.sharding_callbacks, op.attributes["backend_config"].value
        callbacks = table[address.encode()]
        mesh, platforms = callbacks.mesh, tuple(ctx.module_context.platforms)
        known = repr((identity, tuple(mesh.shape.items()), tuple(map(str, mesh.axis_types)), platforms))
        name = f"jax_flash_{hashlib.sha256(known.encode()).hexdigest()}"
        shared.append(table.setdefault(name.encode(), callbacks))
        op.attributes["backend_config"] = ir.StringAttr.get(name)
    return shared


def with_declared_sharding(ctx: mlir.LoweringRuleContext, value: Any, aval: Any) -> Any:
    """value, constrained to the sharding in its type (explicit mesh axes)."""
    if AxisType.Explicit not in aval.sharding.mesh.axis_types:
        return value
    return _private.lower_with_sharding_in_types(ctx, value, aval)
