"""Pytrees that may be arguments of programs that `jax.export` serialises."""

from __future__ import annotations

import dataclasses
from ast import literal_eval
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from jax.export import register_pytree_node_serialization

T = TypeVar("T")


@jax.tree_util.register_static
class Static(int):
    """An int that belongs to a pytree's structure: it is no leaf, so maps and scans leave it as it is, and programs are
    compiled for its value."""


register_pytree_node_serialization(
    Static,
    serialized_name=f"{Static.__module__}.{Static.__name__}",
    serialize_auxdata=lambda value: repr(value).encode(),
    deserialize_auxdata=lambda text: Static(text.decode()),
)


def pytree(*arrays: str) -> Callable[[type[T]], type[T]]:
    """Makes a frozen dataclass a pytree whose leaves are in the fields of these names.

    Its other fields are static: Python literals, which a serialised program keeps as text.

    It is no dataclass to JAX, because the structures of two dataclasses are equal if their static fields are: then
    `lax.cond` takes two branches of different kinds for one, and silently returns the first's kind for both.
    """

    def register(cls: type[Any]) -> type[Any]:
        static = [field.name for field in dataclasses.fields(cls) if field.name not in arrays]

        def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
            return [getattr(x, name) for name in arrays], tuple(getattr(x, name) for name in static)

        def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
            children, values = flatten(x)
            return list(zip(map(jax.tree_util.GetAttrKey, arrays), children)), values

        def unflatten(values: tuple[Any, ...], children: Iterable[Any]) -> Any:
            return cls(**dict(zip(arrays, children)), **dict(zip(static, values)))

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return register_pytree_node_serialization(
            cls,
            serialized_name=f"{cls.__module__}.{cls.__name__}",
            serialize_auxdata=lambda values: repr(values).encode(),
            deserialize_auxdata=lambda text: literal_eval(text.decode()),
        )

    return register
