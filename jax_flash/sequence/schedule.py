"""Which shards of keys each device needs, known while tracing: steps and transfers beyond the band do not exist.

Device i computes the results of its own queries. At distance t it needs the keys of device (i − t) mod n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..spec import UNLIMITED, AttentionSpec, Ring

_WHERE_IT_MATTERS = ("q_lengths", "kv_lengths", "mask", "bias", "alibi_slopes", "dropout")


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
class Visit:
    """What all devices do at one distance.

    `pairs` are the chunks of queries and of keys that some device must multiply. `routes[k]` are the pairs (source,
    destination) of devices over which the chunk k of keys travels.
    """

    distance: int
    pairs: tuple[tuple[int, int], ...]
    routes: tuple[tuple[tuple[int, int], ...], ...]


def chunks(spec: AttentionSpec, ring: Ring, size: int) -> tuple[Chunk, ...]:
    """The chunks of a shard of `size` tokens: two in zigzag order, i and 2n − 1 − i, one where positions are in order
    or do not matter."""
    placed = spec.limited or any(name in spec.operands for name in _WHERE_IT_MATTERS)
    if ring.order == "contiguous" or not placed:
        return (Chunk(0, size, 0, size),)
    half = size // 2
    return Chunk(0, half, 0, half), Chunk(half, half, (2 * ring.size - 1) * half, -half)


def visits(
    spec: AttentionSpec, ring: Ring, queries: Sequence[Chunk], keys: Sequence[Chunk], shifts: tuple[int, int]
) -> list[Visit]:
    """The visits, beginning with a device's own keys. `shifts` are the least and the largest possible key on the
    diagonal of the sequence's first query."""
    device = np.arange(ring.size)
    found = []
    for distance in range(ring.size):
        owner = (device - distance) % ring.size
        needed = {
            (q, k): _sees(spec, query, query.position(device), key, key.position(owner), shifts)
            for q, query in enumerate(queries)
            for k, key in enumerate(keys)
        }
        pairs = tuple(
            pair for pair, by in needed.items() if by.any() or (distance == 0 and pair[0] == pair[1])
        )
        if pairs:
            by_key = [
                np.any([needed[pair] for pair in pairs if pair[1] == k], axis=0) for k in range(len(keys))
            ]
            routes = tuple(
                tuple((int(owner[i]), int(i)) for i in device[np.broadcast_to(by, device.shape)])
                for by in by_key
            )
            found.append(Visit(distance, pairs, routes))
    return found


def _sees(
    spec: AttentionSpec,
    query: Chunk,
    row: np.ndarray,
    key: Chunk,
    column: np.ndarray,
    shifts: tuple[int, int],
) -> np.ndarray:
    """Whether, on each device, any row of the queries at `row` may see any of the keys at `column`."""
    seen = np.full(row.shape, query.size > 0 and key.size > 0)
    if spec.right != UNLIMITED:
        seen &= column <= row + query.size - 1 + shifts[1] + spec.right
    if spec.left != UNLIMITED:
        seen &= column + key.size - 1 >= row + shifts[0] - spec.left
    return seen
