"""Few query rows on the CPU: the same bits for any number of threads, and for keys in pages or side by side."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import require
from conftest import IMPLEMENTATION
from programs import assert_same_bits_on_one_thread_and_on_all

from jax_flash import flash_attention, paged_attention

pytestmark = pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="promises of the CPU kernels")

DECODE = """
keys = jax.random.split(jax.random.key(0), 3)
lengths = jnp.asarray([2100, 5, 1301], jnp.int32)
tables = jnp.arange(3, dtype=jnp.int32)[:, None]
for dtype in ("float32", "bfloat16"):
    q = jax.random.normal(keys[0], (3, 2, 8, 48), jnp.dtype(dtype))
    k, v = (jax.random.normal(key, (3, 2100, 4, 48), jnp.dtype(dtype)) for key in keys[1:])
    for options in ({}, {"num_splits": 7}, {"batch_invariant": True}, {"window": (900, 0)}):
        out, lse = jax_flash.paged_attention(
            q, k, v, tables, lengths, causal=True, implementation="cpu", return_lse=True, **options)
        keep(f"{dtype}, {', '.join(options) or 'plain'}", out=out, lse=lse)
"""
CPU = "cpu"


def test_decoding_gives_the_same_bits_on_one_thread_and_on_all() -> None:
    assert_same_bits_on_one_thread_and_on_all(DECODE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("d", [32, 40])
def test_pages_give_the_bits_of_keys_side_by_side(dtype: str, d: int) -> None:
    """For both layouts, several page sizes and pages in any order."""
    require(CPU)
    b, s, hq, hk = 2, 640, 6, 3
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, key, value = normal(b, 2, hq, d), normal(b, s, hk, d), normal(b, s, hk, d)
    lengths = jnp.asarray([s, 333], jnp.int32)
    wanted = flash_attention(query, key, value, kv_lengths=lengths, causal=True, implementation=CPU)
    for size, layout in ((16, "nhd"), (16, "hnd"), (5, "nhd"), (s, "hnd")):
        tables = rng.permutation(b * s // size).astype(np.int32).reshape(b, -1)
        pools = []
        for x in (key, value):
            pages = np.zeros((tables.size, size, hk, d), np.asarray(x).dtype)
            pages[tables] = np.asarray(x).reshape(b, -1, size, hk, d)
            pools.append(jnp.asarray(pages if layout == "nhd" else pages.swapaxes(1, 2)))
        options = dict(causal=True, page_layout=layout, implementation=CPU)
        out = paged_attention(query, *pools, jnp.asarray(tables), lengths, **options)
        np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(wanted, np.float32))
