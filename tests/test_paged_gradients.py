"""Gradients of paged_attention: query, pools and sinks, pages shared and missing."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pages
import pytest
from cases import Case
from conftest import IMPLEMENTATION
from pages import FLOAT8, paged, require
from test_paged import CHUNK, MIXED, by_name

from jax_flash import paged_attention


@by_name(
    [
        CHUNK.replace(causal=True, sinks=True, hq=16, hk=2),
        MIXED.replace(causal=True, softcap=2.0),
        MIXED.replace(name="window", window=(3, 2), alibi_slopes=(5, 4)),
    ]
)
def test_gradients_of_query_pools_and_sinks(case):
    pages.check(paged(case, 5), IMPLEMENTATION, gradients=True)


def test_gradients_in_plain_jax():
    case = MIXED.replace(causal=True, softcap=2.0, sinks="token", hq=16, hk=2)
    pages.check(paged(case, 5, "hnd"), "xla", gradients=True)


def test_gradients_in_16_bit():
    pages.check(paged(MIXED.replace(causal=True, dtype="bfloat16"), 4, "hnd"), IMPLEMENTATION, gradients=True)


@pytest.mark.parametrize("float8", FLOAT8)
def test_float8_pools_have_no_gradient_but_the_query_has(float8):
    pages.check(paged(CHUNK.replace(causal=True), 4, "nhd", float8), IMPLEMENTATION, gradients=True)


def test_repeatable_gradients_of_16_bit_queries_over_float8_pools():
    case = CHUNK.replace(causal=True, dtype="float16")
    pages.check(paged(case, 4, "hnd", FLOAT8[0]), IMPLEMENTATION, gradients=True, deterministic=True)


def test_gradients_of_lse_alone_over_float8_pools(implementation):
    """out has no cotangent, and the gathered keys are wider than the query."""
    require(implementation)
    case = CHUNK.replace(causal=True, dtype="bfloat16")
    call = paged(case, 4, pool_dtype=FLOAT8[0])

    def loss(query):
        lse = call.call(implementation)({"query": query})[1]
        return jnp.where(jnp.isfinite(lse), lse, 0).sum()

    got = jax.jit(jax.grad(loss))(call.arrays["query"])
    dout, dlse = jnp.zeros_like(call.inputs.dout), jnp.ones_like(call.inputs.dlse)
    right, low = oracle.references(case, checks.with_arrays(call.inputs, dout=dout, dlse=dlse))
    oracle.assert_gradient("query", np.asarray(got), right.gradients["query"], low.gradients["query"])


def test_gradients_of_shared_pages_add_up(implementation):
    """Three sequences have the same query and page, whose gradient is three times that of one sequence."""
    require(implementation)
    call = paged(Case("one", b=1, sq=2, sk=8, kv_lengths=(8,)), 8)
    arrays = call.arrays

    def loss(pools, n):
        query = jnp.repeat(arrays["query"], n, 0)
        tables, lengths = jnp.repeat(arrays["block_tables"], n, 0), jnp.repeat(arrays["kv_lengths"], n, 0)
        given = {
            "query": query,
            "block_tables": tables,
            "kv_lengths": lengths,
            "key": pools[0],
            "value": pools[1],
        }
        return jnp.square(call.call(implementation)(given)[0]).sum()

    grads = jax.jit(jax.grad(loss), static_argnums=1)
    one, three = (grads((arrays["key"], arrays["value"]), n) for n in (1, 3))
    for x, y in zip(three, one, strict=True):
        np.testing.assert_allclose(x, 3 * y, rtol=1e-5, atol=1e-6)
        assert (np.asarray(y) != 0).any()


def test_gradients_of_pages_that_many_sequences_share_are_summed_in_float32(kernel):
    """A sum of 300 equal terms in bfloat16 would stop growing at the 256th."""
    require(kernel)
    n, case = 300, Case("shared", b=1, sq=1, sk=8, kv_lengths=(8,), dtype="bfloat16")
    arrays = paged(case, 8).arrays

    def gradients(n):
        many = {name: jnp.repeat(arrays[name], n, 0) for name in ("query", "block_tables", "kv_lengths")}

        def loss(pools):
            given = [many["query"], *pools, many["block_tables"], many["kv_lengths"]]
            return paged_attention(*given, implementation=kernel).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss))((arrays["key"], arrays["value"]))

    # Both are rounded once, by half a unit of bfloat16 at most.
    for one, all_ in zip(gradients(1), gradients(n), strict=True):
        one, all_ = (np.asarray(x, np.float32) for x in (one, all_))
        np.testing.assert_allclose(all_, n * one, rtol=2**-7, atol=2**-7 * n * np.abs(one).max() / 100)


def test_rows_that_miss_a_page_have_nan_gradients_and_give_none_to_the_pools(implementation):
    """The other rows contribute as they do without that row."""
    require(implementation)
    case = Case("missing", b=2, sq=2, sk=8, kv_lengths=(8, 6), sinks=True)
    call = paged(case, 4)
    bad = call.arrays["block_tables"].at[0, 1].set(-5)
    names = ("query", "key", "value", "sinks")

    def grads(arrays):
        def loss(moving):
            out, _ = call.call(implementation)(arrays | moving)
            return jnp.square(out[1]).sum() + out[0].sum()

        return jax.jit(jax.grad(loss))({name: arrays[name] for name in names})

    got = grads(call.arrays | {"block_tables": bad})
    numbers = ~np.isnan(got["query"][:1]).all((-2, -1))
    assert not numbers.any(), f"dquery is a number though a page is missing: {pages.named(numbers)}"
    one = {n: call.arrays[n][1:] for n in ("query", "block_tables", "kv_lengths")}

    def alone(moving):
        return jnp.square(call.call(implementation)(one | moving)[0]).sum()

    wanted = jax.jit(jax.grad(alone))({**{n: call.arrays[n] for n in names[1:]}, "query": one["query"]})
    np.testing.assert_allclose(got["query"][1], wanted["query"][0], rtol=1e-5, atol=1e-5)
    for name in names[1:]:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-5, atol=1e-5)


def test_float8_pools_and_their_scales_have_no_gradient(implementation):
    require(implementation)
    rng = np.random.default_rng(0)
    pool = jnp.asarray(rng.standard_normal((4, 4, 2, 8)), jnp.float8_e4m3fn)
    query, scale = jnp.asarray(rng.standard_normal((2, 1, 4, 8)), jnp.float32), jnp.array([1.0, 2.0])
    where = jnp.array([[0], [1]], jnp.int32), jnp.array([4, 3], jnp.int32)

    def loss(query, scale):
        options = dict(k_scale=scale, v_scale=scale, implementation=implementation)
        return paged_attention(query, pool, pool, *where, **options).sum()

    dquery, dscale = jax.grad(loss, (0, 1))(query, scale)
    assert np.asarray(dquery).any()
    assert not np.asarray(dscale).any()
