"""Decode with the operand `ranges`: tiles that its rows do not see are skipped."""

from __future__ import annotations

from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_flash import flash_attention, masks, paged_attention

# Rows of ranges for decode: of one token each, over as many keys as fill many tiles, of which most are hidden.
SEEN = {
    "a window": lambda rng, n: (n - rng.integers(1, 120, n.shape), n),
    "the first keys": lambda rng, n: (0 * n, 0 * n + 40),
    "the first keys and a window": lambda rng, n: (0 * n, 0 * n + 5, n - 90, n),
    "some of the keys": lambda rng, n: (
        rng.integers(0, 400, n.shape),
        rng.integers(300, 700, n.shape),
        n - 3,
        n,
    ),
    "none": lambda rng, n: (n, 0 * n),
}


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("sequences", [3, 70])
@pytest.mark.parametrize("name", SEEN)
def test_decode_skips_the_tiles_that_ranges_hide(name, sequences, per_head, kernel):
    """Every way to split keys, in every layout, with sequences of which most see few of their keys."""
    checks.require(kernel, dtype="float32")
    rng = np.random.default_rng(sequences)
    heads, size, most = 4, 16, 90 if sequences > 3 else 700
    q = jnp.asarray(rng.standard_normal((sequences, 1, heads, 16)), jnp.float32)
    pages = -(-most // size)
    k, v = (jnp.asarray(rng.standard_normal((sequences * pages, size, 2, 16)), jnp.float32) for _ in "kv")
    tables = jnp.asarray(rng.permutation(sequences * pages).reshape(sequences, pages), jnp.int32)
    lengths = rng.integers(0, most + 1, sequences).astype(np.int32)
    lengths[0] = most
    rows = np.broadcast_to(lengths[:, None, None], (sequences, heads if per_head else 1, 1))
    limits = [jnp.asarray(x, jnp.int32) for x in SEEN[name](rng, rows)]
    mask = (
        masks.ranges(*limits[:2]) | masks.ranges(*limits[2:]) if len(limits) == 4 else masks.ranges(*limits)
    )
    keys, values = (x[tables].reshape(sequences, pages * size, 2, 16) for x in (k, v))
    wanted = flash_attention(q, keys, values, kv_lengths=lengths, mask=mask, implementation="xla")

    def compare(got):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)

    compare(flash_attention(q, keys, values, kv_lengths=lengths, mask=mask, implementation=kernel))
    for options in ({}, {"num_splits": 3}, {"batch_invariant": True}):
        call = partial(paged_attention, implementation=kernel, **options)
        compare(call(q, k, v, tables, lengths, mask=mask))
    packed = jax.tree.map(lambda x: x[..., 0].T[:, None].reshape(x.shape[1], -1), mask)
    starts = jnp.arange(sequences + 1, dtype=jnp.int32)
    out = paged_attention(
        q[:, 0], k, v, tables, lengths, cu_seqlens_q=starts, mask=packed, implementation=kernel
    )
    compare(out[:, None])


@pytest.mark.parametrize("first", [0, 60])
@pytest.mark.parametrize("tokens", [1, 3])
def test_nan_in_tiles_that_decode_skips_reaches_no_row(tokens, first, kernel):
    if first:
        checks.require_skipped_tiles(kernel)
    checks.require(kernel)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, 16)), jnp.bfloat16) for n in (tokens, 2048, 2048))
    rows = 2048 - tokens + np.arange(tokens)
    begins = jnp.asarray(rows - np.array([300, 5])[:, None, None], jnp.int32)
    mask = masks.ranges(begins, rows + 1)
    if first:
        mask |= masks.ranges(0 * begins, 0 * begins + first)
    at = np.arange(2048)
    seen = (at >= begins[:, 0, :, None]) & (at <= rows[:, None]) | (at < first)
    wanted = oracle.plain_outs(q, k, v, np.asarray(seen))
    k, v = (x.at[:, 256 if first else 0 : 1500].set(jnp.nan) for x in (k, v))
    pages = [x.reshape(256, 16, 2, 16) for x in (k, v)]
    tables = jnp.arange(256, dtype=jnp.int32).reshape(2, 128)
    paged = partial(
        paged_attention, q, *pages, tables, np.array([2048, 2048]), mask=mask, implementation=kernel
    )
    calls = [partial(flash_attention, q, k, v, mask=mask, implementation=kernel), paged]
    for out in (*(call() for call in calls), paged(num_splits=3), paged(batch_invariant=True)):
        oracle.assert_out(np.asarray(out), *wanted)
