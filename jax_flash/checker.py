"""Checks of single arguments: arrays, shapes, index arrays, numbers and flags, each with its message."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from ._jax import is_symbolic, same_dim
from .operands import MAX_HEAD_DIM
from .spec import PAGE_LAYOUTS

DTYPES = ("float16", "bfloat16", "float32")
INT32_MAX = 2**31 - 1
MARK_STATIC = "close over it, or mark it static in jax.jit"
MAX_NUMBER = 2e38  # larger numbers could overflow when the kernels multiply by log2(e) in float32


class Checker:
    """Checks of single arguments; every message begins with the name of the public function."""

    def __init__(self, op: str):
        self.op = op

    def fail(self, message: str, error: type[Exception] = ValueError) -> Exception:
        return error(f"{self.op}: {message}")

    def array(self, name: str, x: Any) -> jax.Array:
        self._require_values(name, x)
        try:
            return jnp.asarray(x)
        except (TypeError, ValueError):  # the latter of lists that differ in length or hold None
            raise self._not_of_jax(name, x) from None

    def bias(self, name: str, x: Any, dtype: Any) -> jax.Array:
        """A bias in a dtype that the kernels support; other libraries add any real number type to float32 scores."""
        bias = self.array(name, x)
        if jnp.iscomplexobj(bias):
            raise self.fail(f"{name} has dtype {bias.dtype}, allowed are real numbers; take .real", TypeError)
        return bias if bias.dtype in (jnp.float16, jnp.bfloat16, dtype) else bias.astype(jnp.float32)

    def _require_values(self, name: str, x: Any) -> None:
        """Refuses what is no array yet. NumPy and JAX would make an array of an object of it."""
        if x is None or isinstance(x, (str, bytes, jax.ShapeDtypeStruct)):
            hint = "; jax.eval_shape runs a function on shapes" if isinstance(x, jax.ShapeDtypeStruct) else ""
            raise self.fail(f"{name} must be an array, got {x!r}{hint}", TypeError)
        if isinstance(x, jax.Ref):
            raise self.fail(f"{name} must be an array, got a jax.Ref; read it with ref[...]", TypeError)
        if is_function(x):  # such as masks.causal without its parentheses
            raise self.fail(f"{name} must be an array, got {function_text(x)}", TypeError)

    def _not_of_jax(self, name: str, x: Any) -> Exception:
        dtype = getattr(x, "dtype", None)
        if dtype is None:
            return self.fail(f"{name} must be an array, got {type(x).__name__}", TypeError)
        native = getattr(dtype, "isnative", True)
        hint = "" if native else f"; cast it with .astype({dtype.newbyteorder('=').name!r})"
        return self.fail(f"{name} has dtype {dtype}, which JAX does not have{hint}", TypeError)

    def one_of(self, name: str, given: Any, allowed: tuple[str, ...]) -> None:
        if not (isinstance(given, str) and given in allowed):  # an array is compared by element
            raise self.fail(f"{name} must be one of {allowed}, got {given!r}")

    def page_layout(self, layout: Any) -> None:
        self.one_of("page_layout", layout, PAGE_LAYOUTS)

    def dtype(self, name: str, x: jax.Array, allowed: tuple[str, ...] = DTYPES, hint: str = "") -> None:
        if x.dtype.name not in allowed:
            raise self.fail(f"{name} has dtype {x.dtype}, allowed are {', '.join(allowed)}{hint}", TypeError)

    def rank(self, name: str, x: jax.Array, dims: str) -> None:
        wanted = len(dims.split())
        if x.ndim != wanted:
            raise self.fail(f"{name} must have rank {wanted} [{dims}], got shape {x.shape}")

    def dim(self, name: str, axis: str, got: Any, wanted: Any, owner: str) -> None:
        if not same_dim(got, wanted):
            raise self.fail(f"{name} has {axis} {got}, which differs from {owner}'s {wanted}")

    def shape(self, name: str, x: jax.Array, wanted: tuple[Any, ...], dims: str) -> None:
        if x.ndim != len(wanted) or not all(map(same_dim, x.shape, wanted)):
            raise self.fail(f"{name} must have shape [{dims}] = {wanted}, got {x.shape}")

    def int32(self, name: str, x: Any) -> jax.Array:
        """An index array: int32 if it is JAX's; on the host, integers of any type whose values int32 holds."""
        self._require_values(name, x)
        if not _holds_jax_arrays(x):
            return jnp.asarray(self.host_int32(name, x))
        array = jnp.asarray(x)
        if array.dtype != jnp.int32:
            raise self.fail(
                f"{name} must be int32, got {array.dtype}; cast it with .astype('int32')", TypeError
            )
        return array

    def host_int32(self, name: str, x: Any) -> np.ndarray:
        """The int32 values of integers on the host: a number, a list or a NumPy array."""
        self._require_values(name, x)
        try:
            array = np.asarray(x)
        except ValueError:
            raise self.fail(f"{name} must be an array, got lists of different lengths") from None
        integers = array.dtype.kind in "iu" or (array.dtype.kind == "O" and all(map(is_int, array.flat)))
        if not integers and (array.size or hasattr(x, "dtype")):  # an empty list is float64
            raise self.fail(f"{name} must hold integers, got {array.dtype}", TypeError)
        outside = array[(array < -INT32_MAX - 1) | (array > INT32_MAX)]
        if outside.size:
            raise self.fail(
                f"{name} holds {outside[0]}, allowed are the values of int32, at most {INT32_MAX}"
            )
        return array.astype(np.int32)

    def lengths(self, name: str, x: Any, count: Any, dim: str) -> jax.Array:
        """int32 `[count]`, from as many lengths or from one number for all."""
        lengths = self.int32(name, x)
        if lengths.ndim == 0:
            return jnp.broadcast_to(lengths, (count,))
        self.shape(name, lengths, (count,), dim)
        return lengths

    def segment_pair(self, ids: Any) -> Sequence[Any]:
        """The segment ids of queries and of keys; one array is both."""
        if not isinstance(ids, (tuple, list)):
            return ids, ids
        rows = isinstance(ids, list) and any(isinstance(x, list) and all(map(is_int, x)) for x in ids)
        if rows or len(ids) != 2:
            got = "lists of numbers; numpy.array makes one array of rows" if rows else "items"
            raise self.fail(f"segment_ids must be one array or a pair (q_ids, kv_ids), got {len(ids)} {got}")
        return ids

    def head_dim(self, name: str, x: jax.Array, implementation: str | None) -> None:
        d = x.shape[-1]
        if is_symbolic(d) or d < 1:
            raise self.fail(f"{name} must have a static head dim of at least 1, got {d}")
        if d > MAX_HEAD_DIM and implementation != "xla":
            raise self.fail(
                f'{name} has head dim {d}, allowed are 1 to {MAX_HEAD_DIM}; implementation="xla" takes any'
            )

    def narrow(self, name: str, x: Any) -> jax.Array:
        """x as an array, float32 for float64 of the host, as JAX makes it without x64."""
        array = self.array(name, x)
        host = not isinstance(x, jax.Array)
        return array.astype(jnp.float32) if host and array.dtype == jnp.float64 else array

    def float32(self, name: str, x: Any) -> jax.Array:
        array = self.narrow(name, x)
        if array.dtype != jnp.float32:
            raise self.fail(
                f"{name} must be float32, got {array.dtype}; cast it with .astype('float32')", TypeError
            )
        return array

    def number(self, name: str, x: Any, instead: str = "") -> float:
        """A finite number, or a known array without dimensions. `instead` says what to do with a traced one."""
        value = self._real(name, x, instead)
        if not abs(value) <= MAX_NUMBER:
            allowed = f"within ±{MAX_NUMBER}, as float32 needs it" if np.isfinite(value) else "finite"
            raise self.fail(f"{name} must be {allowed}, got {x}")
        return value

    def rate(self, name: str, x: Any, instead: str = "") -> float:
        """A probability below 1."""
        value = self._real(name, x, instead)
        if not 0 <= value < 1:
            raise self.fail(f"{name} must be in the range [0, 1), got {value}")
        return value

    def _real(self, name: str, x: Any, instead: str) -> float:
        if isinstance(x, jax.core.Tracer):
            hint = f"; {instead}" if instead else ""
            raise self.fail(
                f"{name} must be a Python number (it is compiled in), got a traced value{hint}", TypeError
            )
        value = _without_array(x)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise self.fail(
                f"{name} must be a Python number (it is compiled in), got {type(x).__name__}", TypeError
            )
        try:
            return float(value)
        except OverflowError:
            return float("inf")

    def divisor(self, name: str, x: Any, instead: str = "") -> float:
        value = self.number(name, x, instead)
        if value == 0:
            raise self.fail(f"{name} must not be 0, by which nothing can be divided; 1 changes nothing")
        return value

    def whole(self, name: str, x: Any, least: int | None = None) -> int:
        x = _without_array(x)
        if not is_int(x):
            raise self.fail(f"{name} must be an int, got {x!r}", TypeError)
        if least is not None and x < least:
            raise self.fail(f"{name} must be at least {least}, got {x}")
        return int(x)

    def flag(self, name: str, x: Any) -> bool:
        if isinstance(x, jax.core.Tracer):
            raise self.fail(
                f"{name} must be True or False (it is compiled in), got a traced value; {MARK_STATIC}",
                TypeError,
            )
        if not isinstance(x, (bool, np.bool_)):
            raise self.fail(f"{name} must be True or False, got {x!r}", TypeError)
        return bool(x)

    def broadcastable(
        self, name: str, x: jax.Array, wanted: tuple[Any, ...], dims: str, hint: str = ""
    ) -> jax.Array:
        """x, with leading dimensions of 1 up to the wanted rank; each dimension must be 1 or the wanted one."""
        if not broadcasts(x.shape, wanted):
            raise self.fail(f"{name} must broadcast to [{dims}] = {wanted}, got shape {x.shape}{hint}")
        return x.reshape((1,) * (len(wanted) - x.ndim) + x.shape) if x.ndim < len(wanted) else x


def broadcasts(shape: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether each dimension, counted from the last one, is 1 or the wanted one."""
    pairs = zip(shape[::-1], wanted[::-1])
    return len(shape) <= len(wanted) and all(same_dim(got, 1) or same_dim(got, want) for got, want in pairs)


def _without_array(x: Any) -> Any:
    """The number in a known array without dimensions; anything else as it is."""
    known = isinstance(x, (jax.Array, np.ndarray)) and not isinstance(x, jax.core.Tracer)
    return x.item() if known and x.ndim == 0 else x


def is_int(x: Any) -> TypeGuard[int]:
    """Whether x is an int of Python or NumPy, and no bool."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_function(x: Any) -> bool:
    """Whether x is to be called for a value. Variables of Flax can be called, too, but are arrays to JAX."""
    return callable(x) and not hasattr(type(x), "__jax_array__")


def function_text(x: Any) -> str:
    """What messages say about a function in place of a value."""
    return f"the function {getattr(x, '__name__', type(x).__name__)}; pass what it returns"


def _holds_jax_arrays(x: Any) -> bool:
    """Whether x is an array of JAX (possibly traced), or a list that contains one."""
    if isinstance(x, (list, tuple)):
        return any(map(_holds_jax_arrays, x))
    return isinstance(x, jax.Array) or hasattr(x, "__jax_array__")
