"""Scales of float8 pools by page and KV head, [p, hk]: each element stands for its stored value times the scale."""

from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pages
import pytest
from cases import Case, varlen
from conftest import IMPLEMENTATION
from jax.sharding import PartitionSpec as P
from pages import FLOAT8, paged, require
from programs import collectives, shard_shapes
from test_append import arguments, by_token, check, run
from test_append_dynamic import HK, OF_SCALE, RELATIVE, wide
from test_paged_programs import sharded_attention

from jax_flash import append_kv, paged_attention

DECODE = Case("decode", b=4, sq=1, sk=30, kv_lengths=(13, 0, 1, 30), hq=4, hk=2)
CHUNK = Case("chunk", b=2, sq=2, sk=12, kv_lengths=(12, 5), causal=True)
MIXED = varlen("mixed", (1, 7, 0, 12, 1), k_sequences=(20, 7, 5, 9, 1), padding=(3, 0), causal=True)
LONG = Case("long", b=2, sq=1, sk=300, kv_lengths=(300, 129), hq=8, hk=2)


@pytest.mark.parametrize("pool_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("size", "layout"), [(1, "hnd"), (5, "nhd"), (64, "hnd")])
def test_prefill_and_decode_in_one_call(size, layout, dtype, pool_dtype):
    pages.check(paged(MIXED.replace(dtype=dtype), size, layout, pool_dtype, by_page=True), IMPLEMENTATION)


def test_in_plain_jax():
    pages.check(paged(MIXED, 5, "hnd", FLOAT8[0], by_page=True), "xla")


@pytest.mark.parametrize("d", [32, 40, 64, 128])
@pytest.mark.parametrize("size", [4, 16, 48])
def test_few_rows_over_several_tiles_of_keys(size, d):
    """Tiles contain one page, several pages, or parts of two."""
    for dtype, sq, hq in (("bfloat16", 1, 8), ("float16", 3, 8), ("bfloat16", 8, 8), ("float32", 1, 2)):
        case = LONG.replace(d=d, dv=d, dtype=dtype, sq=sq, hq=hq, causal=True)
        pages.check(paged(case, size, pool_dtype=FLOAT8[0], by_page=True), IMPLEMENTATION)


@pytest.mark.parametrize(
    "options", [dict(window=(9, 0)), dict(softcap=2.0), dict(sinks=True), dict(alibi_slopes=(2, 8))], ids=str
)
@pytest.mark.parametrize("sq", [1, 40])
def test_with_score_options(sq, options):
    case = LONG.replace(
        sk=90, kv_lengths=(90, 41), sq=sq, d=64, dv=64, dtype="bfloat16", causal=True, **options
    )
    pages.check(paged(case, 8, pool_dtype=FLOAT8[1], by_page=True), IMPLEMENTATION)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["k_scale", "v_scale"])
def test_each_scale_alone_and_beside_one_by_head(implementation, given, dtype):
    """The other scale is 1, or [hk]. The numbers are no powers of two."""
    require(implementation)
    call = paged(DECODE.replace(dtype=dtype, d=64, dv=64), 8, pool_dtype=FLOAT8[0])
    count = call.arrays["key"].shape[0]
    rng = np.random.default_rng(1)
    by_page = jnp.asarray(rng.uniform(0.1, 1.5, (count, 2)), jnp.float32)
    other = {"k_scale": "v_scale", "v_scale": "k_scale"}[given]
    for beside in (None, jnp.asarray([0.3, 1.7], jnp.float32)):
        check_scales(call, {given: by_page, other: beside}, implementation)


def check_scales(call, scales, implementation):
    """Compares a call with other scales of its float8 pools, None for no scale, with the dense case."""
    count = call.arrays["key"].shape[0]
    wide = {
        name: call.arrays[name].astype(jnp.float32) * _of_pages(scales[scale], count)
        for name, scale in (("key", "k_scale"), ("value", "v_scale"))
    }
    dense = {name: pages.gathered(x, call.pages.tables, call.case.sk) for name, x in wide.items()}
    right = oracle.references(call.case, checks.with_arrays(call.inputs, **dense), gradients=False)
    got = oracle.Result(*map(np.asarray, call.call(implementation)(scales)))
    oracle.assert_result(got, *right, call.case)


@pytest.mark.parametrize("scale", [0.1, 1e4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sq", [1, 20, 80])
def test_key_scales_are_not_rounded_to_the_dtype_of_queries(sq, dtype, scale, kernel):
    """Keys times their scales may exceed float16, and lse has float32's precision, as with one scale by head."""
    require(kernel)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, sq, 2, 32)) / scale, dtype)
    pool = jnp.asarray(rng.standard_normal((2, 16, 2, 32)) * 30, FLOAT8[0])
    tables, lengths = jnp.asarray([[0, 1]], jnp.int32), jnp.asarray([32], jnp.int32)
    by_page, by_head = (
        paged_attention(q, pool, pool, tables, lengths, k_scale=x, return_lse=True, implementation=kernel)
        for x in (jnp.full((2, 2), scale), jnp.full(2, scale))
    )
    np.testing.assert_allclose(by_page[1], by_head[1], rtol=1e-5, atol=1e-4)
    assert np.isfinite(np.asarray(by_page[0], np.float32)).all()


def _of_pages(scale, count):
    """The scales, broadcast to the pool's layout "nhd"."""
    if scale is None:
        return jnp.ones((1, 1, 1, 1))
    return jnp.broadcast_to(scale, (count, scale.shape[-1]))[:, None, :, None]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sq", [1, 40])
def test_pages_of_any_magnitude(implementation, dtype, sq):
    """Values have scales 2^60 and 2^−60: each in its own sequence, and both where all weight is on the small one."""
    require(implementation)
    d, size = 64, 16
    rng = np.random.default_rng(0)
    stored = jnp.asarray(rng.standard_normal((4, size, 1, d)), FLOAT8[0])
    keys = jnp.zeros((4, size, 1, d)).at[2].set(1).astype(FLOAT8[0])
    v_scale = jnp.asarray([[2.0**60], [2.0**-60], [2.0**-30], [1.0]], jnp.float32)
    tables = jnp.asarray([[0, 0], [1, 1], [2, 3], [3, 2]], jnp.int32)
    lengths = jnp.asarray([size, size, 2 * size, 2 * size], jnp.int32)
    query = jnp.full((4, sq, 4, d), 1.0, dtype)  # a score of 60 for the keys of page 2
    out, _ = paged_attention(
        query, keys, stored, tables, lengths, scale=60 / d, v_scale=v_scale, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    mean = np.asarray(stored, np.float64)[:, :, 0].mean(1)  # [page, d]
    wanted = mean[[0, 1, 2, 2]] * np.asarray(v_scale, np.float64)[[0, 1, 2, 2]]
    got = np.asarray(out, np.float64)
    for z in range(4):
        largest = np.abs(wanted[z]).max()
        error = np.abs(got[z] - wanted[z]).max() / largest
        # Relative to the largest: beside some of these values, the contract's constant of 1e-5 is large.
        assert error < {"bfloat16": 2**-7, "float32": 1e-5}[dtype], f"sequence {z}: {error}"


def test_a_scale_of_zero_makes_values_zero(implementation):
    require(implementation)
    call = paged(DECODE.replace(dtype="bfloat16", d=64, dv=64), 8, pool_dtype=FLOAT8[0])
    count = call.arrays["key"].shape[0]
    out, lse = call.call(implementation)({"v_scale": jnp.zeros((count, 2), jnp.float32)})
    _, wanted = call.call(implementation)({})
    assert not np.asarray(out, np.float32).any()
    np.testing.assert_allclose(lse, wanted, rtol=1e-5)


@pytest.mark.parametrize("sq", [1, 20])
def test_a_page_outside_the_pool_is_nan_and_its_scale_is_not_read(implementation, sq):
    require(implementation)
    case = Case("missing", b=2, sq=sq, sk=40, kv_lengths=(40, 40), d=64, dv=64, dtype="bfloat16")
    call = paged(case, 8, pool_dtype=FLOAT8[0], by_page=True)
    for page in (-1, 2**31 - 1, call.pages.count):
        tables = call.arrays["block_tables"].at[1, 2].set(page)
        out, lse = call.call(implementation)({"block_tables": tables})
        hit = np.zeros((2, sq), bool)
        hit[1] = True
        pages.assert_nan_where(hit, out, lse)


def test_gradients_of_the_query_and_its_tangents():
    call = paged(CHUNK.replace(d=64, dv=64, hq=4, hk=2), 4, pool_dtype=FLOAT8[0], by_page=True)
    pages.check(call, IMPLEMENTATION, gradients=True)
    query, moved = call.arrays["query"], jnp.ones_like(call.arrays["query"])

    def tangent(implementation):
        run = call.call(implementation)
        return jax.jvp(lambda q: run({"query": q})[0], (query,), (moved,))[1]

    np.testing.assert_allclose(tangent(IMPLEMENTATION), tangent("xla"), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "mapped", [("k_scale",), ("k_scale", "v_scale", "query"), ("block_tables",)], ids="-".join
)
def test_vmap(kernel, mapped):
    require(kernel)
    call = paged(CHUNK.replace(d=64, dv=64), 4, pool_dtype=FLOAT8[0], by_page=True)
    turned = {n: jnp.stack([call.arrays[n], call.arrays[n][::-1]]) for n in mapped}
    run = call.call(kernel)
    got = jax.vmap(run)(turned)
    for i in range(2):
        for x, y in zip(got, run({n: x[i] for n, x in turned.items()}), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_devices_take_the_scales_of_their_heads(kernel, axis_type, kv_heads):
    """Scales are split with the KV heads; with fewer KV heads than devices, each device gets those of its own head."""
    require(kernel)
    call = paged(CHUNK.replace(hq=16, hk=kv_heads), 4, pool_dtype=FLOAT8[0], by_page=True)
    specs = {"query": P(None, None, "model")}
    if kv_heads == 8:
        specs |= dict.fromkeys(("key", "value"), P(None, None, "model"))
        specs |= dict.fromkeys(("k_scale", "v_scale"), P(None, "model"))
    program = sharded_attention(call, specs, kernel, axis_type)
    assert not collectives(program)
    assert shard_shapes(program, "forward") == {(2, 2, 2, 16)}


# append_kv with the scales that it is given.


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
def test_append_divides_by_the_scale_of_the_page(implementation, layout):
    require(implementation)
    call = arguments(pool_dtype=FLOAT8[0], layout=layout, new=(3, 0, 6), dtype="bfloat16")
    count = call["k_pages"].shape[0]
    call |= {
        name: 2.0 ** jax.random.randint(jax.random.key(i), (count, 2), -3, 4).astype(jnp.float32)
        for i, name in enumerate(("k_scale", "v_scale"))
    }
    check(call, implementation)


@pytest.mark.parametrize("by_page", [False, True], ids=["hk", "p, hk"])
@pytest.mark.parametrize("float8", FLOAT8)
def test_append_divides_by_any_scale(implementation, float8, by_page):
    """Scales include 0, −1, infinity and NaN: stored = value / scale, saturated; 0 / 0 is NaN."""
    require(implementation)
    call = arguments(pool_dtype=float8, new=(3, 0, 6), dtype="float32")
    count, heads = call["k_pages"].shape[0], call["k_pages"].shape[2]
    call["key"] = call["key"].at[..., 0].set(0).at[..., 1].set(-jnp.inf)
    strange = np.array([0, -0.0, -1, np.inf, -np.inf, np.nan, 0.3], np.float32)
    for shift in range(0, len(strange), 3):
        scale = np.resize(np.roll(strange, -shift), (count, heads) if by_page else heads)
        scaled = call | dict.fromkeys(("k_scale", "v_scale"), jnp.asarray(scale))
        with np.errstate(invalid="ignore", divide="ignore"):
            wanted = by_token(scaled)
        for x, y in zip(run(scaled, implementation), wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(x).astype(np.float32), np.asarray(y).astype(np.float32))


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_attention_multiplies_by_scales_that_are_not_positive(implementation, factor):
    require(implementation)
    call = paged(DECODE.replace(d=64, dv=64), 8, pool_dtype=FLOAT8[0], by_page=True)
    call_of = call.call(implementation)
    scales = {name: factor * call.arrays[name] for name in ("k_scale", "v_scale")}
    pools = {
        name: call.arrays[name].astype(jnp.float32)
        * _of_pages(factor * call.arrays[scale], call.arrays["key"].shape[0])
        for name, scale in (("key", "k_scale"), ("value", "v_scale"))
    }
    wanted = call.call("xla")(pools | dict.fromkeys(scales))
    for x, y in zip(call_of(scales), wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_append_and_attention_agree(implementation):
    """Attention reads with scales by page what append_kv has written with them: keys rounded to float8."""
    require(implementation)
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.standard_normal((2, 13, 2, 64)), jnp.bfloat16) for _ in range(2))
    tables = jnp.asarray([[5, 1, 7, 0], [2, 3, 6, 4]], jnp.int32)
    scales = {
        n: 2.0 ** jnp.asarray(rng.integers(-6, -2, (8, 2)), jnp.float32) for n in ("k_scale", "v_scale")
    }
    pools = [jnp.zeros((8, 4, 2, 64), FLOAT8[0])] * 2
    k_pages, v_pages, lengths = append_kv(
        *pools, key, value, tables, jnp.zeros(2, jnp.int32), **scales, implementation=implementation
    )
    query = jnp.asarray(rng.standard_normal((2, 1, 4, 64)), jnp.bfloat16)
    out = paged_attention(query, k_pages, v_pages, tables, lengths, **scales, implementation=implementation)
    held = [
        pages.gathered(wide(x, scale, "nhd"), tables, 13)
        for x, scale in zip((k_pages, v_pages), scales.values())
    ]
    for x, y in zip(held, (key, value)):  # the largest scale is 1/8
        np.testing.assert_allclose(x, y.astype(float), rtol=RELATIVE[FLOAT8[0]], atol=OF_SCALE[FLOAT8[0]] / 8)
    oracle.assert_out(np.asarray(out), *oracle.plain_outs(query, *held, np.ones((2, 1, 13), bool)))


def test_attention_over_dynamic_pools_is_within_the_rounding(implementation):
    """A cache filled token by token, whose tokens differ a thousandfold in size between pages."""
    require(implementation)
    rng = np.random.default_rng(0)
    b, s, hq, d, size = 2, 24, 4, 64, 8
    key, value = (jnp.asarray(rng.standard_normal((b, s, HK, d)), jnp.bfloat16) for _ in range(2))
    value = value * jnp.repeat(jnp.asarray([1, 1000, 30], jnp.bfloat16), size)[:, None, None]
    pools = [jnp.zeros((6, size, HK, d), FLOAT8[0]) for _ in "kv"]
    scales = {n: jnp.ones((6, HK), jnp.float32) for n in ("k_scale", "v_scale")}
    tables, lengths = jnp.asarray([[4, 0, 2], [1, 5, 3]], jnp.int32), jnp.zeros(b, jnp.int32)
    append = jax.jit(partial(append_kv, scale="dynamic", implementation=implementation))
    for t in range(s):
        *pools, lengths, k_scale, v_scale = append(
            *pools, key[:, t : t + 1], value[:, t : t + 1], tables, lengths, **scales
        )
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    query = jnp.asarray(rng.standard_normal((b, 1, hq, d)), jnp.bfloat16)
    out = paged_attention(query, *pools, tables, lengths, **scales, implementation=implementation)
    held = [pages.gathered(wide(x, y, "nhd"), tables, s) for x, y in zip(pools, (k_scale, v_scale))]
    oracle.assert_out(np.asarray(out), *oracle.plain_outs(query, *held, np.ones((b, 1, s), bool)))
    exact = np.asarray(value, np.float64)
    assert (np.abs(held[1] - exact) <= np.abs(exact) / 16 + 2.0**-9 * np.abs(exact).max() / 224).all()
