"""Conjunctions of forms, and what one leaves visible to a query row.

A mask is a conjunction of forms. `resolve` turns it, for the rows of one call, into a `Visible`: at most two ranges of
keys for each row, and the conditions that ranges cannot express.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..pytrees import pytree
from ..spec import UNLIMITED, Reach, narrower, wider
from .forms import Blocks, Dense, Form, Pair, Segments, with_rank
from .rows import Rows


@pytree("a", "b")
@dataclass(frozen=True, eq=False)
class Either(Form):
    """The keys that either of two masks shows."""

    a: tuple[Form, ...]
    b: tuple[Form, ...]

    def pairs(self, rows: Rows) -> list[Pair]:
        found: list[Pair] = ordered([*pairs_of(self.a, rows), *pairs_of(self.b, rows)])  # one range of each
        return found

    def reach(self) -> Reach:
        a, b = reach_of(self.a), reach_of(self.b)
        return Reach(
            wider(a.left, b.left), wider(a.right, b.right), a.chunk if a.chunk == b.chunk else UNLIMITED
        )

    def __str__(self) -> str:
        return f"({text_of(self.a)} | {text_of(self.b)})"

    def most_ranges(self) -> int:
        return (most_pairs(self.a) or 1) + (most_pairs(self.b) or 1)


def flat(forms: Sequence[Form]) -> Iterator[Form]:
    """The conditions of a mask, those of `a | b` one by one."""
    for x in forms:
        if isinstance(x, Either):
            yield from flat(x.a)
            yield from flat(x.b)
        else:
            yield x


def text_of(forms: Sequence[Form]) -> str:
    """A conjunction of forms by their names."""
    return " & ".join(map(str, forms)) or "everything"


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
        own = each.most_ranges()
        if own is None:
            return None
        total += own - 1
    return total


def intersection(a: Sequence[Pair], b: Sequence[Pair]) -> list[Pair]:
    """The keys in both of two unions of ranges; one of them is a single range."""
    return [(jnp.maximum(x[0], y[0]), jnp.minimum(x[1], y[1])) for x in a for y in b]


@partial(jax.jit, inline=True)  # traced once for several masks
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


def array_of(forms: Sequence[Form], rows: int, keys: int) -> Array:
    """Whether each of the `rows` of a fixed call sees each of the `keys`; broadcastable to [b, h, rows, keys]."""
    visible = resolve(forms, Rows.fixed(rows, keys))
    return seen(visible, rows, jnp.arange(keys, dtype=jnp.int32)[None])


def _in_blocks(blocks: Blocks, sq: int, sk: int) -> Array:
    """`[b|1, h|1, sq, sk]`: whether the key's block is one of those chosen for the row's."""
    bq, bk = blocks.block
    shown = blocks.shown(-(-sk // bk))
    return jnp.repeat(jnp.repeat(shown, bq, 2)[:, :, :sq], bk, 3)[..., :sk]
