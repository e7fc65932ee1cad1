"""Pytrees that may be arguments of programs that `jax.export` serialises."""

from __future__ import annotations

import dataclasses
from ast import literal_eval
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from jax.export import register_pytree_node_serialization

T = TypeVar("T")
Fields = tuple[tuple[str, Any], ...]  # names and values


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

    Its other fields are static: Python literals, which a serialised program keeps as text. So is a field that holds a
    Static, since Orbax takes a node that is an int for a stored array.

    It is no dataclass to JAX, because the structures of two dataclasses are equal if their static fields are: then
    `lax.cond` takes two branches of different kinds for one, and silently returns the first's kind for both.
    """

    def register(cls: type[Any]) -> type[Any]:
        names = [field.name for field in dataclasses.fields(cls)]

        def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], Fields]:
            fields = {name: getattr(x, name) for name in names}
            static = {n: value for n, value in fields.items() if n not in arrays or isinstance(value, Static)}
            children = [(jax.tree_util.GetAttrKey(n), fields[n]) for n in names if n not in static]
            return children, tuple(static.items())

        def flatten(x: Any) -> tuple[list[Any], Fields]:
            children, static = flatten_with_keys(x)
            return [child for _, child in children], static

        def unflatten(static: Fields, children: Iterable[Any]) -> Any:
            known = dict(static)
            return cls(**known, **dict(zip((n for n in names if n not in known), children)))

        def deserialized(text: bytes) -> Fields:
            fields = literal_eval(text.decode())
            return tuple((n, Static(x) if n in arrays else x) for n, x in fields)

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return register_pytree_node_serialization(
            cls,
            serialized_name=f"{cls.__module__}.{cls.__name__}",
            serialize_auxdata=lambda static: repr(static).encode(),
            deserialize_auxdata=deserialized,
        )

    return register
