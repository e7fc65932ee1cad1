"""Arguments of compat.ragged_paged_attention that are refused, and those that are taken and not used."""

import jax.numpy as jnp
import pytest

from jax_flash.compat.ragged_paged_attention import ragged_paged_attention_update

Q, KEYS, CACHE = jnp.ones((4, 4, 64)), jnp.ones((4, 2, 64)), jnp.ones((6, 8, 4, 64))
INDICES = dict(
    kv_lens=jnp.ones(2, jnp.int32),
    page_indices=jnp.zeros(6, jnp.int32),
    cu_q_lens=jnp.arange(3, dtype=jnp.int32),
)
RIGHT = dict(
    queries=Q, keys=KEYS, values=KEYS, kv_cache=CACHE, **INDICES, distribution=jnp.asarray([0, 0, 2])
)


@pytest.mark.parametrize(("wrong", "error", "sentence"), [
    (dict(layout="nhd"), ValueError, "layout must be one of ('interleaved', 'concatenated'), got 'nhd'"),
    (dict(kv_cache=jnp.ones((6, 8, 3, 64))), ValueError, "kv_cache must have heads K0 V0 K1 V1 …, got 3 of them"),
    (dict(kv_cache=jnp.ones((6, 8, 4))), ValueError, "kv_cache must have rank 4 [p ps heads d] or 5"),
    (dict(kv_cache=jnp.ones((6, 8, 2, 64))), ValueError, "kv_cache has room for 1 heads, keys has 2"),
    (dict(kv_cache=jnp.ones((6, 8, 4, 32))), ValueError,
     "queries has head dim 64, and the cache's keys have 32 columns"),
    (dict(page_indices=jnp.zeros(5, jnp.int32)), ValueError,
     "page_indices must have shape [n, pages] or [n · pages] with n = 2, got (5,)"),
    (dict(values=jnp.ones((4, 1, 64))), ValueError, "keys and values must have queries' 4 tokens and the same shape"),
    (dict(queries=jnp.ones((4, 3, 64))), ValueError,
     "the cache has 2 heads of keys, which does not divide the 3 of queries"),
    (dict(sliding_window=0), ValueError, "sliding_window must be an int of at least 1 or None, got 0"),
    (dict(k_scale=0.0), ValueError, "k_scale must not be 0, by which nothing can be divided"),
    (dict(q_scale="1"), TypeError, "q_scale must be a Python number (it is compiled in), got str"),
    (dict(attention_sink=jnp.ones((2, 2))), ValueError,
     "attention_sink must broadcast to [hq] = (4,), got shape (2, 2)"),
    (dict(attention_sink=jnp.ones(3)), ValueError, "attention_sink must broadcast to [hq] = (4,), got shape (3,)"),
    (dict(queries=Q.astype(jnp.bfloat16)), TypeError,
     "kv_cache has dtype float32, allowed are bfloat16 (as queries), float8_e4m3fn and float8_e5m2"),
    (dict(keys=KEYS.astype(jnp.bfloat16)), TypeError,
     "keys has dtype bfloat16, allowed are float32, as kv_cache has float32; cast keys with .astype"),
    (dict(values=KEYS.astype(jnp.int32)), TypeError, "values has dtype int32, allowed are float32"),
    (dict(distribution=jnp.zeros(0, jnp.int32)), ValueError,
     "distribution must hold the number of sequences, got an empty array"),
    (dict(temperature=3), TypeError, "temperature is no argument; tuning parameters are"),
])  # fmt: skip
def test_messages(wrong, error, sentence):
    with pytest.raises(error) as caught:
        ragged_paged_attention_update(**RIGHT | wrong)
    assert str(caught.value).startswith("ragged_paged_attention_update: ")
    assert sentence in str(caught.value)


def test_tuning_parameters_are_taken(kernel):
    ragged_paged_attention_update(
        **RIGHT, vmem_limit_bytes=1, m_block_sizes=(1, 2, 3, 4), implementation=kernel
    )
