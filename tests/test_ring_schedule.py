"""What each device of a ring multiplies and sends: nothing that the mask hides from all, and the same work for all."""

from __future__ import annotations

import numpy as np
import pytest

from jax_flash.sequence.schedule import Visit, chunks, visits
from jax_flash.spec import ORDERS, UNLIMITED, AttentionSpec, Ring

N, SHARD = 4, 16  # devices, and tokens on each


def schedule(order: str, left: int = UNLIMITED, right: int = UNLIMITED, shard: int = SHARD) -> list[Visit]:
    spec, ring = AttentionSpec("fixed", left, right), Ring(("ring",), N, order)
    parts = chunks(spec, ring, shard)
    return visits(spec, ring, parts, parts, (0, 0))


def products(found: list[Visit], order: str, shard: int = SHARD, **band: int) -> np.ndarray:
    """How often each device's calls multiply each pair (query, key) of the sequence, `[N, tokens, tokens]`."""
    parts = chunks(AttentionSpec("fixed", **band), Ring(("ring",), N, order), shard)
    counts = np.zeros((N, N * shard, N * shard), int)
    for visit in found:
        for work in visit.work:
            for i in range(N):
                row = parts[work.queries.chunk[i]].position(i) + work.queries.start
                column = parts[work.keys.chunk[i]].position((i - visit.distance) % N) + work.keys.start
                counts[i, row : row + work.queries.size, column : column + work.keys.size] += 1
    return counts


BANDS = {
    "full": {},
    "causal": {"right": 0},
    "causal window": {"left": 5, "right": 0},
    "window": {"left": 20, "right": 3},
    "far to the right": {"right": 30},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BANDS)
def test_every_visible_pair_is_multiplied_once(name, order):
    band = BANDS[name]
    row, column = np.indices((N * SHARD, N * SHARD))
    left, right = band.get("left", N * SHARD), band.get("right", N * SHARD)
    seen = (row - left <= column) & (column <= row + right)
    counts = products(schedule(order, **band), order, **band).sum(0)
    assert (counts[seen] == 1).all()
    assert (counts <= 1).all()


def test_a_call_is_whole_only_where_every_row_sees_every_key_on_every_device():
    zigzag, contiguous = (schedule(order, right=0) for order in ("zigzag", "contiguous"))
    assert [[work.whole for work in visit.work] for visit in zigzag] == [[False, True, False]] + [
        [True] * 2
    ] * 3
    assert not any(work.whole for visit in contiguous for work in visit.work)
    assert all(work.whole for visit in schedule("contiguous") for work in visit.work)


def test_zigzag_gives_all_devices_the_same_causal_work():
    row, column = np.indices((N * SHARD, N * SHARD))
    for order, spread in (("zigzag", 1.0), ("contiguous", 7.0)):
        work = (products(schedule(order, right=0), order, right=0) * (column <= row)).sum((1, 2))
        assert work.max() / work.min() == pytest.approx(spread, rel=0.2)


def test_a_window_reaches_into_one_neighbour_and_takes_the_end_of_its_shard():
    own, neighbour = schedule("contiguous", left=5, right=0)
    assert (own.distance, own.start, own.size) == (0, 0, SHARD)
    assert (neighbour.distance, neighbour.start, neighbour.size) == (1, SHARD - 5, 5)
    (work,) = neighbour.work
    assert (work.queries.start, work.queries.size) == (0, 5)
    assert neighbour.route == ((0, 1), (1, 2), (2, 3))  # the first device has nothing before it


def test_cuts_are_whole_tiles_where_shards_are():
    _, neighbour = schedule("contiguous", left=100, right=0, shard=256)
    assert (neighbour.start, neighbour.size) == (128, 128)
