"""Which queries each device multiplies by which keys, and when: known while tracing, so that keys which no query sees
are neither multiplied nor sent.

Device i computes the results of its own queries. At distance t it takes the keys of device (i − t) mod n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..spec import UNLIMITED, AttentionSpec, Ring

# What goes by the position in the sequence.
_PLACED = {"q_lengths", "kv_lengths", "mask", "bias", "alibi_slopes", "dropout", "ranges", "block_mask"}
_ALIGNMENT = 64  # of cuts: kernels load whole tiles
HALVED = 4096  # queries of a shard from which on half of them take longer than a transfer is started


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a shard, whose position in the sequence is linear in the number of the device."""

    offset: int  # of the chunk in the shard
    size: int
    first: int  # its position in the sequence on device 0
    stride: int  # from one device to the next

    def position(self, device: Any) -> Any:
        """Where the chunk begins in the sequence, on this device or on these."""
        return self.first + self.stride * device


@dataclass(frozen=True)
class Range:
    """A part of one chunk, each device's own."""

    chunks: tuple[Chunk, ...]  # one for each device
    start: int  # in the chunk
    size: int

    def starts(self, begin: int = 0) -> list[int]:
        """Where the part begins on each device, in an array that has the shard's tokens from `begin` on."""
        return [chunk.offset + self.start - begin for chunk in self.chunks]


@dataclass(frozen=True)
class Work:
    """One call of each device: a part of its queries by a part of the keys that it has at this distance.

    Where `whole`, every row sees every key, on all devices. One call of each row is its `first`.
    """

    queries: Range
    keys: Range
    whole: bool
    first: bool = False


@dataclass(frozen=True)
class Visit:
    """What the devices do at one distance.

    The tokens from `start` on, `size` of them, travel of each shard of keys, over the pairs (source, destination).
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
    """The visits, beginning with a device's own keys. `shifts` are the least and the largest possible key on the
    diagonal of the sequence's first query. With `halves` the first visit has two calls, where shards are large and most
    of their keys travel."""
    found = []
    for distance in range(ring.size):
        run = distance == 0 and _is_run(spec, queries, keys, shifts)
        pairs = {
            (q, k): _Pair(spec, ring, distance, query, key, shifts)
            for q, query in enumerate([_run(queries)] if run else queries)
            for k, key in enumerate([_run(keys)] if run else keys)
        }
        needed = {qk: pair for qk, pair in pairs.items() if pair.seen.any()}
        if distance == 0:  # where each query begins, whether it sees a key or not
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
    """Whether what a device's queries see of its own keys is a causal mask of the shard, although chunks of others lie
    in between."""
    causal = spec.left == UNLIMITED and spec.right == 0 and shifts == (0, 0)
    return causal and tuple(queries) == tuple(keys) and not _is_placed(spec)


def _run(parts: Sequence[Chunk]) -> Chunk:
    """Chunks of a shard as one; only its distance to itself has a meaning."""
    size = sum(part.size for part in parts)
    return Chunk(0, size, 0, size)


def _halved(spec: AttentionSpec, ring: Ring, work: Work, shifts: tuple[int, int]) -> tuple[Work, ...]:
    """A call on a device's own keys as two, each of half of the queries; none where these are few or see nothing."""
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
    """Whether an operand goes by the position in the sequence."""
    return not _PLACED.isdisjoint(spec.operands)


@dataclass(frozen=True)
class _Pair:
    """A chunk of queries and a chunk of the keys at a distance."""

    spec: AttentionSpec
    ring: Ring
    distance: int
    query: Chunk
    key: Chunk
    shifts: tuple[int, int]

    @cached_property
    def offsets(self) -> tuple[np.ndarray, np.ndarray]:
        """For each device, the least and the largest possible key on the diagonal of the chunk's first query."""
        device = np.arange(self.ring.size)
        owner = (device - self.distance) % self.ring.size
        offset = self.query.position(device) - self.key.position(owner)
        return offset + self.shifts[0], offset + self.shifts[1]

    @cached_property
    def seen(self) -> np.ndarray:
        """Whether, on each device, any query may see any key."""
        least, largest = self.offsets
        seen = np.full(least.shape, self.query.size > 0 and self.key.size > 0)
        if self.spec.right != UNLIMITED:
            seen &= self.query.size - 1 + largest + self.spec.right >= 0
        if self.spec.left != UNLIMITED:
            seen &= least - self.spec.left <= self.key.size - 1
        return seen

    @cached_property
    def full(self) -> np.ndarray:
        """Whether, on each device, every query sees every key of the band."""
        least, largest = self.offsets
        full = self.seen.copy()
        if self.spec.right != UNLIMITED:
            full &= least + self.spec.right >= self.key.size - 1
        if self.spec.left != UNLIMITED:
            full &= self.query.size - 1 + largest - self.spec.left <= 0
        return full

    def whole_work(self, first: bool = False) -> Work:
        """All queries by all keys."""
        queries, keys = (Range((part,) * self.ring.size, 0, part.size) for part in (self.query, self.key))
        return Work(queries, keys, bool(self.full.all()), first)

    def work(self) -> Work:
        """The queries and the keys that the band reaches on any device."""
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
    """The part of a range from start to stop, as far as there is; whole tiles where the range is of whole tiles."""
    start, stop = _to_tile(max(0, start), whole.size), min(whole.size, -_to_tile(-stop, whole.size))
    return replace(whole, start=start, size=stop - start)


def _to_tile(x: int, size: int) -> int:
    """The last beginning of a tile up to x, where the whole is of whole tiles."""
    step = 1 if size % _ALIGNMENT else _ALIGNMENT
    return x // step * step


def _balanced(needed: dict[tuple[int, int], _Pair], devices: int) -> list[Work]:
    """The same number of calls on every device, each with chunks of its own choice; none where that cannot be.

    In zigzag order with a causal mask every device needs two of the four pairs of chunks, though not the same ones.
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
