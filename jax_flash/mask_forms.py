"""The forms of masks, and what each leaves visible to a query row: ranges of keys, segments, blocks or booleans.

A mask is a conjunction of forms. `resolve` turns it, for the rows of one call, into a `Visible`: at most two ranges of
keys for each row, and the conditions that ranges cannot express.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ._jax import same_dim
from .mask_rows import MOST, Data, Rows, SortedKeys, minus, plus
from .pytrees import pytree
from .spec import UNLIMITED, Reach, narrower, wider

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


@pytree("limits")
@dataclass(frozen=True, eq=False)
class Ranges(Form):
    """The keys in one or two ranges per row, given as arrays.

    `by_sequence`: in packed calls the arrays are [n|1, h|1, rows of a sequence] instead of [h|1, tq].
    """

    limits: tuple[Limits, ...]
    by_sequence: bool = False

    def pairs(self, rows: Rows) -> list[Pair]:
        def of_rows(x: Array | int) -> Array:
            x = with_rank(jnp.asarray(x), 3)
            return rows.of_sequences(x) if self.by_sequence and rows.sequence is not None else x

        return [between(of_rows(lo), of_rows(hi)) for lo, hi in self.limits]


@pytree("lengths")
@dataclass(frozen=True, eq=False)
class Prefix(Form):
    """Causal, and the first `lengths` keys."""

    lengths: Data

    def pairs(self, rows: Rows) -> list[Pair]:
        return [between(0, jnp.maximum(rows.i + 1, rows.each(self.lengths)))]

    def reach(self) -> Reach:
        return Reach(right=max(self.lengths - 1, 0)) if isinstance(self.lengths, int) else Reach()


@pytree("ids")
@dataclass(frozen=True, eq=False)
class Spans(Form):
    """Causal, but bidirectional within a run of equal ids that are not negative."""

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


@pytree()
@dataclass(frozen=True, eq=False)
class Chunks(Form):
    """Causal within chunks of `size` keys."""

    size: int

    def pairs(self, rows: Rows) -> list[Pair]:
        return [between(rows.i // self.size * self.size, rows.i + 1)]

    def reach(self) -> Reach:
        return Reach(self.size - 1, 0, self.size)


@pytree("first", "left")
@dataclass(frozen=True, eq=False)
class FirstAndWindow(Form):
    """Causal: the `first` keys, the row's own key and the `left` keys before it."""

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


@pytree()
@dataclass(frozen=True, eq=False)
class Diffusion(Form):
    """Block diffusion over n noised tokens and then the n clean ones."""

    block: int

    def pairs(self, rows: Rows) -> list[Pair]:
        n = (rows.keys // 2)[:, None]
        noised = rows.i < n
        start = jnp.where(noised, rows.i, rows.i - n) // self.block * self.block
        own = jnp.where(noised, jnp.minimum(start + self.block, n), start)
        clean = jnp.where(noised, n + start, n + jnp.minimum(start + self.block, n))
        return [between(start, own), between(n, clean)]


@pytree("q_positions", "kv_positions", "left", "right")
@dataclass(frozen=True, eq=False)
class Positions(Form):
    """Keys whose position lies in [p − left, p + right] around the row's position p; kv_positions do not decrease."""

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


@pytree("q_ids", "kv_ids")
@dataclass(frozen=True, eq=False)
class Segments(Form):
    """Keys of the row's own segment. If keys are packed or in pages, a segment's keys are neighbours, so that its rows
    see a range."""

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


@pytree("chosen")
@dataclass(frozen=True, eq=False)
class Blocks(Form):
    """Blocks of keys chosen for each block of queries."""

    chosen: Array  # [b|1, hk|hq|1, ⌈sq/bq⌉, n]
    block: tuple[int, int]

    def shown(self, columns: Any) -> Array:
        """Whether each block of rows sees each of `columns` blocks of keys, boolean [b|1, hk|hq|1, ⌈sq/bq⌉, columns].

        Indices outside the blocks are ignored, and repeated ones count once."""
        chosen = with_rank(self.chosen, 4)
        nothing = jnp.zeros((*chosen.shape[:-1], columns), bool)
        index = jnp.where(chosen < 0, MOST, chosen)
        at = tuple(jnp.indices(index.shape, sparse=True)[:-1])
        return nothing.at[(*at, index)].set(True, mode="drop")


@pytree("seen")
@dataclass(frozen=True, eq=False)
class Dense(Form):
    """A boolean for each row and key.

    `by_sequence`: in packed calls the array is [n|1, h|1, rows of a sequence, its keys], whatever its sizes. None: one
    of two arrays that were joined is.
    """

    seen: Array  # [b|1, hq|1, sq|1, sk|1]
    by_sequence: bool | None = False

    def joined(self, other: Dense, seen: Array) -> Dense:
        return Dense(seen, self.by_sequence if self.by_sequence is other.by_sequence else None)


@pytree("a", "b")
@dataclass(frozen=True, eq=False)
class Either(Form):
    """The keys that either of two masks shows."""

    a: tuple[Form, ...]
    b: tuple[Form, ...]

    def pairs(self, rows: Rows) -> list[Pair]:
        return union(pairs_of(self.a, rows), pairs_of(self.b, rows))

    def reach(self) -> Reach:
        a, b = reach_of(self.a), reach_of(self.b)
        return Reach(
            wider(a.left, b.left), wider(a.right, b.right), a.chunk if a.chunk == b.chunk else UNLIMITED
        )


def flat(forms: Sequence[Form]) -> Iterator[Form]:
    """The conditions of a mask, those of `a | b` one by one."""
    for x in forms:
        if isinstance(x, Either):
            yield from flat(x.a)
            yield from flat(x.b)
        else:
            yield x


def pairs_of(forms: Sequence[Form], rows: Rows) -> list[Pair]:
    """The ranges that remain of all forms that are made of ranges; empty if there is no such form."""
    found: list[Pair] = []
    for each in forms:
        pairs = each.pairs(rows)
        if pairs is not None:
            found = intersection(found, pairs) if found else pairs
    return found


def reach_of(forms: Sequence[Form]) -> Reach:
    """A bound on what a row sees through all of these forms."""
    found = Reach()
    for each in forms:
        found = Reach(*map(narrower, found, each.reach()))
    return found


def most_pairs(forms: Sequence[Form]) -> int | None:
    """The most ranges that a row of this conjunction may have; None if some form is not made of ranges."""
    total = 1
    for each in forms:
        if isinstance(each, (Segments, Blocks, Dense)):
            return None
        if isinstance(each, Ranges):
            count = len(each.limits)
        elif isinstance(each, Either):
            count = (most_pairs(each.a) or 1) + (most_pairs(each.b) or 1)
        else:
            count = 2 if isinstance(each, (FirstAndWindow, Diffusion)) else 1
        total += count - 1
    return total


def intersection(a: Sequence[Pair], b: Sequence[Pair]) -> list[Pair]:
    """The keys in both of two unions of ranges; one of them is a single range."""
    return [(jnp.maximum(x[0], y[0]), jnp.minimum(x[1], y[1])) for x in a for y in b]


def union(a: Sequence[Pair], b: Sequence[Pair]) -> list[Pair]:
    """The keys in either of two single ranges: one range if they touch, else two in ascending order."""
    (lo, hi), (begin, end) = a[0], b[0]
    return ordered([(lo, hi), (begin, end)])


def ordered(pairs: Sequence[Pair]) -> list[Pair]:
    """At most two ranges, ascending and disjoint; the second is empty if one range holds all keys."""
    if len(pairs) < 2:
        return list(pairs)
    (a, b), (c, d) = pairs
    a, b, c, d = jnp.broadcast_arrays(a, b, c, d)
    # An empty range is moved to the end of the other range, where it changes nothing.
    a, b = jnp.where(a < b, a, d), jnp.where(a < b, b, d)
    c, d = jnp.where(c < d, c, b), jnp.where(c < d, d, b)
    swap = c < a
    a, b, c, d = jnp.where(swap, c, a), jnp.where(swap, d, b), jnp.where(swap, a, c), jnp.where(swap, b, d)
    touch = c <= b
    end = jnp.maximum(b, d)
    return [(a, jnp.where(touch, end, b)), (jnp.where(touch, end, c), jnp.where(touch, end, d))]


@dataclass(frozen=True)
class Visible:
    """The keys that a mask leaves visible to the rows of a call: those in one of `pairs`, of the row's segment, in its
    blocks, and where `dense` is true."""

    pairs: tuple[Pair, ...] = ()  # one or two, ascending and disjoint; empty: all keys are visible
    segments: Segments | None = None
    blocks: Blocks | None = None
    dense: Dense | None = None


def resolve(forms: Sequence[Form], rows: Rows) -> Visible:
    """What a conjunction of forms leaves visible to the rows."""
    limit = rows.keys[:, None]
    clipped = [(jnp.clip(lo, 0, limit), jnp.clip(hi, 0, limit)) for lo, hi in pairs_of(forms, rows)]
    found = Visible(tuple(ordered(clipped)))
    for each in forms:  # a mask has at most one form of each of these kinds
        if isinstance(each, Segments) and rows.packed_keys is None:
            found = replace(found, segments=Segments(with_rank(each.q_ids, 2), with_rank(each.kv_ids, 2)))
        elif isinstance(each, Blocks):
            found = replace(found, blocks=each)
        elif isinstance(each, Dense):
            found = replace(found, dense=replace(each, seen=with_rank(each.seen, 4)))
    return found


def seen(visible: Visible, rows: int, column: Array) -> Array:
    """Whether each of the rows sees the key at each column, boolean `[b|1, h|1, rows, sk]`; column: int32 [b|1, sk]."""
    j = column[:, None, None, :]
    result = jnp.ones((1, 1, rows, column.shape[-1]), bool)
    if visible.pairs:
        inside = [(lo[..., None] <= j) & (j < hi[..., None]) for lo, hi in visible.pairs]
        result = result & (inside[0] if len(inside) == 1 else inside[0] | inside[1])
    if visible.segments is not None:
        q, k = visible.segments.q_ids, visible.segments.kv_ids
        result = result & (q[:, None, :, None] == k[:, None, None, :])
    if visible.blocks is not None:
        result = result & _in_blocks(visible.blocks, rows, column.shape[-1])
    if visible.dense is not None:
        result = result & visible.dense.seen
    return result


def _in_blocks(blocks: Blocks, sq: int, sk: int) -> Array:
    """`[b|1, h|1, sq, sk]`: whether the key's block is one of those chosen for the row's."""
    bq, bk = blocks.block
    shown = blocks.shown(-(-sk // bk))
    return jnp.repeat(jnp.repeat(shown, bq, 2)[:, :, :sq], bk, 3)[..., :sk]
