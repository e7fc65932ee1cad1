"""Joins the parts of a call: sums of gradients and tangents, merges of results.

Parts stay as the calls return them until they are joined, once per visit. All are joined at once, element by element,
so that XLA makes one kernel of it and copies or widens nothing before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..largest import max_or_nan_over
from ..merge import combine
from ..spec import Ring

GATHERED = 64 << 20  # bytes of `out` of all devices that one device gathers
Arrays = tuple[Array, ...]  # arrays that are joined together, such as out and lse


@dataclass(frozen=True)
class Kind:
    """How arrays are joined: the axis of their tokens, and the values of tokens that a part does not have."""

    axes: tuple[int, ...]
    fills: tuple[float, ...]
    join: Callable[[Sequence[Arrays]], Arrays]


def _sum(parts: Sequence[Arrays]) -> Arrays:
    return tuple(reduce(operator.add, map(wide, each)) for each in zip(*parts, strict=True))


def _merge(parts: Sequence[Arrays]) -> Arrays:
    outs, lses, *row_maxima = zip(*parts, strict=True)
    return *combine(outs, lses), *(reduce(jnp.maximum, x) for x in row_maxima)


def wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def merged_over(ring: Ring, out: Array, lse: Array, *row_max: Array) -> Arrays:
    """The results of all keys, of which each device of the ring has some: out `[b, s, h, d]`, lse and row_max
    `[b, h, s]`.

    Small results, as those of a decode step, are gathered, because one transfer takes less time than three sums.
    """
    axes = ring.axes
    if ring.size * out.nbytes <= GATHERED:
        every = lax.all_gather((out, lse, *row_max), axes)
        return _merge([tuple(x[n] for x in every) for n in range(ring.size)])
    largest = lax.pmax(lse, axes)
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    total = jnp.log(lax.psum(jnp.exp(lse - largest), axes)) + largest
    weight = jnp.where(jnp.isneginf(lse), 0, jnp.exp(lse - total))
    merged = lax.psum(wide(out) * jnp.swapaxes(weight, 1, 2)[..., None], axes)
    return merged, total, *(max_or_nan_over(axes, x) for x in row_max)


MERGED = Kind((1, 2), (0.0, -float("inf")), _merge)  # out [b, s, h, d] and lse [b, h, s]
MERGED_MAX = Kind((1, 2, 2), (0.0, -float("inf"), -float("inf")), _merge)  # and row_max [b, h, s]
TANGENTS = Kind((1, 2), (0.0, 0.0), _sum)  # of out and lse
GRADIENTS = Kind((1,), (0.0,), _sum)  # dquery
PAIRS = Kind((1, 1), (0.0, 0.0), _sum)  # dkey and dvalue


@dataclass(frozen=True)
class Part:
    """The results of a call for the tokens from `start` on. If `here` is given, only devices where it is true have
    them."""

    start: int
    arrays: Arrays
    here: Array | None = None


@dataclass
class Total:
    """The parts of `size` tokens so far."""

    kind: Kind
    size: int
    parts: list[Part] = field(default_factory=list)

    def add(self, start: int, arrays: Arrays, here: Array | None = None) -> None:
        self.parts.append(Part(start, arrays, here))

    def before(self, arrays: Any) -> Any:
        """The same arrays, with a barrier: XLA may use them only when the parts so far have been computed."""
        arrays, parts = lax.optimization_barrier((arrays, [part.arrays for part in self.parts]))
        self.parts = [replace(part, arrays=x) for part, x in zip(self.parts, parts, strict=True)]
        return arrays

    def settle(self) -> None:
        """Joins all parts, in float32."""
        if len(self.parts) > 1:
            self.parts = [Part(0, self.kind.join([self._padded(part) for part in self.parts]))]

    def result(self) -> Arrays:
        """All parts joined; the caller rounds."""
        some = [part for part in self.parts if not self._is_whole(part)]
        if len(self.parts) - len(some) == 1 and len({(x.start, self._rows(x)) for x in some}) == 1:
            return self._within(next(x for x in self.parts if self._is_whole(x)).arrays, some)
        self.settle()
        return self._padded(self.parts[0])

    def _within(self, whole: Arrays, some: list[Part]) -> Arrays:
        """Joins a whole part with others that have some of the rows; the other rows stay as they are.

        They are concatenated and not updated in place, because XLA on GPUs (jax 0.11) updates one element per thread,
        which takes longer than copying all.
        """
        start = some[0].start
        stop = start + self._rows(some[0])

        def rows(x: Array, axis: int, begin: int, end: int) -> Array:
            return lax.slice_in_dim(x, begin, end, axis=axis)

        here = tuple(rows(x, axis, start, stop) for x, axis in zip(whole, self.kind.axes))
        joined = self.kind.join([here, *map(self._here, some)])
        return tuple(
            lax.concatenate(
                [rows(x, axis, 0, start), y.astype(x.dtype), rows(x, axis, stop, self.size)], axis
            )
            for x, y, axis in zip(whole, joined, self.kind.axes, strict=True)
        )

    def _here(self, part: Part) -> Arrays:
        """A part's arrays; on devices that do not have the part, the values for missing tokens."""
        if part.here is None:
            return part.arrays
        pairs = zip(part.arrays, self.kind.fills, strict=True)
        return tuple(jnp.where(part.here, x, fill) for x, fill in pairs)

    def _padded(self, part: Part) -> Arrays:
        """A part, padded to all tokens."""
        before, after = part.start, self.size - part.start - self._rows(part)

        def pad(x: Array, fill: float, axis: int) -> Array:
            config = [(before, after, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)]
            return lax.pad(x, jnp.asarray(fill, x.dtype), config)

        arrays = self._here(part)
        if self._is_whole(part):
            return arrays
        return tuple(pad(*each) for each in zip(arrays, self.kind.fills, self.kind.axes, strict=True))

    def _rows(self, part: Part) -> int:
        return part.arrays[0].shape[self.kind.axes[0]]

    def _is_whole(self, part: Part) -> bool:
        return self._rows(part) == self.size
