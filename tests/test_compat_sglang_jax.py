"""compat.sglang_jax has sglang-jax's arguments in their order, and the meaning of ragged_paged_attention_update."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ragged_paged_attention import PAGES, SIZE, TOKENS, attended, batch, random, updated

from jax_flash.compat import sglang_jax

pytestmark = pytest.mark.usefixtures("exact_products")

ORDER = "queries keys values kv_cache_fused kv_lens page_indices cu_q_lens cu_kv_lens distribution"


def inputs():
    """Arguments by position, and the cache's rows with their tables."""
    rng = np.random.default_rng(3)
    given, tables = batch("packed")
    query, (key, value) = random(rng, (TOKENS, 8, 64), "float32"), random(rng, (2, TOKENS, 2, 64), "float32")
    rows = random(rng, (PAGES, SIZE, 2, 2, 64), "float32")
    indices = (given[name] for name in ("kv_lens", "page_indices", "cu_q_lens", "cu_kv_lens"))
    return (query, key, value, rows.reshape(PAGES, SIZE, 2, 2, 64), *indices, jnp.array([1, 1, 4])), tables


def test_names_and_order():
    parameters = inspect.signature(sglang_jax.ragged_paged_attention).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        *ORDER.split(),
        "custom_mask",
        "attention_sink",
    ]


@pytest.mark.parametrize("causal", [1, 0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sinks", [None, np.linspace(-1, 1, 8, dtype=np.float32)], ids=["", "sinks"])
def test_by_position(causal, window, sinks, kernel):
    arrays, tables = inputs()
    rows = np.array(arrays[3])
    out, cache = sglang_jax.ragged_paged_attention(
        *arrays, None, sinks, causal=causal, sm_scale=0.1, sliding_window=window, soft_cap=3.0,
        softmax_dtype=jnp.float32, implementation=kernel,
    )  # fmt: skip
    each = updated(rows, tables, *arrays[1:3])
    wanted = attended(arrays[0], each, 0.1, bool(causal), window, 3.0, sinks)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache, rows)


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(custom_mask=jnp.ones(9, jnp.int32)), "custom_mask must be None; .* a draft_mask"),
    (dict(xai_temperature_len=512), "xai_temperature_len must be None; multiply queries"),
    (dict(causal=2), "causal must be 0 or 1, got 2"),
])  # fmt: skip
def test_what_has_no_meaning_here_is_refused_by_name(wrong, message):
    with pytest.raises(
        (NotImplementedError, ValueError), match=rf"^sglang_jax.ragged_paged_attention: {message}"
    ):
        sglang_jax.ragged_paged_attention(*inputs()[0], **wrong)


def test_tables_are_no_larger_than_the_pool():
    """cu_kv_lens says nothing about a sequence's pages, of which 64 sequences may list 2,048 each."""
    rows, cache = jnp.ones((64, 2, 64)), jnp.ones((32, 16, 4, 64))
    lengths, offsets = jnp.full(64, 16), jnp.arange(65, dtype=jnp.int32)
    indices = jnp.zeros(64 * 2048, jnp.int32).at[:64].set(jnp.arange(64) % 32)
    arrays = (rows, rows, rows, cache, lengths, indices, offsets, 16 * offsets, jnp.array([0, 0, 64]))
    compiled = jax.jit(sglang_jax.ragged_paged_attention).lower(*arrays).compile()
    # Each sequence's row of the tables would list all of these pages.
    assert compiled.memory_analysis().temp_size_in_bytes < lengths.size * indices.nbytes
