"""Finite numbers of any magnitude, and rows that see nothing: results and gradients stay right, and no NaN appears."""

from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_flash import flash_attention

SQ, SK, D = 40, 33, 16


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    """The dtypes of CUDA's portable kernels and of Hopper's."""
    return request.param


def arrays(implementation, *scales, dtype=None, seed=0):
    """q, k, v [1, sq or sk, 1, d] times their scales."""
    dtype = dtype or checks.usual_dtype(implementation)
    checks.require(implementation, "forward", "backward", dtype=dtype, d=D, dv=D)
    rng = np.random.default_rng(seed)
    rows = (SQ, SK, SK)
    return [jnp.asarray(rng.standard_normal((1, n, 1, D)) * x, dtype) for n, x in zip(rows, scales)]


@pytest.mark.parametrize("sees", ["nothing", "keys"])
@pytest.mark.parametrize("sink", [1.1e8, -1.1e8, -1.5430098e10, 1.1e30, -1.1e30, 3e38, -3e38])
def test_the_weight_of_a_large_sink(sink, sees, dtype, kernel):
    """It is 1 where a row sees nothing or the sink is larger than all scores, else 0."""
    q, k, v = arrays(kernel, 1, 1, 1, dtype=dtype)
    mask = jnp.full((SQ, SK), sees == "keys")

    def attend(sinks):
        return flash_attention(q, k, v, sinks=sinks, mask=mask, return_lse=True, implementation=kernel)

    (out, lse), vjp = jax.vjp(attend, jnp.asarray([sink], jnp.float32))
    (by_lse,) = vjp((jnp.zeros_like(out), jnp.ones_like(lse)))
    (by_out,) = vjp((jnp.ones_like(out), jnp.zeros_like(lse)))
    dominates = sees == "nothing" or sink > 0
    assert not np.isnan(np.asarray(out, np.float32)).any()
    assert by_lse[0] == (SQ if dominates else 0)
    assert by_out[0] == 0
    if dominates:
        np.testing.assert_array_equal(lse, np.float32(sink))
        np.testing.assert_array_equal(out, 0)
    _, moved = jax.jvp(attend, (jnp.asarray([sink], jnp.float32),), (jnp.ones(1, jnp.float32),))
    np.testing.assert_array_equal(moved[1], 1 if dominates else 0)


@pytest.mark.parametrize("sq", [1, SQ])
@pytest.mark.parametrize("sink", [np.nan, np.inf])
def test_a_sink_that_is_no_number_shows(sink, sq, dtype, kernel):
    q, k, v = arrays(kernel, 1, 1, 1, dtype=dtype)
    sinks = jnp.asarray([sink], jnp.float32)
    out, lse = flash_attention(q[:, :sq], k, v, sinks=sinks, return_lse=True, implementation=kernel)
    assert np.isnan(np.asarray(out, np.float32)).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("hides", ["mask", "segments", "causal"])
def test_rows_that_see_only_a_sink_pass_no_nan_on(hides, dtype, kernel):
    """q and dO of such rows may hold anything."""
    q, k, v = arrays(kernel, 1, 1, 1, dtype=dtype)
    rows = np.zeros(SQ, bool)
    rows[: SQ - SK] = True  # causal hides all keys from these
    options = {
        "mask": {"mask": jnp.asarray(~rows[:, None] & np.ones((SQ, SK), bool))},
        "segments": {
            "segment_ids": (jnp.asarray(rows[None], jnp.int32), jnp.zeros((1, SK), jnp.int32)),
        },
        "causal": {"causal": True},
    }[hides]
    at = jnp.asarray(rows)[None, :, None, None]
    sinks = jnp.asarray([0.5], jnp.float32)

    def attend(q, k, v, sinks):
        return flash_attention(q, k, v, sinks=sinks, **options, implementation=kernel)

    def gradients(in_query, in_dout):
        given = jnp.where(at, jnp.asarray(in_query, q.dtype), q)
        out, vjp = jax.vjp(attend, given, k, v, sinks)
        return vjp(jnp.where(at, jnp.asarray(in_dout, q.dtype), jnp.ones_like(out)))

    clean = gradients(0, 0)
    np.testing.assert_array_equal(np.asarray(clean[0], np.float32)[0, rows], 0)
    for poison in ((np.nan, np.nan), (np.inf, np.inf), (0, np.nan), (0, np.inf), (np.nan, 0)):
        jax.tree.map(np.testing.assert_array_equal, gradients(*poison), clean)


@pytest.mark.parametrize("scale", [3e2, 3e3, 3e4, 3e6])
def test_gradients_of_rows_whose_scores_lie_far_apart(scale, kernel):
    """One key has all of a row's weight, so that the weights of a column of dV sum to the number of rows."""
    q, k, v = arrays(kernel, scale, scale, 1)
    _, vjp = jax.vjp(lambda v: flash_attention(q, k, v, scale=0.3, implementation=kernel), v)
    (dv,) = vjp(jnp.ones((1, SQ, 1, D), v.dtype))
    # A row less would be 1/40 less. lse beside 3e5 has a unit of 2⁻⁵, of which a weight may be off by half.
    np.testing.assert_allclose(np.asarray(dv, np.float32).sum(1), SQ, rtol=2e-2)


def test_values_of_zero_beside_a_large_sink_have_gradients(kernel):
    """lse rounds to the sink and out is 0, as if the rows saw no key."""
    dtype, rows = checks.usual_dtype(kernel), 4096
    q, k, v = (jnp.full((1, n, 1, 8), x, dtype) for n, x in ((rows, 1), (4, 3), (4, 0)))
    attend = partial(flash_attention, q, k, scale=1.0, sinks=jnp.array([40.0]), implementation=kernel)
    weight = np.exp(24.0 - 40)
    _, pullback = jax.vjp(attend, v)
    (dv,) = pullback(jnp.ones_like(q))
    np.testing.assert_allclose(np.float64(dv), rows * weight, rtol=2**-7)
    tout = jax.jvp(attend, (v,), (jnp.ones_like(v),))[1]
    np.testing.assert_allclose(np.float64(tout), 4 * weight, rtol=2**-7)


@pytest.mark.parametrize("softcap", [1e36, 1e33, 1e-38])
def test_softcaps_that_float32_cannot_divide_by_are_refused(softcap):
    q = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"softcap must be None, 0, or from .* to .* with a scale of 100"):
        flash_attention(q, q, q, softcap=softcap, scale=100.0)


def test_a_large_softcap_changes_nothing(kernel):
    q, k, v = arrays(kernel, 1, 1, 1)
    right = oracle.plain_outs(q, k, v, np.ones((1, SQ, SK), bool))
    for cap in (None, 1e30):
        out = flash_attention(q, k, v, softcap=cap, implementation=kernel)
        oracle.assert_out(np.asarray(out), *right, softcap=bool(cap))
