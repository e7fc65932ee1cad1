"""The keys of a sequence over pages in parts: any number of them is right, and the same call has the same bits."""

from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import Case, varlen
from conftest import IMPLEMENTATION
from pages import paged, require
from test_paged import MIXED, by_name

from jax_flash import merge_attention, paged_attention

LONG = Case("long", b=3, sq=1, sk=900, kv_lengths=(900, 10, 3), hq=4, hk=2)


# Long enough, and enough of them, for sm_90a to attend them in clusters of CTAs where it finds them about equal.
MANY = Case(
    "equal", b=15, sq=1, sk=2304, kv_lengths=(2304,) * 15, hq=8, hk=4, d=128, dv=128, dtype="bfloat16"
)


@pytest.mark.parametrize("size", [1, 16, 64])
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


@pytest.mark.parametrize("splits", [1, 2, 3, 4, 5, 6, 7, 10**6])
@by_name([LONG.replace(sinks=True, window=(700, 0)), MIXED.replace(causal=True, softcap=2.0)])
def test_any_number_of_splits_is_right(case, splits):
    pages.check(paged(case, 16), IMPLEMENTATION, num_splits=splits)


# In one part, these have as many tiles as CUDA's decode looks the table up further ahead for.
WHOLE = Case(
    "whole", b=3, sq=1, sk=2500, kv_lengths=(2500, 40, 2100), hq=4, hk=2, d=128, dv=128, dtype="float16"
)


@pytest.mark.parametrize("size", [1, 16, 48])
@by_name(
    [
        WHOLE,
        WHOLE.replace(name="whole in a window", window=(2200, 0), sinks=True),
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
    """Lengths that are split otherwise where it is not asked for, decode and prefill."""
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


def test_repeated_calls_give_the_same_bits(kernel):
    require(kernel)
    call = paged(LONG.replace(sk=2000, kv_lengths=(2000, 1900, 3)), 16)
    first = call.call(kernel)({})
    for _ in range(3):
        for x, y in zip(call.call(kernel)({}), first, strict=True):
            assert np.array_equal(x, y)


def test_parts_of_a_sequence_merge_to_the_whole(implementation):
    """Two calls over halves of the table; the sinks on one of them."""
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
