"""A primitive in place of a derivative that the library does not have: it raises if used and is free if dropped.

A rule that raises during tracing would also raise where the derivative is dropped later, for example by
`stop_gradient` around a `jax.jvp` within a loss. So the rule binds this primitive instead. It is linear in its
tangents, its derivatives are of the same kind, and it raises when it is lowered or run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

SECOND = (
    "jax_flash: this program uses a second derivative of attention, and the custom calls have first ones only "
    '(in both modes); use implementation="xla" for higher derivatives, or jax.jit if this one is dropped later'
)
TRANSPOSE = (
    "jax_flash: attention has no jax.linear_transpose; use jax.vjp, whose pull-back is the transpose in value"
)
APPEND = (
    "append_kv: there is no derivative, in either mode; pass jax.lax.stop_gradient(x) for the pools, key and value, "
    "or differentiate attention over keys that are not in pages"
)

_missing = Primitive("jax_flash_no_derivative")
_missing.multiple_results = True


def tangents_of(results: Sequence[jax.Array], tangents: Sequence[Any], message: str) -> list[Any]:
    """Tangents for the results of a call whose operands have `tangents`."""
    moving = [t for t in tangents if is_moving(t)]
    return missing(moving, [jax.typeof(x).to_tangent_aval() for x in results], message)


def missing(moving: Sequence[Any], avals: Sequence[Any], message: str) -> list[Any]:
    """Arrays in place of what the library cannot derive from `moving`: of these types, and zeros if nothing moves."""
    if not moving:
        return [ad.Zero(x) for x in avals]
    found: list[Any] = _missing.bind(*moving, avals=tuple(avals), message=message)
    return found


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def without_derivative(x: jax.Array, message: str) -> jax.Array:
    """x, whose derivative raises `message` if it is used: for what plain JAX would differentiate."""
    return x


@without_derivative.defjvp
def _without_derivative_jvp(message: str, primals: Any, tangents: Any) -> Any:
    return primals[0], tangents_of(primals, tangents, message)[0]


def without_transpose(results: Sequence[jax.Array]) -> list[jax.Array]:
    """The results of attention in plain JAX, whose `jax.linear_transpose` raises: even in value they are not linear to
    JAX, since they depend on which elements are finite. Derivatives pass by this primitive."""
    found: list[jax.Array] = _results.bind(*results)
    return found


def zeros(results: Sequence[jax.Array]) -> list[ad.Zero]:
    """Symbolic zeros, the tangents of results that depend on no perturbed operand."""
    return [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]


def is_moving(tangent: Any) -> bool:
    """Whether a tangent is neither a symbolic zero nor the float0 of an integer."""
    return not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0


def _raise(*_: Any, message: str, **__: Any) -> Any:
    raise NotImplementedError(message)


def _jvp(primals: Any, tangents: Any, *, avals: Any, message: str) -> Any:
    results = _missing.bind(*primals, avals=avals, message=message)
    return results, tangents_of(results, tangents, message)


def _transpose(cotangents: Any, *operands: Any, avals: Any, message: str) -> list[Any]:
    """Cotangents for all operands, since it is linear in all; each depends on every cotangent given."""
    return missing([t for t in cotangents if is_moving(t)], [x.aval for x in operands], message)


def _batch(args: Sequence[Any], axes: Sequence[Any], *, avals: Any, message: str) -> Any:
    size = next(x.shape[axis] for x, axis in zip(args, axes) if axis is not None)
    sharding = [x.sharding.update(spec=jax.sharding.PartitionSpec(None, *x.sharding.spec)) for x in avals]
    wide = tuple(x.update(shape=(size, *x.shape), sharding=s) for x, s in zip(avals, sharding))
    return _missing.bind(*args, avals=wide, message=message), [0] * len(wide)


_results = Primitive("jax_flash_no_transpose")
_results.multiple_results = True
_results.def_impl(lambda *x: list(x))
_results.def_abstract_eval(lambda *x: list(x))
ad.primitive_jvps[_results] = lambda primals, tangents: (_results.bind(*primals), list(tangents))
ad.primitive_transposes[_results] = lambda *_: _raise(message=TRANSPOSE)
batching.primitive_batchers[_results] = lambda x, axes: (_results.bind(*x), axes)
mlir.register_lowering(_results, lambda _, *x: list(x))

_missing.def_impl(_raise)
_missing.def_abstract_eval(lambda *_, avals, message: list(avals))
ad.primitive_jvps[_missing] = _jvp
ad.primitive_transposes[_missing] = _transpose
batching.primitive_batchers[_missing] = _batch
mlir.register_lowering(_missing, _raise)
