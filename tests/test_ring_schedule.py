"""What the devices of a ring multiply and send: nothing that the mask hides everywhere, and equal work on each."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from programs import require_devices

from jax_flash import masks, ring_attention
from jax_flash.sequence import schedule as rules
from jax_flash.sequence.schedule import Visit, chunks, visits
from jax_flash.spec import ORDERS, UNLIMITED, AttentionSpec, Ring

N, SHARD = 4, 16  # devices, and tokens on each


def schedule(
    order: str,
    left: int = UNLIMITED,
    right: int = UNLIMITED,
    shard: int = SHARD,
    operands: tuple[str, ...] = (),
    halves: bool = False,
) -> list[Visit]:
    spec, ring = AttentionSpec("fixed", left, right, operands=operands), Ring(("ring",), N, order)
    parts = chunks(spec, ring, shard)
    return visits(spec, ring, parts, parts, (0, 0), halves)


def products(found: list[Visit], order: str, shard: int = SHARD, **band: int) -> np.ndarray:
    """How often each device's calls multiply each pair (query, key) of the sequence, `[N, tokens, tokens]`."""
    parts = chunks(AttentionSpec("fixed", **band), Ring(("ring",), N, order), shard)
    positions = [
        np.concatenate([part.position(i) + np.arange(part.size) for part in parts]) for i in range(N)
    ]
    counts = np.zeros((N, N * shard, N * shard), int)
    for visit in found:
        for work in visit.work:
            for i in range(N):
                rows = positions[i][work.queries.starts()[i] :][: work.queries.size]
                columns = positions[(i - visit.distance) % N][work.keys.starts()[i] :][: work.keys.size]
                counts[i][np.ix_(rows, columns)] += 1
    return counts


@pytest.fixture
def small_shards_are_halved(monkeypatch):
    monkeypatch.setattr(rules, "HALVED", 2)


BANDS = {
    "full": {},
    "causal": {"right": 0},
    "causal window": {"left": 5, "right": 0},
    "window": {"left": 20, "right": 3},
    "far to the right": {"right": 30},
}


@pytest.mark.usefixtures("small_shards_are_halved")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BANDS)
def test_every_visible_pair_is_multiplied_once(name, order):
    band = BANDS[name]
    row, column = np.indices((N * SHARD, N * SHARD))
    left, right = band.get("left", N * SHARD), band.get("right", N * SHARD)
    seen = (row - left <= column) & (column <= row + right)
    for options in ({}, {"operands": ("bias",)}, {"halves": True}):
        counts = products(schedule(order, **band, **options), order, **band).sum(0)
        assert (counts[seen] == 1).all()
        assert (counts <= 1).all()


def test_a_call_is_whole_only_where_every_row_sees_every_key_on_every_device():
    zigzag, contiguous = (schedule(order, right=0) for order in ("zigzag", "contiguous"))
    assert [[work.whole for work in visit.work] for visit in zigzag] == [[False]] + [[True] * 2] * 3
    by_position = schedule("zigzag", right=0, operands=("dropout",))
    assert [work.whole for work in by_position[0].work] == [False, True, False]
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


def test_a_backward_begins_and_ends_with_halves_of_a_devices_own_keys():
    """During the first half the first keys arrive, and during the second half the last gradients return."""
    shard = 2 * rules.HALVED
    for band, keys in (({}, (shard, shard)), ({"right": 0}, (rules.HALVED, shard))):
        own, *_ = schedule("contiguous", shard=shard, halves=True, **band)
        assert [(work.queries.starts()[0], work.queries.size) for work in own.work] == [
            (0, rules.HALVED),
            (rules.HALVED, rules.HALVED),
        ]
        assert tuple(work.keys.size for work in own.work) == keys
    for options in ({"shard": rules.HALVED - 1}, {"left": 5, "right": 0}):  # short shards; little to send
        own, *_ = schedule("contiguous", halves=True, **({"shard": shard} | options))
        assert len(own.work) == 1


# --- masks as values -------------------------------------------------------------------------------------------------


def transfers(mask: masks.Mask, order: str) -> int:
    """The collective permutations of a forward over four devices."""
    require_devices(N)
    mesh = Mesh(np.asarray(jax.devices()[:N]), ("x",))
    call = partial(ring_attention, axis_name="x", order=order, mask=mask, implementation="cpu")
    ring = jax.shard_map(call, mesh=mesh, in_specs=(P(None, "x"),) * 3, out_specs=P(None, "x"))
    x = jax.ShapeDtypeStruct((1, N * SHARD, 1, 16), np.float32)
    return jax.jit(ring).lower(x, x, x).as_text().count("stablehlo.collective_permute")


@pytest.mark.parametrize("order", ORDERS)
def test_keys_that_a_mask_is_known_to_hide_are_not_sent(order):
    everything = masks.ranges(np.zeros(SHARD, np.int32), np.full(SHARD, N * SHARD, np.int32))
    assert transfers(everything, order) == transfers(masks.prefix_lm(np.int32([9])), order) == N - 1
    few = {
        "chunks": (masks.chunked(SHARD // 2), 0),
        "chunks across shards": (masks.chunked(SHARD + 1), 1),
        "a window before the diagonal": (masks.causal(-1) & masks.window(4), 1),
        "either": (masks.chunked(SHARD) | masks.window(3, 2, -1), 2),
    }
    for name, (mask, wanted) in few.items():
        assert transfers(mask, order) == wanted or (order == "zigzag" and wanted), name
