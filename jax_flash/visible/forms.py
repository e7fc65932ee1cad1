"""The forms of masks, each a condition on query row and key: ranges of keys, segments, blocks or booleans.

`conjunctions` combines them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from .._jax import same_dim
from ..pytrees import pytree
from ..spec import UNLIMITED, Reach
from .rows import MOST, Data, Rows, SortedKeys, minus, plus

Pair = tuple[Array, Array]  # lo, hi, int32, broadcastable to [b, h, s]: the keys lo ≤ j < hi
Limits = tuple[Array | int, Array | int]


def between(lo: Array | int, hi: Array | int) -> Pair:
    """The pair of int32 arrays."""
    return jnp.asarray(lo, jnp.int32), jnp.asarray(hi, jnp.int32)


def with_rank(x: Array, rank: int) -> Array:
    """The array with `rank` dimensions, of which maps and scans over a mask take the first ones away."""
    return jnp.expand_dims(x, range(rank - x.ndim))


@dataclass(frozen=True, eq=False)
class Form:
    """One condition on row and key."""

    name: ClassVar[str]  # of its function in masks.py

    def __str__(self) -> str:
        return self.name

    def most_ranges(self) -> int | None:
        """The most ranges that a row may see; None for a form that is not made of ranges."""
        return 1

    def extent(self) -> tuple[int, int]:
        """The numbers of rows and of keys that its arrays have, 0 where they have none."""
        return 0, 0

    def pairs(self, rows: Rows) -> list[Pair] | None:
        """The one or two ranges that the rows see; None for a form that is not made of ranges."""
        return None

    def reach(self) -> Reach:
        """A bound on what any row sees that is known while tracing."""
        return Reach()


@pytree("left", "right", "offset")
@dataclass(frozen=True, eq=False)
class Band(Form):
    """Keys i + offset − left ≤ j ≤ i + offset + right; a side that is None is unlimited."""

    name: ClassVar[str] = "window"

    left: Data | None = None
    right: Data | None = 0
    offset: Data = 0

    def pairs(self, rows: Rows) -> list[Pair]:
        offset = rows.each(self.offset)
        lo = 0 if self.left is None else plus(rows.i, minus(offset, rows.each(self.left)))
        hi = MOST if self.right is None else plus(plus(rows.i, plus(offset, rows.each(self.right))), 1)
        return [between(lo, hi)]

    def reach(self) -> Reach:
        if not isinstance(self.offset, int):
            return Reach()
        left, right = (x if isinstance(x, int) else None for x in (self.left, self.right))
        return Reach(
            UNLIMITED if left is None else max(left - self.offset, 0),
            UNLIMITED if right is None else max(right + self.offset, 0),
        )

    def __str__(self) -> str:
        causal = self.left is None and isinstance(self.right, int) and self.right == 0
        return "causal" if causal else self.name


@pytree("limits")
@dataclass(frozen=True, eq=False)
class Ranges(Form):
    """The keys in one or two ranges per row, given as arrays.

    `columns`: the number of keys for which a function of indices gave the ranges, or None.
    """

    name: ClassVar[str] = "ranges"

    limits: tuple[Limits, ...]
    columns: int | None = None

    @property
    def by_sequence(self) -> bool:
        """Whether in packed calls the arrays are [n|1, h|1, rows of a sequence] instead of [h|1, tq]."""
        return self.columns is not None

    def pairs(self, rows: Rows) -> list[Pair]:
        def of_rows(x: Array | int) -> Array:
            x = with_rank(jnp.asarray(x), 3)
            return rows.of_sequences(x) if self.by_sequence and rows.sequence is not None else x

        return [between(of_rows(lo), of_rows(hi)) for lo, hi in self.limits]

    def most_ranges(self) -> int:
        return len(self.limits)

    def extent(self) -> tuple[int, int]:
        shape = jnp.broadcast_shapes(*(jnp.shape(limit) for pair in self.limits for limit in pair))
        return (shape[-1] if shape else 0), 0


@pytree("lengths")
@dataclass(frozen=True, eq=False)
class Prefix(Form):
    """Causal, and the first `lengths` keys."""

    name: ClassVar[str] = "prefix_lm"

    lengths: Data

    def pairs(self, rows: Rows) -> list[Pair]:
        return [between(0, jnp.maximum(rows.i + 1, rows.each(self.lengths)))]

    def reach(self) -> Reach:
        return Reach(right=max(self.lengths - 1, 0)) if isinstance(self.lengths, int) else Reach()


@pytree("ids")
@dataclass(frozen=True, eq=False)
class Spans(Form):
    """Causal, but bidirectional within a run of equal ids that are not negative."""

    name: ClassVar[str] = "bidirectional_spans"

    ids: Array  # [b, s], or [tq] packed

    def pairs(self, rows: Rows) -> list[Pair]:
        own = ids = jnp.atleast_2d(jnp.asarray(self.ids, jnp.int32))
        index = rows.index
        if rows.whole is not None:
            ids = rows.whole(own)
            index = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        ends = ids[:, 1:] != ids[:, :-1]
        if rows.sequence is not None:
            ends |= (rows.sequence[1:] != rows.sequence[:-1])[None]
        ends = jnp.pad(ends, ((0, 0), (0, 1)), constant_values=True)
        following = jnp.where(ends, index + 1, MOST)
        end = lax.cummin(following, axis=1, reverse=True)  # one past the last key of the row's run
        if rows.sequence is not None:
            end = self._within(ends, rows)
        if rows.whole is not None:
            end = end[:, rows.index[0]]
        return [between(0, jnp.where(own >= 0, end, rows.index + 1)[:, None])]

    @staticmethod
    def _within(ends: Array, rows: Rows) -> Array:
        """The ends of runs, as positions in a packed batch, where positions start again in each sequence."""
        token = jnp.arange(ends.shape[1], dtype=jnp.int32)[None]
        last = lax.cummin(jnp.where(ends, token, MOST), axis=1, reverse=True)
        return rows.index + (last - token) + 1

    def extent(self) -> tuple[int, int]:
        return self.ids.shape[-1], self.ids.shape[-1]


@pytree()
@dataclass(frozen=True, eq=False)
class Chunks(Form):
    """Causal within chunks of `size` keys."""

    name: ClassVar[str] = "chunked"

    size: int

    def pairs(self, rows: Rows) -> list[Pair]:
        return [between(rows.i // self.size * self.size, rows.i + 1)]

    def reach(self) -> Reach:
        return Reach(self.size - 1, 0, self.size)


@pytree("first", "left")
@dataclass(frozen=True, eq=False)
class FirstAndWindow(Form):
    """Causal: the `first` keys, the row's own key and the `left` keys before it."""

    name: ClassVar[str] = "first_and_window"

    first: Data
    left: Data

    def pairs(self, rows: Rows) -> list[Pair]:
        end = rows.i + 1
        return [
            between(0, jnp.minimum(rows.each(self.first), end)),
            between(minus(rows.i, rows.each(self.left)), end),
        ]

    def reach(self) -> Reach:
        return Reach(right=0)

    def most_ranges(self) -> int:
        return 2


@pytree()
@dataclass(frozen=True, eq=False)
class Diffusion(Form):
    """Block diffusion over n noised tokens and then the n clean ones."""

    name: ClassVar[str] = "block_diffusion"

    block: int

    def pairs(self, rows: Rows) -> list[Pair]:
        n = (rows.keys // 2)[:, None]
        noised = rows.i < n
        start = jnp.where(noised, rows.i, rows.i - n) // self.block * self.block
        own = jnp.where(noised, jnp.minimum(start + self.block, n), start)
        clean = jnp.where(noised, n + start, n + jnp.minimum(start + self.block, n))
        return [between(start, own), between(n, clean)]

    def most_ranges(self) -> int:
        return 2


@pytree("q_positions", "kv_positions", "left", "right")
@dataclass(frozen=True, eq=False)
class Positions(Form):
    """Keys whose position lies in [p − left, p + right] around the row's position p; kv_positions do not decrease."""

    name: ClassVar[str] = "by_position"

    q_positions: Array  # [b, sq]
    kv_positions: Array  # [b, sk]
    left: Data | None
    right: Data | None

    def pairs(self, rows: Rows) -> list[Pair]:
        keys = rows.of_keys(self.kv_positions)
        lo: Array | int = 0
        hi: Array | int = MOST
        if self.left is not None:
            lo = keys.first_from(minus(self.q_positions, rows.each(self.left)[:, 0]))[:, None]
        if self.right is not None:
            hi = keys.first_from(plus(self.q_positions, rows.each(self.right)[:, 0]), above=True)[:, None]
        return [between(lo, hi)]

    def extent(self) -> tuple[int, int]:
        return self.q_positions.shape[-1], self.kv_positions.shape[-1]


@pytree("q_ids", "kv_ids")
@dataclass(frozen=True, eq=False)
class Segments(Form):
    """Keys of the row's own segment. If keys are packed or in pages, a segment's keys are neighbours, so that its rows
    see a range."""

    name: ClassVar[str] = "segments"

    q_ids: Array  # [b, sq], packed [1, tq]
    kv_ids: Array  # [b, sk], packed [1, tk]

    def pairs(self, rows: Rows) -> list[Pair] | None:
        if rows.packed_keys is None:
            return None
        keys = rows.of_keys(self.kv_ids)
        if same_dim(keys.most, 0):
            return [between(0, 0)]
        place = rows.packed_keys
        order = jnp.lexsort((keys.elements, ~place.used, place.owner)).astype(jnp.int32)
        ids = SortedKeys(keys.elements[order], keys.start, keys.count, keys.most)
        first, past = ids.first_from(self.q_ids), ids.first_from(self.q_ids, above=True)
        lo, hi = (order.at[ids.start + x].get(mode="clip") - ids.start for x in (first, past - 1))
        none = first == past
        return [between(jnp.where(none, 0, lo)[:, None], jnp.where(none, 0, hi + 1)[:, None])]

    def most_ranges(self) -> None:
        return None

    def extent(self) -> tuple[int, int]:
        return self.q_ids.shape[-1], self.kv_ids.shape[-1]


@pytree("chosen")
@dataclass(frozen=True, eq=False)
class Blocks(Form):
    """Blocks of keys chosen for each block of queries. `columns`: as in Ranges."""

    name: ClassVar[str] = "blocks"

    chosen: Array  # [b|1, hk|hq|1, ⌈sq/bq⌉, n]
    block: tuple[int, int]
    columns: int | None = None

    def shown(self, columns: Any) -> Array:
        """Whether each block of rows sees each of `columns` blocks of keys, boolean [b|1, hk|hq|1, ⌈sq/bq⌉, columns].

        Indices outside the blocks are ignored, and repeated ones count once."""
        # Compared, not scattered: XLA would gather the indices of a scatter, or checkify could not check it.
        at = lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, columns), 4)
        shown: Array = (with_rank(self.chosen, 4)[..., None] == at).any(-2)
        return shown

    def most_ranges(self) -> None:
        return None


@pytree("seen")
@dataclass(frozen=True, eq=False)
class Dense(Form):
    """A boolean for each row and key.

    `by_sequence`: in packed calls the array is [n|1, h|1, rows of a sequence, its keys], whatever its sizes. None: it
    joins arrays whose rows and keys do not mean the same where the array has not all of them.
    """

    name: ClassVar[str] = "dense"

    seen: Array  # [b|1, hq|1, sq|1, sk|1]
    by_sequence: bool | None = False

    def most_ranges(self) -> None:
        return None

    def extent(self) -> tuple[int, int]:
        return self.seen.shape[-2], self.seen.shape[-1]
