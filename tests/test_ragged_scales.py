"""Scales of ragged_paged_attention that are arrays, or known only while the call runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ragged_paged_attention import PAGES, SIZE, TOKENS, batch, random

from jax_flash.compat.ragged_paged_attention import ragged_paged_attention


def calls(dtype):
    rng = np.random.default_rng(3)
    given, _ = batch("flat")
    query = random(rng, (TOKENS, 4, 64), "bfloat16")
    cache = random(rng, (PAGES, SIZE, 4, 64), "bfloat16").astype(dtype)
    arrays = (query, cache, given["kv_lens"], given["page_indices"], given["cu_q_lens"], jnp.int32([4]))
    return lambda **scales: ragged_paged_attention(*arrays, sm_scale=0.1, implementation="xla", **scales)


def test_scales_of_a_float8_cache_may_be_arrays_of_numpy():
    call = calls("float8_e4m3fn")
    wanted = call(k_scale=0.5, v_scale=2.0)
    got = call(k_scale=np.full(2, 0.5, np.float32), v_scale=np.full(2, 2.0, np.float32))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(wanted, np.float32))


def test_v_scale_of_another_cache_may_be_traced():
    call = calls("bfloat16")
    got = jax.jit(lambda x: call(v_scale=x))(2.0)
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(call(v_scale=2.0), np.float32))
    with pytest.raises(TypeError, match=r"k_scale must be a Python number .* multiply q by it and pass 1\.0"):
        jax.jit(lambda x: call(k_scale=x))(2.0)
