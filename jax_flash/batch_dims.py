"""Shared by the functions with other libraries' arguments: any number of batch dims, dtypes, jax.nn's windows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ._jax import same_dim, split_alike
from .checker import Checker
from .options import Implementation


def promote(arrays: Sequence[Array], *, dtype: Any = None) -> list[Array]:
    """The arrays in one inexact dtype, which is `dtype` or the one that they promote to."""
    arrays = [jnp.asarray(x) for x in arrays]
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    return [x.astype(dtype) for x in arrays]


def plain_if_float64(implementation: Implementation | None, dtype: Any) -> Implementation | None:
    """The implementation, which is plain JAX for float64 if none is named."""
    return "xla" if implementation is None and dtype == jnp.float64 else implementation


def local_window(check: Checker, size: Any, name: str = "local_window_size") -> tuple[int, int] | None:
    """jax.nn's local_window_size, or another library's argument of the same meaning, as a pair."""
    if size is None:
        return None
    try:
        left, right = size if isinstance(size, Sequence) else (size, size)
        left, right = operator.index(left), operator.index(right)
    except (TypeError, ValueError):
        left = right = -1
    if left < 0 or right < 0:
        raise check.fail(f"{name} is {size!r}; allowed are None, an int ≥ 0 and a pair (left, right) of such")
    return left, right


def check_batch_dims(check: Checker, query: Array, key: Array, value: Array) -> None:
    if not query.ndim == key.ndim == value.ndim >= 3:
        raise check.fail(
            "query, key and value must have the same rank, at least 3, "
            f"but have {query.ndim}, {key.ndim} and {value.ndim}"
        )
    for name, x in (("key", key), ("value", value)):
        if not all(map(same_dim, x.shape[:-3], query.shape[:-3])):
            raise check.fail(
                f"{name} has batch dims {x.shape[:-3]}, which differ from query's {query.shape[:-3]}"
            )


def over_batch_dims(
    attend: Callable[..., Any], query: Array, key: Array, value: Array, arrays: dict[str, Array]
) -> Any:
    """Calls `attend` with exactly one batch dim: adds one if there is none, and maps over further ones.

    A reshape instead of vmap would lose the sharding of an inner batch dim.
    """
    if query.ndim == 3:
        one = {name: x if name == "dropout_key" else x[None] for name, x in arrays.items()}
        return jax.tree.map(lambda x: x[0], attend(query[None], key[None], value[None], **one))
    if query.ndim == 4:
        return attend(query, key, value, **arrays)

    def inner(query: Array, key: Array, value: Array, arrays: dict[str, Array]) -> Any:
        return over_batch_dims(attend, query, key, value, arrays)

    inner_arrays, axes = dict(arrays), dict[str, int | None](dict.fromkeys(arrays))
    for name, array in arrays.items():
        if name != "dropout_key" and same_dim(array.shape[0], 1):
            inner_arrays[name] = array[0]
            continue
        # Each batch entry gets its own key; with one key for all, they would drop the same weights.
        by_entry = jax.random.split(array, query.shape[0]) if name == "dropout_key" else array
        inner_arrays[name], axes[name] = split_alike(by_entry, 0, query), 0
    key, value = (split_alike(x, 0, query) for x in (key, value))
    return jax.vmap(inner, in_axes=(0, 0, 0, axes))(query, key, value, inner_arrays)
