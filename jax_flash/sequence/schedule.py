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

_PLACED = ("q_lengths", "kv_lengths", "mask", "bias", "alibi_slopes", "dropout")  # what goes by positions
_ALIGNMENT = 64  # of cuts: kernels load whole tiles

Table = tuple[int, ...]  # one number for each device


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
    """A part of one chunk: on each device of the chunk that the table names."""

    chunk: Table
    start: int  # in the chunk
    size: int


@dataclass(frozen=True)
class Work:
    """One call of each device: a part of its queries by a part of the keys that it has at this distance.

    Where `whole`, every row sees every key, on all devices.
    """

    queries: Range
    keys: Range
    whole: bool


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
    placed = spec.limited or any(name in spec.operands for name in _PLACED)
    if ring.order == "contiguous" or not placed:
        return (Chunk(0, size, 0, size),)
    half = size // 2
    return Chunk(0, half, 0, half), Chunk(half, half, (2 * ring.size - 1) * half, -half)


def visits(
    spec: AttentionSpec, ring: Ring, queries: Sequence[Chunk], keys: Sequence[Chunk], shifts: tuple[int, int]
) -> list[Visit]:
    """The visits, beginning with a device's own keys. `shifts` are the least and the largest possible key on the
    diagonal of the sequence's first query."""
    found = []
    for distance in range(ring.size):
        pairs = {
            (q, k): _Pair(spec, ring, distance, query, key, shifts)
            for q, query in enumerate(queries)
            for k, key in enumerate(keys)
        }
        needed = {qk: pair for qk, pair in pairs.items() if pair.seen.any()}
        if distance == 0:  # where each query begins, whether it sees a key or not
            work = [pairs[qk].whole_work(*qk) for qk in pairs if qk in needed or qk[0] == qk[1]]
        else:
            work = _balanced(needed, ring.size) or [pair.work(*qk) for qk, pair in needed.items()]
        if work:
            found.append(_visit(distance, ring, keys, needed, work))
    return found


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

    def whole_work(self, q: int, k: int) -> Work:
        """All queries by all keys."""
        devices = self.ring.size
        queries, keys = (
            Range((c,) * devices, 0, chunk.size) for c, chunk in ((q, self.query), (k, self.key))
        )
        return Work(queries, keys, bool(self.full.all()))

    def work(self, q: int, k: int) -> Work:
        """The queries and the keys that the band reaches on any device."""
        least, largest = (x[self.seen] for x in self.offsets)
        work = self.whole_work(q, k)
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
    step = 1 if whole.size % _ALIGNMENT else _ALIGNMENT
    start, stop = max(0, start) // step * step, min(whole.size, -(-stop // step) * step)
    return replace(whole, start=start, size=stop - start)


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
            Range(tuple(q for q, _ in call), 0, some.query.size),
            Range(tuple(k for _, k in call), 0, some.key.size),
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
    begins = [keys[c].offset + call.keys.start for call in work for c in call.keys.chunk]
    ends = [
        begin + call.keys.size
        for begin, call in zip(begins, (call for call in work for _ in call.keys.chunk))
    ]
    receives = (
        np.any([pair.seen for pair in needed.values()], axis=0) if needed else np.zeros(ring.size, bool)
    )
    route = tuple(((int(i) - distance) % ring.size, int(i)) for i in np.flatnonzero(receives))
    start = min(begins) if distance else 0
    stop = max(ends) if distance else keys[-1].offset + keys[-1].size
    return Visit(distance, tuple(work), start, stop - start, route)
