"""One primitive per pass: abstract evaluation and lowering to the custom call.

Each pass has four primitives with the same rules. PARTITIONED is bound in ordinary code and carries the sharding rules
(sharding.py). LOCAL is the custom call itself, bound in each shard and where all mesh axes are manual. PARTLY_MANUAL is
bound in a shard_map that is manual over some axes, and is partitioned over the others. RING is the pass over a sequence
that is split over manual axes; it runs one of the others on each part.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters import ad, batching, mlir, xla

from . import _jax, delta, no_derivative
from ._version import __version__
from .backends import cuda_library, local_devices, require_cpu, require_cuda
from .batching import batch, leading, named_sizes, over_leading
from .largest import of_cuda
from .operands import BACKWARD, DELTA, FORWARD, PASSES, TANGENT, Pass, is_float32, like, whole_chunks
from .padding import loads_rows, value_dim, with_padded_bias
from .sequence import passes
from .sharding import partitioned
from .spec import AttentionSpec, Spec, operand_names, result_names
from .workspace import workspace_bound


def bind(pass_: Pass, spec: Spec, operands: dict[str, jax.Array]) -> list[jax.Array]:
    """Run one pass on named operands."""
    if "jax.experimental.roofline" in sys.modules:
        _register_roofline()
    ring = spec.ring
    named = {name: operands[name] for name in operand_names(pass_, spec)}
    used = _jax.equally_varying(named, ring.axes if ring else ())
    any_manual, all_manual = _jax.manual_axes()
    primitives = RING if ring else LOCAL if all_manual else PARTLY_MANUAL if any_manual else PARTITIONED
    results: list[jax.Array] = primitives[pass_].bind(*used.values(), spec=spec)
    return results


@cache
def _register_roofline() -> None:
    from . import roofline

    roofline.register((pass_, primitive) for kind in KINDS for pass_, primitive in kind.items())


# --- abstract evaluation -------------------------------------------------------------------------------------------


def result_shapes(pass_: Pass, spec: Spec, shapes: dict[str, tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Shapes of the results from those of the operands, by name."""
    dims = spec.dims
    count = leading(spec, pass_.guide, len(shapes[pass_.guide]))
    lead = tuple(_jax.full_dim(shape[axis] for shape in shapes.values()) for axis in range(count))
    sizes = named_sizes(spec, {name: shapes[name] for name in pass_.operands})

    def shape(result: str) -> tuple[Any, ...]:
        if result == "dbias":
            return shapes["bias"][count:]
        # Scales that are overwritten may not be broadcast.
        return tuple(sizes[dim.removesuffix("*")] for dim in dims[result])

    return [lead + shape(result) for result in result_names(pass_, spec)]


def result_types(pass_: Pass, spec: Spec, named: dict[str, Any]) -> list[Any]:
    """The types of a pass's results from those of its operands, by name."""
    shapes = result_shapes(pass_, spec, {name: aval.shape for name, aval in named.items()})
    results = []
    for name, shape in zip(result_names(pass_, spec), shapes):
        source = named[like(name)]
        dtype = np.dtype("float32") if is_float32(name) else source.dtype
        sharding = source.sharding
        if not sharding.mesh.empty:
            sharding = sharding.update(spec=_result_spec(name, spec, named))
        results.append(source.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding))
    return results


def _result_spec(result: str, spec: Spec, named: dict[str, Any]) -> Any:
    """Explicit sharding of a result: that of the operand it is like, dimension by dimension."""
    source = like(result)
    count = leading(spec, source, named[source].ndim)
    entries = dict(zip(spec.dims[source], named[source].sharding.spec[count:]))
    lead = tuple(
        next((x.sharding.spec[axis] for x in named.values() if not _jax.same_dim(x.shape[axis], 1)), None)
        for axis in range(count)
    )
    return jax.sharding.PartitionSpec(*lead, *(entries.get(dim) for dim in spec.dims[result]))


# --- lowering ------------------------------------------------------------------------------------------------------


def _lower_local(ctx: mlir.LoweringRuleContext, *values: Any, pass_: Pass, spec: Spec, platform: str) -> Any:
    """The custom call of one platform."""
    if spec.implementation not in (None, platform):
        raise NotImplementedError(
            f'jax_flash: implementation="{spec.implementation}" cannot run on platform "{platform}"; '
            f'use implementation="{platform}", "xla", or None'
        )
    if pass_ is DELTA:
        return delta.lower(ctx, *values, platform=platform)
    names = operand_names(pass_, spec)
    avals: list[Any] = list(ctx.avals_in)
    shapes = {name: aval.shape for name, aval in zip(names, avals)}
    head_dims = shapes[pass_.guide][-1], value_dim(spec, shapes["value"][-1])
    if platform == "cuda" and pass_ is not FORWARD and isinstance(spec, AttentionSpec) and spec.shared_kv:
        return mlir.lower_fun(partial(_with_values_apart, pass_, spec), multiple_results=True)(ctx, *values)
    if platform == "cuda" and not pass_.in_place and not loads_rows(spec, shapes, head_dims):
        return mlir.lower_fun(partial(_with_whole_chunkss, pass_, spec), multiple_results=True)(ctx, *values)
    if platform == "cpu":
        require_cpu(f"jax_flash {pass_.name}")
    else:
        _require_cuda_kernel(pass_, spec, avals[0].dtype.name, *head_dims)
    avals_out: list[Any] = list(ctx.avals_out)
    if platform == "cuda" and "bias" in names and pass_ is not TANGENT:
        ctx, values = with_padded_bias(ctx, names.index("bias"), values)
    if platform == "cuda" and isinstance(spec, AttentionSpec):
        size = workspace_bound(pass_.name, spec, shapes)
        whole = avals_out[0].sharding.update(spec=jax.sharding.PartitionSpec(None))
        avals_out.append(avals_out[0].update(shape=(size,), dtype=np.dtype("uint8"), sharding=whole))
    rule = jax.ffi.ffi_lowering(
        f"jax_flash_{pass_.name}", operand_output_aliases={i: i for i in range(pass_.in_place)}
    )
    computed = rule(ctx.replace(avals_out=avals_out), *values, spec=spec.ffi_attributes())
    names = result_names(pass_, spec)
    results = computed[: len(names)]
    if platform != "cuda" or pass_ is not FORWARD:
        return results
    results = _computed_once(results)
    return _with_float_maxima(ctx, names, results) if "row_max" in names else results


def _with_float_maxima(
    ctx: mlir.LoweringRuleContext, names: Sequence[str], results: Sequence[Any]
) -> Sequence[Any]:
    """The results, row_max as floats."""
    lse, row_max = names.index("lse"), names.index("row_max")
    avals: list[Any] = [ctx.avals_out[lse], ctx.avals_out[row_max]]
    floats = mlir.lower_fun(of_cuda, multiple_results=False)
    within = ctx.replace(primitive=None, avals_in=avals, avals_out=avals[1:])
    return [*results[:row_max], *floats(within, results[lse], results[row_max]), *results[row_max + 1 :]]


def _computed_once(results: Sequence[Any]) -> Sequence[Any]:
    """The results of a custom call, behind a barrier, so that XLA does not run the call twice.

    A scan over layers both uses `out` and `lse` and stores them in a slice of a larger array, if a remat policy saves
    them. XLA's dynamic-slice fusion for GPUs would make a second call that writes to the slice (seen in jaxlib 0.11.2);
    it does not look past a barrier.
    """
    barrier: Sequence[Any] = stablehlo.OptimizationBarrierOp(results).results
    return barrier


def _require_cuda_kernel(pass_: Pass, spec: Spec, dtype: str, d: int, dv: int) -> None:
    operation = f"jax_flash {pass_.name}"
    require_cuda(operation)
    library = cuda_library()
    if library is None or not local_devices("cuda") or pass_.in_place:  # append_kv has one kernel for all
        return
    loader = "paged" if spec.paged else "dense"
    latent = spec.value_dim > 0
    rows = [
        row
        for row in library.kernels
        if loader in row.loaders and (row.pass_ == pass_.name or (latent and row.latent))
    ]
    if not any(dtype in row.dtypes and row.d >= d and row.dv >= dv for row in rows):
        built = sorted({(row.d, row.dv, name) for row in rows for name in row.dtypes})
        raise NotImplementedError(
            f"{operation}: no CUDA kernel was built for {dtype} with head dims ({d}, {dv}) over {loader} keys; "
            f'built are {built}; implementation="xla" runs here'
        )


def _with_values_apart(pass_: Pass, spec: AttentionSpec, *arrays: jax.Array) -> list[jax.Array]:
    """Passes V as a separate operand, because CUDA's derivative kernels need that; adds V's rounded gradient to K's."""
    results = LOCAL[pass_].bind(*arrays, spec=replace(spec, value_dim=0))
    if pass_ is not BACKWARD:
        return list(results)
    dquery, *parts = results
    return [dquery, sum(x.astype(jnp.float32) for x in parts).astype(arrays[1].dtype)]


def _with_whole_chunkss(pass_: Pass, spec: Spec, *arrays: jax.Array) -> list[jax.Array]:
    """Runs a pass on copies of the operands that are padded to head dims which CUDA loads."""
    named = dict(zip(operand_names(pass_, spec), arrays))
    sizes = {"d": named["query"].shape[-1], "dv": value_dim(spec, named["value"].shape[-1])}
    if isinstance(spec, AttentionSpec) and spec.value_dim:
        pool, end = named["key"], spec.value_start + spec.value_dim
        named["key"] = named["value"] = pool[..., : sizes["d"]]
        if spec.value_start or end > sizes["d"]:  # no values that begin with the keys
            named["value"] = pool[..., spec.value_start : end]
            spec = replace(spec, value_dim=0, value_start=0)
        else:
            spec = replace(spec, value_dim=whole_chunks(spec.value_dim))
    dims = spec.dims

    def pad(name: str, x: jax.Array) -> jax.Array:
        columns = dims[name][-1] in ("d", "dv", "pool_columns")
        width = whole_chunks(x.shape[-1]) - x.shape[-1] if columns else 0
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width)]) if width else x

    padded = {name: pad(name, x) for name, x in named.items()}
    results = LOCAL[pass_].bind(*padded.values(), spec=spec)
    return [
        x[..., : sizes.get(dims[name][-1], x.shape[-1])]
        for name, x in zip(result_names(pass_, spec), results)
    ]


def _lower_nowhere(ctx: mlir.LoweringRuleContext, *values: Any, pass_: Pass, spec: Spec) -> Any:
    platforms = ", ".join(x for x in ctx.module_context.platforms if x not in ("cpu", "cuda"))
    raise NotImplementedError(
        f'jax_flash has no custom call for platform "{platforms}"; use implementation="xla", plain JAX'
    )


def _lower_whole(ctx: mlir.LoweringRuleContext, values: Any, pass_: Pass, spec: Spec) -> Any:
    """The custom call; JAX chooses among the local primitive's where a program is lowered for several platforms."""
    platform, *others = ctx.module_context.platforms
    if platform in ("cpu", "cuda") and not others:
        return _lower_local(ctx, *values, pass_=pass_, spec=spec, platform=platform)
    return mlir.lower_fun(partial(LOCAL[pass_].bind, spec=spec), multiple_results=True)(ctx, *values)


def _lower_partitioned(ctx: mlir.LoweringRuleContext, *values: Any, pass_: Pass, spec: Spec) -> Any:
    """One device: the custom call. Several: the same, partitioned by sharding.py."""
    if _jax.device_count(ctx) == 1:
        return _lower_whole(ctx, values, pass_, spec)
    if _jax.exporting(ctx):
        raise NotImplementedError(
            "jax_flash: a program for several devices can be exported only with attention inside jax.shard_map; "
            "elsewhere its partitioning lives in this process"
        )
    if not _jax.uses_shardy():
        raise NotImplementedError(
            "jax_flash: partitioning over several devices needs JAX's default, jax_use_shardy_partitioner=True; "
            "without it, call attention inside jax.shard_map"
        )
    return _partition(ctx, values, pass_, spec, None)


def _lower_partly_manual(ctx: mlir.LoweringRuleContext, *values: Any, pass_: Pass, spec: Spec) -> Any:
    """The pass, partitioned over the axes that are not manual. If that is impossible, the custom call, for which XLA
    gathers the operands."""
    here = not _jax.exporting(ctx) and _jax.uses_shardy()
    region = _jax.partly_manual_region(ctx) if here else None
    if region is None:
        return _lower_whole(ctx, values, pass_, spec)
    typed = [_jax.with_declared_sharding(ctx, x, aval) for x, aval in zip(values, ctx.avals_in)]
    return _partition(_jax.within(ctx, region), typed, pass_, spec, region)


def _lower_ring(ctx: mlir.LoweringRuleContext, *values: Any, pass_: Pass, spec: AttentionSpec) -> Any:
    """The pass over a split sequence: a loop over its parts, with automatic instead of explicit axes, because JAX joins
    and maps over arrays only if their types are split alike."""
    names = operand_names(pass_, spec)
    shardings = [x.sharding for x in ctx.avals_out]

    def ring(operands: dict[str, jax.Array]) -> list[jax.Array]:
        return list(over_leading(lambda x: passes.run(pass_, spec, x, bind), spec, operands))

    def automatic(*arrays: jax.Array) -> list[jax.Array]:
        return list(_jax.in_automatic_axes(ring, dict(zip(names, arrays)), shardings))

    return mlir.lower_fun(automatic, multiple_results=True)(ctx, *values)


@cache
def _kernels_digest() -> str:
    """The CUDA library's kernels, by which a shard's workspace is sized."""
    library = cuda_library()
    return hashlib.sha256(repr(library and library.kernels).encode()).hexdigest()


def _partition(ctx: mlir.LoweringRuleContext, values: Any, pass_: Pass, spec: Spec, region: Any) -> Any:
    run = partitioned(pass_, spec, operand_names(pass_, spec), LOCAL[pass_].bind, region)
    if region and region.has_order:
        marker, aval = _jax.marker(ctx, region)
        values, ctx = [*values, marker], ctx.replace(avals_in=[*ctx.avals_in, aval])
    axes = region and (tuple(region.mesh.shape.items()), tuple(region.free.shape.items()))
    identity = repr((__version__, _kernels_digest(), pass_.name, spec, axes))
    results = _jax.lower_partitioned(ctx, run, values, identity)
    return [_jax.with_declared_sharding(ctx, x, aval) for x, aval in zip(results, ctx.avals_out)]


# Operands in which the passes of reverse mode are linear.
_COTANGENTS = ("dout", "delta")


def _jvp(primitive: Primitive, pass_: Pass, primals: Any, tangents: Any, *, spec: Spec) -> Any:
    """A pass is its own derivative with respect to the cotangents. It has no other one unless told."""
    results, names = primitive.bind(*primals, spec=spec), operand_names(pass_, spec)
    moving = {name: x for name, x in zip(names, tangents) if no_derivative.is_moving(x)}
    if not moving or not moving.keys() <= {*_COTANGENTS}:
        message = no_derivative.APPEND if pass_.in_place else no_derivative.SECOND
        return results, no_derivative.tangents_of(results, tangents, message)
    operands = dict(zip(names, primals))
    for name in operands.keys() & {*_COTANGENTS}:
        x = moving.get(name, jnp.zeros_like(operands[name]))
        operands[name] = _jax.sharded_like(x, operands[name])
    return results, primitive.bind(*operands.values(), spec=spec)


def _transpose(pass_: Pass, cotangents: Any, *operands: Any, spec: Spec) -> list[Any]:
    """The rule of a pass as the derivative with respect to its cotangents, or of attention as a linear function of
    value: there is none."""
    linear = {
        name: x.aval for name, x in zip(operand_names(pass_, spec), operands) if ad.is_undefined_primal(x)
    }
    moving = [x for x in cotangents if no_derivative.is_moving(x)]
    message = no_derivative.SECOND if {*_COTANGENTS} & {*linear} else no_derivative.TRANSPOSE
    found = iter(no_derivative.missing(moving, [*linear.values()], message))
    return [next(found) if ad.is_undefined_primal(x) else None for x in operands]


def declare(name: str, pass_: Pass) -> Primitive:
    """A primitive with the rules that all passes share, without lowering."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(
        lambda *types, spec: result_types(pass_, spec, dict(zip(operand_names(pass_, spec), types)))
    )
    batching.primitive_batchers[primitive] = partial(batch, primitive, pass_.in_full)
    ad.primitive_jvps[primitive] = partial(_jvp, primitive, pass_)
    ad.primitive_transposes[primitive] = partial(_transpose, pass_)
    return primitive


def _local(pass_: Pass) -> Primitive:
    primitive = declare(f"jax_flash_{pass_.name}_local", pass_)
    mlir.register_lowering(primitive, partial(_lower_nowhere, pass_=pass_))
    for platform in ("cpu", "cuda"):
        mlir.register_lowering(
            primitive, partial(_lower_local, pass_=pass_, platform=platform), platform=platform
        )
    return primitive


def _lowered_by(lower: Callable[..., Any], suffix: str, pass_: Pass) -> Primitive:
    primitive = declare(f"jax_flash_{pass_.name}{suffix}", pass_)
    mlir.register_lowering(primitive, partial(lower, pass_=pass_))
    return primitive


def _partitioned(pass_: Pass) -> Primitive:
    primitive = _lowered_by(_lower_partitioned, "", pass_)
    _jax.require_devices_during_lowering(primitive)
    return primitive


LOCAL = {pass_: _local(pass_) for pass_ in (*PASSES, DELTA)}
PARTITIONED = {pass_: _partitioned(pass_) for pass_ in (*PASSES, DELTA)}
PARTLY_MANUAL = {
    pass_: _lowered_by(_lower_partly_manual, "_partly_manual", pass_) for pass_ in (*PASSES, DELTA)
}
RING = {pass_: _lowered_by(_lower_ring, "_ring", pass_) for pass_ in PASSES if not pass_.in_place}
KINDS = (LOCAL, PARTITIONED, PARTLY_MANUAL, RING)
