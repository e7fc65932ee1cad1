"""Which queries each device multiplies by which keys, and when. This is known while tracing, so keys that no query sees
are neither multiplied nor sent.

Device i computes the results of its own queries. At distance t it takes the keys of device (i − t) mod n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..operands import WINDOW
from ..spec import UNLIMITED, AttentionSpec, Ring

# Operands that depend on the position in the sequence.
_PLACED = {"q_lengths", "kv_lengths", "mask", "bias", "alibi_slopes", "dropout", "ranges", "block_mask"}
_PLACED |= {*WINDOW}
_ALIGNMENT = 64  # cuts are multiples of it, because kernels load whole tiles
HALVED = 4096  # with at least this many queries in a shard, half of them take longer than starting a transfer


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a shard. Their position in the sequence is a linear function of the device's number."""

    offset: int  # index in the shard of the chunk's first token
    size: int
    first: int  # its position in the sequence on device 0
    stride: int  # distance between its positions on two adjacent devices

    def position(self, device: Any) -> Any:
        """The position of the chunk's first token in the sequence, on this device or on each of several."""
        return self.first + self.stride * device


@dataclass(frozen=True)
class Range:
    """A part of a chunk; the chunk may differ between devices."""

    chunks: tuple[Chunk, ...]  # one per device
    start: int  # offset in the chunk
    size: int

    def starts(self, begin: int = 0) -> list[int]:
        """The offset of the part on each device, in an array that has the shard's tokens from `begin` on."""
        return [chunk.offset + self.start - begin for chunk in self.chunks]


@dataclass(frozen=True)
class Work:
    """One call of each device: a part of its queries with a part of the keys that it has at this distance.

    If `whole`, every row sees every key, on all devices. Each row has one call that is its `first`.
    """

    queries: Range
    keys: Range
    whole: bool
    first: bool = False


@dataclass(frozen=True)
class Visit:
    """The work of all devices at one distance.

    `size` tokens from `start` on of each shard of keys are sent, from source to destination for each pair of `route`.
    """

    distance: int
    work: tuple[Work, ...]
    start: int
    size: int
    route: tuple[tuple[int, int], ...]


def chunks(spec: AttentionSpec, ring: Ring, size: int) -> tuple[Chunk, ...]:
    """The chunks of a shard of `size` tokens: two in zigzag order, i and 2n − 1 − i; one where the order is contiguous
    or does not matter."""
    if ring.order == "contiguous" or not (spec.limited or _is_placed(spec)):
        return (Chunk(0, size, 0, size),)
    half = size // 2
    return Chunk(0, half, 0, half), Chunk(half, half, (2 * ring.size - 1) * half, -half)


def visits(
    spec: AttentionSpec,
    ring: Ring,
    queries: Sequence[Chunk],
    keys: Sequence[Chunk],
    shifts: tuple[int, int],
    halves: bool = False,
) -> list[Visit]:
    """The visits, beginning with a device's own keys. `shifts`: the least and the largest key that can be on the
    diagonal of the sequence's first query. With `halves` the first visit has two calls if shards are large and most of
    their keys are sent."""
    found = []
    for distance in range(1 if ring.whole else ring.size):
        run = distance == 0 and _is_run(spec, queries, keys, shifts)
        pairs = {
            (q, k): _Pair(spec, ring, distance, query, key, shifts)
            for q, query in enumerate([_run(queries)] if run else queries)
            for k, key in enumerate([_run(keys)] if run else keys)
        }
        needed = {qk: pair for qk, pair in pairs.items() if pair.seen.any()}
        if distance == 0:  # the place at which each query begins, even if it sees no key
            work = [pairs[q, k].whole_work(first=q == k) for q, k in pairs if (q, k) in needed or q == k]
        else:
            work = _balanced(needed, ring.size) or [pair.work() for pair in needed.values()]
        if work:
            found.append(_visit(distance, ring, keys, needed, work))
    own, *others = found
    if halves and len(own.work) == 1 and others and 2 * others[-1].size > own.size:
        found[0] = replace(own, work=_halved(spec, ring, own.work[0], shifts) or own.work)
    return found


def _is_run(
    spec: AttentionSpec, queries: Sequence[Chunk], keys: Sequence[Chunk], shifts: tuple[int, int]
) -> bool:
    """Whether a device's queries see its own keys as by a causal mask over the shard, although chunks of other devices
    lie between its own."""
    causal = spec.left == UNLIMITED and spec.right == 0 and shifts == (0, 0)
    return causal and tuple(queries) == tuple(keys) and not _is_placed(spec)


def _run(parts: Sequence[Chunk]) -> Chunk:
    """The chunks of a shard as one chunk, for a device's queries and its own keys. Its position has no meaning."""
    size = sum(part.size for part in parts)
    return Chunk(0, size, 0, size)


def _halved(spec: AttentionSpec, ring: Ring, work: Work, shifts: tuple[int, int]) -> tuple[Work, ...]:
    """Splits a call on a device's own keys into two, each with half of the queries; none if there are few, or if one
    sees nothing."""
    query, key = work.queries.chunks[0], work.keys.chunks[0]
    half = _to_tile(query.size // 2, query.size)
    parts = [
        replace(query, offset=query.offset + start, size=size, first=query.first + start)
        for start, size in ((0, half), (half, query.size - half))
    ]
    pairs = [_Pair(spec, ring, 0, part, key, shifts) for part in parts]
    few = query.size < HALVED or not all(pair.seen.all() for pair in pairs)
    return () if few else tuple(pair.work() for pair in pairs)


def _is_placed(spec: AttentionSpec) -> bool:
    """Whether an operand depends on the position in the sequence."""
    return not _PLACED.isdisjoint(spec.operands)


@dataclass(frozen=True)
class _Pair:
    """A chunk of queries, and a chunk of the keys at some distance."""

    spec: AttentionSpec
    ring: Ring
    distance: int
    query: Chunk
    key: Chunk
    shifts: tuple[int, int]

    @cached_property
    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """For each device, the least and the largest possible key on the diagonal of the chunk's first query."""
        query, key = self._first
        offset = query - key
        return offset + self.shifts[0], offset + self.shifts[1]

    @cached_property
    def _first(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of the first query and of the first key, on each device."""
        device = np.arange(self.ring.size)
        owner = (device - self.distance) % self.ring.size
        return self.query.position(device), self.key.position(owner)

    @cached_property
    def seen(self) -> np.ndarray:
        """Whether, on each device, any query may see any key."""
        least, largest = self.offsets
        seen = np.full(least.shape, self.query.size > 0 and self.key.size > 0)
        if self.spec.right != UNLIMITED:
            seen &= self.query.size - 1 + largest + self.spec.right >= 0
        if self.spec.left != UNLIMITED:
            seen &= least - self.spec.left <= self.key.size - 1
        if self.spec.reach.chunk != UNLIMITED:
            rows, keys = (
                self._chunks(part, first) for part, first in zip((self.query, self.key), self._first)
            )
            seen &= (rows[0] <= keys[1]) & (keys[0] <= rows[1])
        return seen

    def _chunks(self, part: Chunk, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last chunk of keys in which rows with the numbers of these tokens may see keys."""
        size = self.spec.reach.chunk
        return first // size, (first + part.size - 1) // size

    @cached_property
    def full(self) -> np.ndarray:
        """Whether, on each device, the band lets every query see every key."""
        if self.spec.window_is_data:
            return np.zeros_like(self.seen)
        least, largest = self.offsets
        full = self.seen.copy()
        if self.spec.right != UNLIMITED:
            full &= least + self.spec.right >= self.key.size - 1
        if self.spec.left != UNLIMITED:
            full &= self.query.size - 1 + largest - self.spec.left <= 0
        return full

    def whole_work(self, first: bool = False) -> Work:
        """The call of all queries and all keys."""
        queries, keys = (Range((part,) * self.ring.size, 0, part.size) for part in (self.query, self.key))
        return Work(queries, keys, bool(self.full.all()), first)

    def work(self) -> Work:
        """The call of the queries and the keys that the band reaches on any device."""
        least, largest = (x[self.seen] for x in self.offsets)
        work = self.whole_work()
        rows, columns = [0, self.query.size], [0, self.key.size]
        if self.spec.right != UNLIMITED:
            rows[0] = int(-(largest.max() + self.spec.right))
            columns[1] = int(self.query.size + largest.max() + self.spec.right)
        if self.spec.left != UNLIMITED:
            rows[1] = int(self.key.size + self.spec.left - least.min())
            columns[0] = int(least.min() - self.spec.left)
        return replace(work, queries=_cut(work.queries, *rows), keys=_cut(work.keys, *columns))


def _cut(whole: Range, start: int, stop: int) -> Range:
    """The part of a range from start to stop, within the range; whole tiles if the range consists of whole tiles."""
    start, stop = _to_tile(max(0, start), whole.size), min(whole.size, -_to_tile(-stop, whole.size))
    return replace(whole, start=start, size=stop - start)


def _to_tile(x: int, size: int) -> int:
    """The last tile boundary up to x, if `size` is a multiple of the tile."""
    step = 1 if size % _ALIGNMENT else _ALIGNMENT
    return x // step * step


def _balanced(needed: dict[tuple[int, int], _Pair], devices: int) -> list[Work]:
    """The same number of calls on every device, each with its own chunks; empty if that is impossible.

    In zigzag order with a causal mask every device needs two of the four pairs of chunks, but not the same ones.
    """
    chosen = [[qk for qk, pair in needed.items() if pair.seen[i]] for i in range(devices)]
    if len({len(pairs) for pairs in chosen}) > 1 or len(chosen[0]) == len(needed):
        return []
    if any((pair.seen & ~pair.full).any() for pair in needed.values()):
        return []
    some = next(iter(needed.values()))
    common = [qk for qk, pair in needed.items() if pair.seen.all()]
    for pairs in chosen:
        pairs.sort(key=lambda qk: qk not in common)
    return [
        Work(
            Range(tuple(needed[qk].query for qk in call), 0, some.query.size),
            Range(tuple(needed[qk].key for qk in call), 0, some.key.size),
            True,
        )
        for call in zip(*chosen)
    ]


def _visit(
    distance: int,
    ring: Ring,
    keys: Sequence[Chunk],
    needed: dict[tuple[int, int], _Pair],
    work: Sequence[Work],
) -> Visit:
    begins = [begin for call in work for begin in call.keys.starts()]
    ends = [begin + call.keys.size for call in work for begin in call.keys.starts()]
    receives = (
        np.any([pair.seen for pair in needed.values()], axis=0) if needed else np.zeros(ring.size, bool)
    )
    route = tuple(((int(i) - distance) % ring.size, int(i)) for i in np.flatnonzero(receives))
    start = min(begins) if distance else 0
    stop = max(ends) if distance else keys[-1].offset + keys[-1].size
    return Visit(distance, tuple(work), start, stop - start, route)
