"""Pools that keys and values share, rows [K | V] or heads K0 V0 K1 V1 …, are read in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import Case, varlen
from conftest import IMPLEMENTATION
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pages import FLOAT8, latent, shared
from programs import collectives, require_devices

from jax_flash import append_kv, paged_attention

DECODE = Case("decode", b=3, sq=1, sk=200, kv_lengths=(200, 0, 77), hq=8, hk=2, d=64, dv=64)
PREFILL = DECODE.replace(name="prefill", sq=40, causal=True, kv_lengths=(200, 30, 77))
MIXED = varlen(
    "mixed", (1, 9, 0, 40, 2), k_sequences=(130, 20, 5, 66, 0), padding=(3, 0), causal=True, hq=8, hk=2, d=64, dv=64
)  # fmt: skip
CASES = [
    DECODE,
    PREFILL,
    MIXED,
    DECODE.replace(name="one KV head", hk=1),
    DECODE.replace(name="as many heads", hq=2, sq=3, causal=True),
    DECODE.replace(name="narrow values", dv=24),
    PREFILL.replace(name="every option", window=(50, 3), softcap=3.0, sinks=True, alibi_slopes=(8,)),
    DECODE.replace(name="odd columns", d=45, dv=31),
    DECODE.replace(name="wide", d=128, dv=128, hq=4),
]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@by_name(CASES)
def test_values_beside_the_keys(case, dtype):
    pages.check(shared(case.replace(dtype=dtype), 16), IMPLEMENTATION)


@by_name(CASES[1:3])
def test_plain_jax(case):
    pages.check(shared(case), "xla", gradients=True)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_columns_of_neither_are_not_read(size, layout):
    for case in (DECODE, PREFILL):
        call = shared(case.replace(dtype="bfloat16"), size, layout, start=96, columns=176)
        pages.check(call, IMPLEMENTATION)


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_pool_has_one_gradient(dtype, layout):
    for case in (PREFILL.replace(dtype=dtype, sinks=True), MIXED.replace(dtype=dtype)):
        call = shared(case, 8, layout, start=72, columns=144)
        # The oracle would give NaN for the gradients of unused NaN.
        filled = jnp.nan_to_num(call.arrays["key"])
        call.arrays["key"] = filled
        pages.check(call, IMPLEMENTATION, gradients=True)


@pytest.mark.parametrize("implementation", [IMPLEMENTATION, "xla"])
def test_values_may_overlap_the_keys(implementation):
    """Values are columns [8, 24) of the keys; the pool's gradient is the sum of both."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((2, 3, 4, 32)), jnp.float32)
    pool = jnp.asarray(rng.standard_normal((9, 5, 2, 40)), jnp.float32)
    tables, lengths = jnp.asarray([[1, 3, 5, 7], [0, 2, 8, 4]], jnp.int32), jnp.asarray([20, 11], jnp.int32)
    options = dict(causal=True, implementation=implementation)

    def one(query, pool):
        return paged_attention(query, pool, None, tables, lengths, value_dim=16, value_start=8, **options)

    def two(query, pool):
        return paged_attention(query, pool[..., :32], pool[..., 8:24], tables, lengths, **options)

    np.testing.assert_allclose(one(query, pool), two(query, pool), rtol=1e-5, atol=1e-5)
    found, wanted = (
        jax.grad(lambda q, p, f=f: (f(q, p) ** 2).sum(), argnums=(0, 1))(query, pool) for f in (one, two)
    )
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    moved = (query + 1, pool * 0.5)
    for x, y in zip(*(jax.jvp(f, (query, pool), moved) for f in (one, two)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_a_latent_pool_may_have_more_columns_than_the_query():
    """The pool has 640 columns, to which serving engines pad, and the query has 576."""
    case = DECODE.replace(hq=16, hk=1, d=576, dv=512, dtype="bfloat16")
    call = latent(case, 16)
    pool = np.asarray(call.arrays["key"])
    call.arrays["key"] = jnp.asarray(
        np.pad(pool, [(0, 0)] * 3 + [(0, 64)], constant_values=np.asarray(np.nan, pool.dtype))
    )
    pages.check(call, IMPLEMENTATION)


def test_640_columns_of_keys():
    if IMPLEMENTATION == "cuda":
        pytest.skip("CUDA has latent kernels of up to 576 columns")
    for dtype in ("bfloat16", "float32"):
        pages.check(latent(DECODE.replace(hq=16, hk=1, d=640, dv=512, dtype=dtype), 16), IMPLEMENTATION)


@pytest.mark.parametrize("float8", FLOAT8)
@pytest.mark.parametrize("by_page", [False, True])
def test_float8_keys_and_values_have_scales_of_their_own(float8, by_page):
    for case in (DECODE.replace(dtype="bfloat16"), PREFILL):
        pages.check(shared(case, 16, pool_dtype=float8, by_page=by_page, columns=160), IMPLEMENTATION)


def test_vmap_over_pools(implementation):
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((3, 2, 1, 4, 32)), jnp.float32)
    pool = jnp.asarray(rng.standard_normal((3, 8, 4, 2, 64)), jnp.float32)
    tables, lengths = jnp.arange(8, dtype=jnp.int32).reshape(2, 4), jnp.asarray([16, 7], jnp.int32)

    def run(query, pool):
        return paged_attention(
            query, pool, None, tables, lengths, value_dim=32, value_start=32, implementation=implementation
        )

    each = jnp.stack([run(q, p) for q, p in zip(query, pool)])
    np.testing.assert_allclose(jax.vmap(run)(query, pool), each, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(run, (0, None))(query, pool[0]), jnp.stack([run(q, pool[0]) for q in query]), rtol=1e-6, atol=1e-6
    )  # fmt: skip


def test_kv_heads_are_split_without_a_collective(kernel):
    require_devices(2)
    mesh = jax.make_mesh((2,), ("x",))
    query, pool = jnp.ones((2, 1, 8, 64), jnp.bfloat16), jnp.ones((6, 16, 4, 128), jnp.bfloat16)
    tables, lengths = jnp.asarray([[0, 2], [1, 3]], jnp.int32), jnp.asarray([20, 7], jnp.int32)
    split = NamedSharding(mesh, P(None, None, "x"))
    run = jax.jit(
        lambda q, p: paged_attention(
            q, p, None, tables, lengths, value_dim=64, value_start=64, implementation=kernel
        )
    )
    placed = jax.device_put(query, split), jax.device_put(pool, split)
    assert not collectives(run.lower(*placed).compile().as_text())
    np.testing.assert_array_equal(run(*placed), run(query, pool))


def test_no_copy_of_the_pool(kernel):
    """A pool of heads K0 V0 K1 V1 … is reshaped and read in place: temporaries take a fraction of its memory."""
    # Large compared with the workspace of split keys.
    pool = jax.ShapeDtypeStruct((8192, 16, 8, 64), jnp.bfloat16)
    query, tables = jnp.ones((4, 1, 8, 64), jnp.bfloat16), jnp.zeros((4, 64), jnp.int32)

    def run(pool):
        return paged_attention(
            query, pool.reshape(8192, 16, 4, 128), None, tables, jnp.full(4, 1000), value_dim=64, value_start=64,
            implementation=kernel,
        )  # fmt: skip

    memory = jax.jit(run).lower(pool).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8192 * 16 * 8 * 64 * 2 / 8


def test_append_writes_both_at_once(implementation):
    rng = np.random.default_rng(0)
    pool = jnp.zeros((5, 4, 2, 48), jnp.float32)
    tables, lengths = jnp.asarray([[1, 3], [0, 4]], jnp.int32), jnp.asarray([2, 5], jnp.int32)
    key, value = (jnp.asarray(rng.standard_normal((2, 2, 2, d)), jnp.float32) for d in (32, 16))
    angles = jnp.asarray(rng.uniform(0, 6, (8, 16)), jnp.float32)
    rotary = jnp.cos(angles), jnp.sin(angles)
    options = dict(rotary=rotary, implementation=implementation)
    both = jnp.concatenate([key, value], -1)
    got, none, after = append_kv(pool, None, both, None, tables, lengths, **options)
    keys, values, after_two = append_kv(
        pool[..., :32], pool[..., 32:], key, value, tables, lengths, **options
    )
    assert none is None
    np.testing.assert_array_equal(got, jnp.concatenate([keys, values], -1))
    np.testing.assert_array_equal(after, after_two)
