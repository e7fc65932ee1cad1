"""The query rows of a call and their keys, in the form that masks need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .. import search
from .._jax import same_dim
from ..checker import INT32_MAX

Data = int | Array  # a number, or one for each batch entry, int32 [b]
MOST = INT32_MAX


@partial(jax.jit, inline=True)  # traced once for several masks
def plus(x: Array, y: Array | int) -> Array:
    """x + y, or the end of int32 that it would pass."""
    total = x + y
    return jnp.where(((x ^ total) & (y ^ total)) < 0, jnp.where(x < 0, -MOST - 1, MOST), total)


@partial(jax.jit, inline=True)
def minus(x: Array, y: Array) -> Array:
    """x − y, or the end of int32 that it would pass."""
    left = x - y
    return jnp.where(((x ^ y) & (x ^ left)) < 0, jnp.where(x < 0, -MOST - 1, MOST), left)


@dataclass(frozen=True)
class PackedKeys:
    """Where the keys of sequences lie in arrays with one element per key, of any shape.

    start: the first key of each row's sequence, int32 [b|1, s|1].
    owner: the sequence of each key.
    used: whether the key is in use.
    """

    start: Array
    owner: Array
    used: Array


@dataclass(frozen=True)
class Rows:
    """The query rows of one call; a packed batch is one batch entry.

    index: the position of each row in its sequence, int32 [1, s].
    lengths, keys: how many rows and keys the batch entry or sequence of each row has, int32 [b|1, s|1].
    sequence: for a packed batch, the sequence of each row, int32 [s].
    packed_keys: set if keys are packed or in pages.
    whole: set if devices split the sequence; gathers an array […, s] from all of them.
    """

    index: Array
    lengths: Array
    keys: Array
    sequence: Array | None = None
    packed_keys: PackedKeys | None = None
    whole: Callable[[Array], Array] | None = None

    @staticmethod
    def fixed(sq: int, sk: int) -> Rows:
        """The rows of a batch of equal lengths."""
        whole = partial(jnp.full, (1, 1), dtype=jnp.int32)
        return Rows(jnp.arange(sq, dtype=jnp.int32)[None], whole(fill_value=sq), whole(fill_value=sk))

    @property
    def i(self) -> Array:
        """The position of each row, [1, 1, s]."""
        return self.index[:, None]

    def each(self, data: Data) -> Array:
        """The element of each row's batch entry or sequence, [b|1, 1, s|1]."""
        x = jnp.asarray(data, jnp.int32)
        if x.ndim == 0:
            return x[None, None, None]
        if self.sequence is None:
            return x[:, None, None]
        return x[jnp.clip(self.sequence, 0, x.shape[0] - 1)][None, None]

    def of_sequences(self, x: Array) -> Array:
        """The elements [1, h, s, …] of packed rows in an array [n|1, h|1, rows, …] of sequences; 0 past its rows."""
        assert self.sequence is not None
        sequence, row = jnp.minimum(self.sequence, x.shape[0] - 1), jnp.minimum(self.index[0], x.shape[2])
        padded = jnp.pad(x, [(0, int(dim == 2)) for dim in range(x.ndim)])
        return jnp.swapaxes(padded[sequence, :, row], 0, 1)[None]

    def of_keys(self, x: Array) -> SortedKeys:
        """An array with one element per key, [b|1, sk] or packed [1, tk], in which each row can search its own keys."""
        x = jnp.atleast_2d(x)
        x = x if self.whole is None else self.whole(x)
        if self.packed_keys is None:
            start = jnp.zeros((x.shape[0], 1), jnp.int32)
            return SortedKeys(x[0] if same_dim(x.shape[0], 1) else x, start, self.keys, x.shape[1])
        n = self.packed_keys.owner.size
        x = jnp.broadcast_to(x, (n // max(x.shape[1], 1), x.shape[1])) if x.size else x
        return SortedKeys(x.reshape(-1), self.packed_keys.start, self.keys, x.shape[1])


@dataclass(frozen=True)
class SortedKeys:
    """An ascending list for each row: the `count` elements from `start` on. No count exceeds `most`.

    elements: of all lists, [n], or of the lists of each batch entry, [b, n], which are split with them.
    """

    elements: Array
    start: Array
    count: Array
    most: Any

    def first_from(self, wanted: Array, *, above: bool = False) -> Array:
        """The index [b, s] of the first element of each row's list that is ≥ `wanted` (> with `above`)."""
        return search.first_from(self.elements, self.start, self.count, wanted, self.most, above=above)
