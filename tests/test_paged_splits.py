"""The keys of a sequence in several parts: any number of parts gives the right result, and a call repeats its bits."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import Case, varlen
from conftest import IMPLEMENTATION
from jax import lax
from pages import paged, require
from test_paged import MIXED, by_name

from jax_flash import merge_attention, paged_attention

LONG = Case("long", b=3, sq=1, sk=900, kv_lengths=(900, 10, 3), hq=4, hk=2)


# Long and numerous enough for sm_90a to run clusters of CTAs, if it finds the lengths about equal.
MANY = Case(
    "equal", b=15, sq=1, sk=2304, kv_lengths=(2304,) * 15, hq=8, hk=4, d=128, dv=128, dtype="bfloat16"
)


@pytest.mark.parametrize("size", [1, 16, 64] if IMPLEMENTATION == "cuda" else [16])
@by_name(
    [
        MANY,
        MANY.replace(name="nearly equal", kv_lengths=tuple(range(2290, 2305)), sinks=True),
        MANY.replace(name="unequal", kv_lengths=(2304, 0, 1, 700, *(2304,) * 11)),
        MANY.replace(name="one shorter", kv_lengths=(*(2304,) * 14, 2000)),
        MANY.replace(name="equal in a window", window=(2200, 0), hq=64),
    ]
)
def test_many_long_sequences_of_equal_lengths_or_not(case, size):
    pages.check(paged(case, size), IMPLEMENTATION)


STEPS = varlen(
    "packed", (1,) * 15, k_sequences=MANY.kv_lengths, causal=True, hq=8, hk=4, d=128, dv=128, dtype="bfloat16"
)


@pytest.mark.parametrize("size", [1, 16, 64] if IMPLEMENTATION == "cuda" else [16])
@by_name(
    [
        STEPS,
        STEPS.replace(name="packed, a prompt", q_sequences=(1,) * 7 + (40,) + (1,) * 7, sinks=True),
        STEPS.replace(name="packed, unequal", k_sequences=(2304, 1, 700, *(2304,) * 12)),
        STEPS.replace(
            name="packed, a few tokens", q_sequences=(0, 1, 2, 3, 4, 5) * 2, k_sequences=(300,) * 12
        ),
        STEPS.replace(name="packed, d 64", k_sequences=(513,) * 15, d=64, dv=64, dtype="float16"),
        STEPS.replace(
            name="packed, d 256, a window", k_sequences=(1100,) * 15, d=256, dv=256, window=(500, 0)
        ),
    ]
)
def test_packed_steps_of_equal_lengths_or_not(case, size):
    """Short sequences run in clusters, too, and the forward those with more tokens."""
    pages.check(paged(case, size), IMPLEMENTATION)


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 5, 6, 7, 10**6])
@by_name([LONG.replace(sinks="token", window=(700, 0)), MIXED.replace(causal=True, softcap=2.0)])
def test_any_number_of_splits_is_right(case, splits):
    pages.check(paged(case, 16), IMPLEMENTATION, num_splits=splits)


# One part has many tiles here, for which CUDA's decode prefetches the table further ahead.
WHOLE = Case(
    "whole", b=3, sq=1, sk=2500, kv_lengths=(2500, 40, 2100), hq=4, hk=2, d=128, dv=128, dtype="float16"
)


@pytest.mark.parametrize("size", [1, 16, 48])
@by_name(
    [
        WHOLE,
        WHOLE.replace(name="whole in a window", window=(2200, 0), sinks="token"),
        WHOLE.replace(name="whole, d 64", sk=4300, kv_lengths=(4300, 0, 4097), d=64, dv=64),
        WHOLE.replace(name="whole, softcap", softcap=5.0, hq=24),
    ]
)
def test_long_sequences_in_one_part(case, size):
    pages.check(paged(case, size), IMPLEMENTATION, num_splits=1)


def test_splits_combine_scores_of_any_size(implementation):
    """Scores of ±10,000: the parts are joined by their maxima, not by sums that overflow."""
    require(implementation)
    pool = jnp.asarray([[100.0], [-100.0], [99.0], [0.0]])[:, :, None, None] * jnp.ones((4, 1, 1, 16))
    q = jnp.full((1, 1, 1, 16), 25.0)
    tables, lengths = jnp.arange(4, dtype=jnp.int32)[None], jnp.full(1, 4, jnp.int32)
    for splits in (1, 2, 3, 4):
        out, lse = paged_attention(
            q, pool, pool, tables, lengths, num_splits=splits, return_lse=True, implementation=implementation
        )
        np.testing.assert_allclose(out, 100.0, rtol=1e-6)
        np.testing.assert_allclose(lse, 10_000.0, rtol=1e-6)


def test_batch_invariant_is_the_same_bits_alone_and_in_company(kernel):
    """Without batch_invariant these lengths would be split otherwise. Both decode and prefill."""
    require(kernel)
    lengths = (2600, 40, 2100, 1, 1024)
    case = varlen("invariant", (1, 3, 12, 1, 2), k_sequences=lengths, causal=True, hq=4, hk=1)
    call = paged(case, 64)
    out, lse = map(np.asarray, call.call(kernel, batch_invariant=True)({}))
    starts = np.concatenate([[0], np.cumsum(case.q_sequences)])
    for z, (begin, end) in enumerate(pairwise(starts)):
        alone = {name: call.arrays[name][z : z + 1] for name in ("block_tables", "kv_lengths")}
        alone |= {
            "query": call.arrays["query"][begin:end],
            "cu_seqlens_q": jnp.asarray([0, end - begin], jnp.int32),
        }
        one = call.call(kernel, batch_invariant=True)(alone)
        every = np.ones(end - begin, bool)
        pages.assert_same_rows(every, one, (out[begin:end], lse[:, begin:end]), f"with sequence {z} alone")


@dataclass(frozen=True)
class Request:
    """A sequence: its query [s, hq, d] and its keys and values [length, hk, d]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


@dataclass(frozen=True)
class Around:
    """The things that a request's bits must not depend on. before, after: (new tokens, length) of other requests."""

    before: tuple[tuple[int, int], ...] = ()
    after: tuple[tuple[int, int], ...] = ()
    page_size: int = 16
    more_columns: int = 0  # of the block tables
    more_pages: int = 0  # of the pool
    order: int | None = None  # the seed of the order of pages; None: ascending


AROUND = {
    "wider tables": Around(more_columns=35),
    "far wider tables": Around(more_columns=4000),
    "another order of pages": Around(order=1),
    "a larger pool": Around(more_pages=300, order=2),
    "pages of 8": Around(page_size=8),
    "pages of 64": Around(page_size=64),
    "first of several": Around(after=((1, 3000), (5, 40))),
    "last of many": Around(before=((1, 1),) * 40 + ((30, 90),)),
    "between others, all else changed": Around(((7, 1500), (1, 0)), ((1, 90),) * 20, 32, 9, 50, 3),
    # Page sizes that no TMA box divides have a separate kernel on CUDA.
    "pages of 1": Around(page_size=1),
    "pages of 12": Around(page_size=12),
}
PAGE_SIZES_OF_TWO_KERNELS = ("pages of 1", "pages of 12")


def request(rng: np.random.Generator, tokens: int, length: int, heads: tuple[int, int], d: int) -> Request:
    hq, hk = heads
    shapes = ((tokens, hq, d), (length, hk, d), (length, hk, d))
    return Request(*(rng.standard_normal(shape, np.float32) for shape in shapes))


def attend(one: Request, around: Around, dtype: str, packed: bool, kernel: str, **options: Any) -> Any:
    """out and lse of a request among others. Unless queries are packed, all requests have equally many tokens."""
    rng = np.random.default_rng(99)
    heads, tokens = (one.query.shape[1], one.key.shape[1]), one.query.shape[0]
    others = [
        [request(rng, s if packed else tokens, length, heads, one.query.shape[2]) for s, length in side]
        for side in (around.before, around.after)
    ]
    requests = [*others[0], one, *others[1]]
    size = around.page_size
    used = [-(-len(r.key) // size) for r in requests]
    pool = np.arange(sum(used) + around.more_pages)
    if around.order is not None:
        pool = np.random.default_rng(around.order).permutation(pool)
    tables = np.full((len(requests), max(used) + around.more_columns), -1, np.int32)
    pools = {
        name: np.full((len(pool), size, heads[1], one.query.shape[2]), np.nan, np.float32)
        for name in ("key", "value")
    }
    next_page = 0
    for z, r in enumerate(requests):
        tables[z, : used[z]] = pool[next_page : next_page + used[z]]
        next_page += used[z]
        for name, pages_of in pools.items():
            for i, page in enumerate(tables[z, : used[z]]):
                rows = getattr(r, name)[i * size : (i + 1) * size]
                pages_of[page, : len(rows)] = rows
    queries = [r.query for r in requests]
    starts = np.concatenate([[0], np.cumsum([len(q) for q in queries])])
    out, lse = paged_attention(
        jnp.asarray(np.concatenate(queries) if packed else np.stack(queries), dtype),
        jnp.asarray(pools["key"], dtype), jnp.asarray(pools["value"], dtype), jnp.asarray(tables),
        jnp.asarray([len(r.key) for r in requests], jnp.int32),
        cu_seqlens_q=jnp.asarray(starts, jnp.int32) if packed else None,
        causal=True, batch_invariant=True, return_lse=True, implementation=kernel, **options,
    )  # fmt: skip
    z = len(around.before)
    if not packed:
        return np.asarray(out[z]), np.asarray(lse[z])
    return np.asarray(out[starts[z] : starts[z + 1]]), np.asarray(lse[:, starts[z] : starts[z + 1]])


@cache
def alone(
    tokens: int, length: int, dtype: str, packed: bool, kernel: str
) -> tuple[Request, tuple[np.ndarray, ...]]:
    """A request, and its out and lse in a call of its own."""
    one = request(np.random.default_rng(0), tokens, length, (4, 2), 64)
    return one, attend(one, Around(), dtype, packed, kernel)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("tokens", "length"), [(1, 17), (1, 2600), (3, 130), (40, 100), (70, 1100)])
def test_batch_invariant_is_a_matter_of_the_sequence_alone(tokens, length, dtype, around, packed, kernel):
    case = Case("invariant", dtype=dtype, d=64, dv=64)
    require(kernel, case)
    if kernel == "cuda" and around in PAGE_SIZES_OF_TWO_KERNELS and tokens > 3:
        pytest.skip("the Hopper forward takes pages of multiples of 8")
    one, wanted = alone(tokens, length, dtype, packed, kernel)
    got = attend(one, AROUND[around], dtype, packed, kernel)
    for name, x, y in zip(("out", "lse"), got, wanted, strict=True):
        assert x.tobytes() == y.tobytes(), (
            f"{name} has other bits: by {np.abs(np.float32(x) - np.float32(y)).max()}"
        )


def test_batch_invariant_does_not_depend_on_the_tiles_of_queries_that_run_together(kernel):
    """The CPU's threads take ranges of tiles, which other sequences move. Groups of 5 heads leave the last block of a
    tile longer than the tile, and row 155 is the last of a tile that sees 512 keys, the size of a tile of keys.
    """
    require(kernel, Case("groups", d=8, dv=8))
    tokens, keys, most = 200, 200 + 356, 4000  # tiles have 12 or 13 tokens, and 12 · 13 + 356 = 512
    rng = np.random.default_rng(0)
    own = jnp.asarray(rng.standard_normal((tokens, 5, 8)), jnp.float32)
    pool = jnp.asarray(rng.standard_normal((64, 32, 1, 8)), jnp.float32)
    tables = jnp.asarray(rng.integers(0, 64, (3, 125)), jnp.int32).at[1].set(jnp.arange(125) % 64)

    @jax.jit
    def among(before, after):
        query = lax.dynamic_update_slice(jnp.ones((tokens + most, 5, 8)), own, (before, 0, 0))
        out, lse = paged_attention(
            query, pool, pool, tables, jnp.stack([before, keys, after]),
            cu_seqlens_q=jnp.cumsum(jnp.stack([0, before, tokens, after]), dtype=jnp.int32),
            causal=True, batch_invariant=True, return_lse=True, implementation=kernel,
        )  # fmt: skip
        return lax.dynamic_slice_in_dim(out, before, tokens), lax.dynamic_slice_in_dim(lse, before, tokens, 1)

    wanted = among(0, 0)
    for before, after in [(300, 0), (1000, 0), (most, 0), *((0, n) for n in range(100, 1200, 50))]:
        every = np.ones(tokens, bool)
        pages.assert_same_rows(every, among(before, after), wanted, f"among {before} and {after} tokens")


def test_repeated_calls_give_the_same_bits(kernel):
    require(kernel)
    call = paged(LONG.replace(sk=2000, kv_lengths=(2000, 1900, 3)), 16)
    first = call.call(kernel)({})
    for _ in range(3):
        for x, y in zip(call.call(kernel)({}), first, strict=True):
            assert np.array_equal(x, y)


def test_parts_of_a_sequence_merge_to_the_whole(implementation):
    """Two calls attend to the two halves of the table; one of them has the sinks."""
    require(implementation)
    call = paged(Case("halves", b=2, sq=1, sk=32, sinks=True), 8)
    tables = call.arrays["block_tables"][:, :4]
    lengths = jnp.full(2, 16, jnp.int32)
    sinks = call.arrays.pop("sinks")
    run = call.call(implementation)
    parts = [
        run({"block_tables": tables[:, :2], "kv_lengths": lengths, "sinks": sinks}),
        run({"block_tables": tables[:, 2:], "kv_lengths": lengths}),
    ]
    out, lse = merge_attention(*map(list, zip(*parts, strict=True)))
    whole = run({"sinks": sinks})
    np.testing.assert_allclose(out, whole[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, whole[1], rtol=1e-5, atol=1e-5)
