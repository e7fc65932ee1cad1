"""The references of jax_flash.compat.splash against those of JAX's Splash attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_attn_reference import assert_close, normal
from splash_cases import DV, HQ, IDS, SQ, K, Q, V, compare, jax_own, make, multi_head, results, sees

from jax_flash.compat import splash

pytestmark = pytest.mark.usefixtures("exact_products")

REFERENCES = {
    "mha": ("make_masked_mha_reference", K, V),
    "mqa": ("make_masked_mqa_reference", K[:, 0], V[:, 0]),
}
OPTIONS = {"plain": {}, "cap": dict(attn_logits_soft_cap=1.5)}


def references(kind, name, **options):
    """Ours and JAX's for one mask."""
    function = REFERENCES[kind][0]
    ours = make(multi_head(splash, name), getattr(splash, function), **options)
    return ours, getattr(jax_own(), function)(multi_head(jax_own("mask"), name))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["full", "causal, offset 3", "two windows", "an array", "by head"])
@pytest.mark.parametrize("kind", REFERENCES)
def test_results_and_gradients_are_those_of_splash_s_reference(kind, name, options, implementation):
    arrays = Q, *REFERENCES[kind][1:], normal(5, 2, HQ)
    seen = sees(multi_head(splash, name), IDS)
    weights = np.where(seen, normal(4, 2, HQ, SQ, DV), 0)

    def call(reference):
        def run(q, k, v, ids, sinks):
            out, (lse,) = reference(q, k, v, ids, sinks, save_residuals=True, **OPTIONS[options])
            return out, (jnp.where(seen[0, ..., 0], lse, 0),)

        return run

    got, right = (
        results(call(x), weights, arrays, IDS) for x in references(kind, name, implementation=implementation)
    )
    compare((np.where(seen, got[0], 0), *got[1:]), (np.where(seen, right[0], 0), *right[1:]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_result_is_float32_and_gradients_have_the_dtypes_of_their_arrays(dtype, implementation):
    arrays = [jnp.asarray(x[0], dtype) for x in (Q, K, V)]
    ours, theirs = references("mha", "causal, offset 3", implementation=implementation)
    out, back = jax.vjp(ours, *arrays)
    right, right_back = jax.vjp(theirs, *arrays)
    assert out.dtype == right.dtype == jnp.float32
    assert_close(out, np.asarray(right))
    weights = jnp.asarray(normal(4, HQ, SQ, DV))
    tolerance = 1e-4 + float(jnp.finfo(dtype).eps)
    for got, wanted in zip(back(weights), right_back(weights), strict=True):
        assert got.dtype == wanted.dtype == dtype
        assert_close(got.astype(jnp.float32), np.asarray(wanted, np.float32), tolerance)


def test_without_residuals_there_is_the_result_alone():
    ours, theirs = references("mha", "causal")
    assert_close(jax.vmap(ours)(Q, K, V), np.asarray(jax.vmap(theirs)(Q, K, V)), 2e-5)


def test_a_query_that_sees_nothing_gives_zero(implementation):
    ours, _ = references("mha", "causal, offset −2", implementation=implementation)
    out, (lse,) = ours(Q[0], K[0], V[0], save_residuals=True)
    assert not out[:, :2].any()
    assert (lse[:, :2] == -np.inf).all()


@pytest.mark.parametrize("backward", ["vanilla", "custom", "custom_vanilla"])
def test_what_chooses_a_backward_has_no_effect(backward):
    mask = multi_head(splash, "local")
    chosen = splash.make_masked_mha_reference(mask, backward_impl=backward)
    right = splash.make_masked_mha_reference(mask)(Q[0], K[0], V[0])
    assert np.array_equal(chosen(Q[0], K[0], V[0], mask_value=-1e9), right)


ERRORS = {
    "backward": (
        lambda: references("mha", "causal", backward_impl="flash"),
        "splash: backward_impl must be one of ('vanilla', 'custom', 'custom_vanilla'), got 'flash'",
    ),
    "integers": (
        lambda: references("mha", "causal")[0](Q[0].astype(int), K[0], V[0]),
        "flash_attention: query has dtype int32, allowed are float16, bfloat16, float32",
    ),
    "no array": (
        lambda: references("mha", "causal")[0](Q[0], K[0], None),
        "splash: v must be an array, got None",
    ),
    "rank": (
        lambda: references("mqa", "causal")[0](Q[0], K[0], V[0]),
        "splash: k must have rank 2 [sk d], got shape (2, 18, 16)",
    ),
    "residuals": (
        lambda: references("mha", "causal")[0](Q[0], K[0], V[0], save_residuals=1),
        "splash: save_residuals must be True or False, got 1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        call()
