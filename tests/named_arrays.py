"""The part of Haliax and Levanter that jax_flash.compat.levanter asks for, so that its tests run without them."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int

    def alias(self, name):
        return Axis(name, self.size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NamedArray:
    array: Any
    axes: tuple[Axis, ...] = dataclasses.field(metadata=dict(static=True))

    @property
    def dtype(self):
        return self.array.dtype

    def resolve_axis(self, axis):
        name = axis if isinstance(axis, str) else axis.name
        return next(x for x in self.axes if x.name == name)

    def rearrange(self, axes):
        names = [x.name for x in self.axes]
        return NamedArray(
            self.array.transpose([names.index(x.name) for x in axes]),
            tuple(self.resolve_axis(x) for x in axes),
        )

    def rename(self, names):
        return NamedArray(self.array, tuple(Axis(names.get(x.name, x.name), x.size) for x in self.axes))


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    is_causal: bool = False
    causal_offset: Any = None
    explicit_mask: Any = None
    segment_ids: Any = None
    sliding_window: int | None = None
    bidirectional_window: int | None = None
    prefix_length: int | None = None  # of some versions, which the adapter does not know


def stand_in(monkeypatch) -> None:
    """Puts this module's NamedArray where `import haliax` looks."""
    haliax = types.SimpleNamespace(named=NamedArray, auto_sharded=lambda x: x)
    monkeypatch.setitem(sys.modules, "haliax", haliax)
