"""Both modes of differentiation, as rules of the forward primitives and of their differential.

The forward's JVP rule binds its differential, an operation that is linear in the tangents. Forward mode runs it, by the
tangent pass; reverse mode transposes it, which runs the backward passes. There are no second derivatives: one that is
used raises when it is lowered, and one that is dropped costs nothing (no_derivative.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from . import _jax, derivatives, no_derivative, reference
from .batching import over_leading
from .operands import DIFFERENTIABLE, DIFFERENTIAL, DROPOUT_ROW, FORWARD, TANGENTS, is_float32
from .paged import gather
from .primitives import (
    LOCAL,
    PARTITIONED,
    PARTLY_MANUAL,
    RING,
    bind,
    declare,
    result_shapes,
    result_types,
)
from .sequence import passes
from .spec import AttentionSpec, operand_names, result_names

Operands = dict[str, jax.Array]
Results = tuple[jax.Array, ...]


def attend(spec: AttentionSpec, operands: Operands) -> Results:
    """out, lse and, where the spec asks for it, row_max of checked operands, by plain JAX or by the custom call."""
    if _jax.manual_axes()[0] and is_empty(operands):
        return without_elements(spec, operands)
    # Dropout's bits depend on the position in the larger sequence.
    if "position" in operands and "dropout" in operands:
        first = operands["position"].astype(jnp.uint32)
        operands = operands | {"dropout": operands["dropout"].at[DROPOUT_ROW:].add(first)}
    if spec.implementation == "xla":
        return tuple(no_derivative.without_transpose(_in_plain_jax(spec, operands)))
    return tuple(bind(FORWARD, spec, operands))


def _in_plain_jax(spec: AttentionSpec, operands: Operands) -> Sequence[jax.Array]:
    # JAX maps a custom_jvp whose result is a constant, as that of an empty product is, to a wrong shape (0.12).
    if is_empty(operands) and _jax.explicit_sharding(operands["query"]) is None:
        return without_elements(spec, operands)
    if _jax.manual_axes()[0]:
        operands = _jax.equally_varying(operands, spec.ring.axes if spec.ring else ())
    types = result_types(FORWARD, spec, {name: jax.typeof(x) for name, x in operands.items()})
    shardings = tuple(x.sharding for x in types)
    found: Results = _jax.in_automatic_axes(partial(_equations, spec), operands, shardings)
    return found


def _equations(spec: AttentionSpec, operands: Operands) -> Results:
    """The call's results in plain JAX, in a ring by the equations of its parts."""
    if spec.paged:
        return gather.attention(spec, operands)
    if spec.packed:
        operands = _jax.whole_beside_manual(operands, gather.BY_SEQUENCE)
    if spec.ring is not None:
        return tuple(passes.run(FORWARD, spec, operands, lambda _, *part: reference.attention(*part)))
    found: Results = reference.attention(spec, operands)
    return found


def is_empty(operands: Operands) -> bool:
    return any(_jax.same_dim(size, 0) for size in operands["query"].shape)


def without_elements(spec: AttentionSpec, operands: Operands) -> Results:
    """Results without elements: XLA does not compile the gradient of such a shard, or its maximum (jaxlib 0.10 to
    0.12)."""
    query = operands["query"]
    shapes = result_shapes(FORWARD, spec, {name: x.shape for name, x in operands.items()})
    made = {name: jnp.zeros(shape, query.dtype) for name, shape in zip(result_names(FORWARD, spec), shapes)}
    varying = _jax.equally_varying(operands | made, spec.ring.axes if spec.ring else ())
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return tuple(varying[name].astype(wide if is_float32(name) else query.dtype) for name in made)


def _forward_jvp(primitive: Primitive, primals: Any, tangents: Any, *, spec: AttentionSpec) -> Any:
    names = operand_names(FORWARD, spec)
    operands = dict(zip(names, primals))
    results = primitive.bind(*primals, spec=spec)
    moving = {
        "t" + name: _jax.sharded_like(tangent, operands[name])
        for name, tangent in zip(names, tangents)
        if no_derivative.is_moving(tangent) and _has_derivative(spec, name, operands[name])
    }
    if not moving:
        return results, no_derivative.zeros(results)
    out, lse, *others = results
    out, lse = checkpoint_name(out, "flash_out"), checkpoint_name(lse, "flash_lse")
    differential = _bind_differential(spec, operands | {"out": out, "lse": lse}, moving)
    return [out, lse, *others], [*differential, *no_derivative.zeros(others)]


def _has_derivative(spec: AttentionSpec, name: str, x: jax.Array) -> bool:
    """Whether an operand's tangent is used. Float8 pools are constants, and a V that is a part of K moves with it."""
    return (
        name in DIFFERENTIABLE and x.dtype not in gather.FLOAT8 and not (spec.shared_kv and name == "value")
    )


def _bind_differential(spec: AttentionSpec, operands: Operands, tangents: Operands) -> list[jax.Array]:
    """(tout, tlse) for the tangents given, all others being zero; `operands` has the forward's results as well."""
    names = (*_without_tangents(spec).operands, *tangents)
    return bind(DIFFERENTIAL, replace(spec, operands=names, row_max=False), operands | tangents)


def _without_tangents(spec: AttentionSpec) -> AttentionSpec:
    """The forward's spec, from its own or from that of a differential."""
    return replace(spec, operands=tuple(name for name in spec.operands if name not in TANGENTS))


def _differential_jvp(primitive: Primitive, primals: Any, tangents: Any, *, spec: AttentionSpec) -> Any:
    """The JVP rule of a differential, which is linear in its tangents; others would take a second derivative."""
    names = operand_names(DIFFERENTIAL, spec)
    results = primitive.bind(*primals, spec=spec)
    moving = {name: x for name, x in zip(names, tangents) if no_derivative.is_moving(x)}
    linear = {name: x for name, x in moving.items() if name in TANGENTS}
    first: Sequence[Any] = no_derivative.zeros(results)
    if linear:
        first = _bind_differential(spec, dict(zip(names, primals)), linear)
    others = [x for name, x in moving.items() if name in (*DIFFERENTIABLE, "out", "lse")]
    second = no_derivative.tangents_of(results, others, no_derivative.SECOND)
    return results, [ad.add_tangents(x, y) for x, y in zip(first, second)]


def _transpose_differential(cotangents: Any, *arrays: Any, spec: AttentionSpec) -> list[Any]:
    """The cotangents of the differential's tangents, which are the gradients of the call."""
    names = operand_names(DIFFERENTIAL, spec)
    linear = {name: x.aval for name, x in zip(names, arrays) if ad.is_undefined_primal(x)}
    given = {name: x for name, x in zip(names, arrays) if name not in linear and name not in TANGENTS}
    dout, dlse = (
        None if isinstance(x, ad.Zero) else _jax.sharded_like(x, given[name])
        for x, name in zip(cotangents, ("out", "lse"))
    )
    if dout is None and dlse is None:
        return [ad.Zero(linear[name]) if name in linear else None for name in names]
    operands = given | {n: x for n, x in (("dout", dout), ("dlse", dlse)) if x is not None}
    wanted = tuple(name.removeprefix("t") for name in linear)
    run = partial(derivatives.gradients, _without_tangents(spec), wanted)

    def gradients(operands: Operands) -> Operands:
        found = over_leading(run, spec, operands)
        return {"t" + name: derivatives.sum_where_one(x, linear["t" + name]) for name, x in found.items()}

    shardings = {name: x.sharding for name, x in linear.items()}
    found = _jax.in_automatic_axes(gradients, operands, shardings) if spec.paged else gradients(operands)
    return [found.get(name) for name in names]


def _lower_differential(ctx: mlir.LoweringRuleContext, *values: Any, spec: AttentionSpec) -> Any:
    names = operand_names(DIFFERENTIAL, spec)
    run = partial(derivatives.tangents, _without_tangents(spec))

    def differential(*arrays: jax.Array) -> list[jax.Array]:
        operands = dict(zip(names, arrays))
        if not spec.paged:
            return list(over_leading(run, spec, operands))
        shardings = [x.sharding for x in ctx.avals_out]
        results = _jax.in_automatic_axes(lambda x: list(over_leading(run, spec, x)), operands, shardings)
        return list(results)

    return mlir.lower_fun(differential, multiple_results=True)(ctx, *values)


def _define(primitives: dict[Any, Primitive], name: str) -> Primitive:
    """Defines the differential of one kind of primitives, and the rules of both."""
    primitive = primitives[DIFFERENTIAL] = declare(name, DIFFERENTIAL)
    ad.primitive_jvps[primitives[FORWARD]] = partial(_forward_jvp, primitives[FORWARD])
    ad.primitive_jvps[primitive] = partial(_differential_jvp, primitive)
    ad.primitive_transposes[primitive] = _transpose_differential
    mlir.register_lowering(primitive, _lower_differential)
    return primitive


_define(LOCAL, "jax_flash_differential_local")
_define(PARTLY_MANUAL, "jax_flash_differential_partly_manual")
_define(RING, "jax_flash_differential_ring")
_jax.require_devices_during_lowering(_define(PARTITIONED, "jax_flash_differential"))
