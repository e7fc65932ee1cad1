"""paged_attention: decode, prefill and both, in pages of any size, against the dense oracle; what is unused is NaN."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import DTYPES, Case, varlen
from conftest import IMPLEMENTATION
from pages import FLOAT8, paged, require

from jax_flash import flash_attention, masks, paged_attention

DECODE = Case("decode", b=4, sq=1, sk=30, kv_lengths=(13, 0, 1, 30))
CHUNK = Case("chunk", b=3, sq=4, sk=30, kv_lengths=(25, 4, 2))
MIXED = varlen("mixed", (1, 7, 0, 12, 1), k_sequences=(20, 7, 5, 9, 1), padding=(3, 0))

dtypes = pytest.mark.parametrize("dtype", DTYPES)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


OPTIONS = [
    DECODE,
    CHUNK,
    MIXED,
    MIXED.replace(name="causal", causal=True),
    MIXED.replace(name="causal top left", causal=True, align="top_left"),
    MIXED.replace(name="window", window=(3, 2)),
    DECODE.replace(name="decode in a window", window=(6, 0), hq=8, hk=1),
    MIXED.replace(name="window top left", window=(None, 1), align="top_left"),
    CHUNK.replace(name="scale", scale=-0.7, causal=True),
    MIXED.replace(name="softcap", softcap=2.0, causal=True),
    DECODE.replace(name="alibi", alibi_slopes=(4,), hq=4, hk=4),
    MIXED.replace(name="alibi by sequence", alibi_slopes=(5, 6), hq=6, hk=2, causal=True),
    DECODE.replace(name="sinks", sinks=True, hq=16, hk=2),
    MIXED.replace(name="sinks by token and softcap", sinks="token", softcap=3.0, hq=8, hk=1, window=(5, 0)),
    CHUNK.replace(name="head dims", d=24, dv=40, causal=True),
    DECODE.replace(name="odd head dims", d=7, dv=100, hq=5, hk=1),
]


@dtypes
@by_name(OPTIONS)
def test_each_option(case, dtype):
    pages.check(paged(case.replace(dtype=dtype)), IMPLEMENTATION)


@by_name(OPTIONS[3::4])
def test_each_option_in_plain_jax(case):
    pages.check(paged(case), "xla")


# Pages.


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("size", [1, 5, 8, 16, 64, 256])
def test_any_page_size(size, layout):
    lengths = (1, 0, size, size + 1, 3 * size - 1)
    case = varlen("sizes", (1, 2, 3, 1, 5), k_sequences=lengths, causal=True, hq=2, hk=2)
    pages.check(paged(case, size, layout), IMPLEMENTATION)


@pytest.mark.parametrize(
    ("pool_dtype", "dtype"),
    [(None, "float16"), *((x, "float32") for x in FLOAT8), *((x, "bfloat16") for x in FLOAT8)],
)
@pytest.mark.parametrize(("size", "layout"), [(1, "hnd"), (5, "nhd"), (64, "hnd")])
def test_pools_of_every_dtype_in_both_layouts(size, layout, pool_dtype, dtype):
    case = MIXED.replace(dtype=dtype, causal=True, dv=8)
    pages.check(paged(case, size, layout, pool_dtype), IMPLEMENTATION)


def test_hundreds_of_sequences():
    """There are more sequences than a CTA has threads. Most end within one key tile, and some have no keys."""
    lengths = np.random.default_rng(3).choice([0, 1, 5, 40, 64, 65, 200], 300)
    case = Case("many", b=300, sq=1, sk=200, kv_lengths=tuple(map(int, lengths)), hq=4, hk=2, d=16, dv=16)
    pages.check(paged(case, 16), IMPLEMENTATION)


def test_nested_vmaps_over_queries_and_tables(kernel):
    """Outer: query; inner: tables and lengths. Every pair is a call of its own, and its keys are split."""
    require(kernel)
    call = paged(Case("nested", b=1, sq=1, sk=300, hq=4, hk=2), 16)
    arrays, run = call.arrays, call.call(kernel)
    queries = jnp.stack([arrays["query"], -arrays["query"]])
    tables = jnp.stack([arrays["block_tables"], arrays["block_tables"][:, ::-1], arrays["block_tables"]])
    lengths = jnp.asarray([[300], [0], [170]], jnp.int32)

    def one(query, tables, lengths):
        return run({"query": query, "block_tables": tables, "kv_lengths": lengths})

    mapped = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None)))(queries, tables, lengths)
    for i in range(2):
        for j in range(3):
            for x, y in zip(mapped, one(queries[i], tables[j], lengths[j]), strict=True):
                np.testing.assert_allclose(x[i, j], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("decode", 8), ("decode", 300), ("prefill", 16)])
def test_many_query_heads_and_rows_of_one_kv_head(name, size):
    """Rows of one KV head fill several tiles: 130 heads, or 3 heads of 70 rows."""
    decode = Case(name, b=2, sq=1, sk=40, kv_lengths=(40, 17), hq=130, hk=1)
    prefill = Case(name, b=1, sq=70, sk=90, hq=3, hk=1, causal=True, d=8, dv=8)
    pages.check(paged({"decode": decode, "prefill": prefill}[name], size), IMPLEMENTATION)


@pytest.mark.parametrize(
    ("d", "dv"),
    [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (512, 512), (320, 451)],
    ids=str,
)
def test_few_and_many_rows_of_every_head_dim(d, dv):
    """Decode with 4, 12 and 32 rows per KV head, and batches that also have longer sequences; several tiles of keys."""
    checks.require_case(IMPLEMENTATION, Case("any", d=d, dv=dv, dtype="bfloat16"))
    few = Case("few", b=2, sq=1, sk=300, kv_lengths=(300, 129), hq=8, hk=2, sinks=True)
    many = Case("many", b=2, sq=3, sk=300, kv_lengths=(290, 65), hq=4, hk=1, causal=True, window=(200, None))
    drafted = Case("drafted", b=2, sq=8, sk=300, kv_lengths=(300, 71), hq=8, hk=2, causal=True)
    mixed = varlen("mixed", (1, 70, 2), k_sequences=(300, 290, 40), causal=True, hq=4, hk=1)
    for case in (few, many, drafted, mixed):
        pages.check(paged(case.replace(d=d, dv=dv, dtype="bfloat16"), 16), IMPLEMENTATION)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("float8", FLOAT8)
@pytest.mark.parametrize("width", [8, 64])
def test_every_float8_value_is_read_right(implementation, width, float8, dtype):
    """Sequence i has one key, on page i; its value has the bits of i as float8. Tables have room for more pages."""
    require(implementation)
    every = jnp.arange(256, dtype=jnp.uint8).view(float8)
    values = jnp.broadcast_to(every[:, None, None, None], (256, 1, 1, width))
    tables, lengths = jnp.arange(256, dtype=jnp.int32)[:, None], jnp.ones(256, jnp.int32)
    tables = jnp.pad(tables, ((0, 0), (0, 199)))
    query = jnp.zeros((256, 1, 1, width), dtype)
    keys = jnp.zeros_like(values)
    out = paged_attention(query, keys, values, tables, lengths, implementation=implementation)
    out, values = np.asarray(out, np.float32), np.asarray(values, np.float32)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(out[finite], values[finite])
    assert not np.isfinite(out[~finite]).any()


@pytest.mark.parametrize("float8", FLOAT8)
@pytest.mark.parametrize("d", [32, 80, 128])
def test_few_rows_over_long_float8_pools(d, float8):
    """Several tiles of keys, with the scales of the pools."""
    for dtype in ("bfloat16", "float16"):
        few = Case("few", b=2, sq=1, sk=300, kv_lengths=(300, 129), hq=8, hk=2, d=d, dv=d, dtype=dtype)
        pages.check(paged(few, 16, pool_dtype=float8), IMPLEMENTATION)


@pytest.mark.parametrize("float8", FLOAT8)
def test_float8_pools_take_queries_of_any_size(implementation, float8):
    """Queries are 2^60 times larger or smaller, and the scale of the keys makes up for it."""
    require(implementation)
    call = paged(DECODE.replace(dtype="bfloat16", d=64, dv=64, hq=4, hk=2), 8, pool_dtype=float8)
    plain = call.call(implementation)({})
    powers = jnp.asarray([60, -60])
    query = call.arrays["query"] * jnp.repeat(2.0**powers, 2)[:, None].astype("bfloat16")
    scaled = call.call(implementation)({"query": query, "k_scale": call.arrays["k_scale"] * 2.0**-powers})
    for x, y in zip(scaled, plain, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("given", ["neither", "k_scale", "v_scale", "both"])
def test_scales_of_float8_pools_are_optional_each(given):
    """Compared with the same values in float32 pools."""
    require(IMPLEMENTATION)
    call = paged(DECODE.replace(sk=30), pool_dtype=FLOAT8[0])
    scales = {n: jnp.asarray([0.3, 1.7], jnp.float32) for n in ("k_scale", "v_scale") if given in (n, "both")}
    arrays = {n: x for n, x in call.arrays.items() if n not in ("k_scale", "v_scale")} | scales
    wide = {
        name: call.arrays[name].astype(jnp.float32) * scales.get(scale, jnp.ones(1))[:, None]
        for name, scale in (("key", "k_scale"), ("value", "v_scale"))
    }

    def run(arrays, implementation):
        arrays = dict(arrays)
        positional = [arrays.pop(n) for n in ("query", "key", "value", "block_tables", "kv_lengths")]
        return paged_attention(*positional, **arrays, implementation=implementation)

    plain = {n: x for n, x in arrays.items() if n not in scales} | wide
    wanted = run(plain, "xla")
    for implementation in (IMPLEMENTATION, "xla"):
        np.testing.assert_allclose(run(arrays, implementation), wanted, rtol=2e-5, atol=2e-5)


def test_a_contiguous_cache_is_a_pool(implementation):
    """[b, s_max, hk, d]: one page per sequence."""
    require(implementation)
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.standard_normal((3, 40, 2, 16)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((3, 2, 4, 16)), jnp.float32)
    lengths = jnp.asarray([40, 7, 3], jnp.int32)
    tables = jnp.arange(3, dtype=jnp.int32)[:, None]
    out = paged_attention(q, cache, cache, tables, lengths, causal=True, implementation=implementation)
    wanted = flash_attention(q, cache, cache, kv_lengths=lengths, causal=True, implementation="xla")
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


def test_sequences_share_pages(implementation):
    """Two sequences share the two pages of a common prefix; results are those of separate copies."""
    require(implementation)
    case = Case("shared", b=2, sq=3, sk=20, kv_lengths=(20, 20), causal=True)
    call = paged(case, 8)
    tables = call.arrays["block_tables"].at[1, :2].set(call.arrays["block_tables"][0, :2])
    same = [np.asarray(call.inputs.positional[name]) for name in ("key", "value")]
    key, value = (np.concatenate([x[:1], np.concatenate([x[:1, :16], x[1:, 16:]], 1)]) for x in same)
    out, _ = call.call(implementation)({"block_tables": tables})
    query = call.inputs.positional["query"]
    wanted = flash_attention(query, jnp.asarray(key), jnp.asarray(value), causal=True, implementation="xla")
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)


# Lengths and tables, whatever they hold.


def test_lengths_are_clamped_to_the_table(implementation):
    require(implementation)
    case = Case("clamped", b=3, sq=1, sk=16, kv_lengths=(16, 0, 16))
    call = paged(case, 4)
    tables = call.arrays["block_tables"][:, :4]
    right = call.call("xla")({"block_tables": tables})
    wild = jnp.asarray([2**31 - 1, -(2**31), 17], jnp.int32)
    got = call.call(implementation)({"block_tables": tables, "kv_lengths": wild})
    for x, y in zip(got, right, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_a_missing_page_counts_for_the_rows_that_see_it_at_clamped_lengths(implementation):
    """In a window, the rows that see a page depend on the diagonal, which depends on the clamped length."""
    require(implementation)
    call = paged(Case("clamped", b=1, sq=2, sk=16, window=(5, 0)), 4)
    tables = call.arrays["block_tables"][:, :4].at[0, 3].set(-1)  # keys 12 to 15: seen by both rows
    for length in (16, 17, 1000, 2**31 - 1):
        lengths = {"block_tables": tables, "kv_lengths": jnp.asarray([length], jnp.int32)}
        out, lse = call.call(implementation)(lengths)
        pages.assert_nan_where(np.ones((1, 2), bool), out, lse)


def test_more_causal_queries_than_keys_leave_the_first_rows_empty(implementation):
    require(implementation)
    call = paged(Case("few keys", b=2, sq=6, sk=4, kv_lengths=(4, 1), causal=True, sinks=True, hq=4), 3)
    out, lse = map(np.asarray, call.call(implementation)({}))
    assert (out[0, :2] == 0).all()
    assert (out[1, :5] == 0).all()
    sinks = np.asarray(call.arrays["sinks"])
    np.testing.assert_allclose(lse[0, :, :2], np.broadcast_to(sinks[:, None], (4, 2)), rtol=1e-6)
    pages.check(call, implementation)


OUTSIDE = [-1, -(2**31), 2**31 - 1, "p"]


@pytest.mark.parametrize("page", OUTSIDE, ids=str)
@by_name(
    [
        CHUNK.replace(causal=True),
        CHUNK.replace(name="window", window=(4, 0), softcap=3.0),
        CHUNK.replace(name="prefill", sq=20, kv_lengths=(25, 22, 21), causal=True),
        MIXED,
    ]
)
def test_a_page_outside_the_pool_makes_the_rows_that_see_it_nan(implementation, case, page):
    """Every other row keeps the bits that it has when the page lies in the pool."""
    require(implementation)
    size = 3
    call = paged(case, size)
    z, entry = 0, 6  # keys 18 to 20 of the first sequence
    tables = call.arrays["block_tables"]
    bad = tables.at[z, entry].set(call.pages.count if page == "p" else page)
    got, whole = call.call(implementation)({"block_tables": bad}), call.call(implementation)({})
    hit = rows_that_see(case, z, range(entry * size, (entry + 1) * size))
    assert hit.any()
    pages.assert_nan_where(hit, *got)
    pages.assert_same_rows(~hit, got, whole, "where another row misses a page")


def test_a_prefill_in_pages_of_eight_keys_whose_last_page_is_outside_the_pool(kernel):
    """On Hopper, pages of eight rows are loaded by TMA; this page must not be loaded."""
    case = CHUNK.replace(name="prefill", b=2, sq=70, sk=170, kv_lengths=(168, 130), causal=True)
    case = case.replace(d=64, dv=64, dtype="bfloat16")
    require(kernel, case)
    call = paged(case, 8)
    bad = call.arrays["block_tables"].at[0, 20].set(-1)  # keys 160 to 167
    got, whole = call.call(kernel)({"block_tables": bad}), call.call(kernel)({})
    hit = rows_that_see(case, 0, range(160, 168))
    assert hit.sum() == 8
    pages.assert_nan_where(hit, *got)
    pages.assert_same_rows(~hit, got, whole, "where another row misses a page")


def rows_that_see(case, z, keys):
    """Which query rows see any of these keys of sequence z: [b, sq] or [tq]."""
    nk = pages.sequence_lengths(case)[z]
    nq = case.sq if case.layout == "fixed" else case.q_sequences[z]
    left, right = case.window or (None, None)
    right = 0 if case.causal else right
    rows = np.arange(nq) + nk - nq
    seen = np.zeros(nq, bool)
    for j in keys:
        seen |= (j < nk) & (left is None or (j >= rows - left)) & (right is None or (j <= rows + right))
    shape = (case.b, case.sq) if case.layout == "fixed" else (sum(case.q_sequences) + case.padding[0],)
    hit = np.zeros(shape, bool)
    hit[z if case.layout == "fixed" else slice(0, nq)] = seen
    return hit


GARBAGE = {
    "causal": {"causal": True},
    "a draft mask": {"draft_mask": np.random.default_rng(1).random((4, 3, 3)) < 0.5},
    "a boolean array": {"mask": masks.dense(np.random.default_rng(2).random((1, 4, 9, 7)) < 0.5)},
}


@pytest.mark.parametrize("options", GARBAGE.values(), ids=GARBAGE)
def test_garbage_of_every_kind_at_once(kernel, options):
    """With random bits in tables, lengths and offsets every result is an average of the pool's values, 0 or NaN."""
    require(kernel)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((9, 4, 16)), jnp.float32)
    pool = jnp.asarray(rng.uniform(1, 2, (5, 3, 2, 16)), jnp.float32)
    call = jax.jit(lambda *a: paged_attention(*a[:5], cu_seqlens_q=a[5], implementation=kernel, **options))
    for _ in range(20):
        tables, lengths, cu = (
            jnp.asarray(rng.integers(-(2**31), 2**31, shape) >> int(rng.integers(0, 30)), jnp.int32)
            for shape in ((4, 6), (4,), (5,))
        )
        out = np.asarray(call(q, pool, pool, tables, lengths, cu))
        assert (np.isnan(out) | (out == 0) | ((out > 0.999) & (out < 2.001))).all()


@pytest.mark.parametrize("shape", ["no sequences", "no queries", "no table", "no pages", "no padding"])
def test_sizes_of_zero(implementation, shape):
    require(implementation)
    n, sq, entries, count = {
        "no sequences": (0, 1, 2, 3), "no queries": (2, 0, 2, 3), "no table": (2, 1, 0, 3), "no pages": (2, 1, 2, 0),
        "no padding": (2, 1, 2, 3),
    }[shape]  # fmt: skip
    pool = jnp.ones((count, 4, 2, 16), jnp.float32)
    out, lse = paged_attention(
        jnp.ones((n, sq, 4, 16)), pool, pool, jnp.zeros((n, entries), jnp.int32), jnp.full(n, 8, jnp.int32),
        return_lse=True, implementation=implementation,
    )  # fmt: skip
    assert out.shape == (n, sq, 4, 16)
    assert lse.shape == (n, 4, sq)
    wanted = {"no table": (0, -np.inf), "no pages": (np.nan, np.nan)}.get(shape, (1, 4 + np.log(8)))
    np.testing.assert_allclose(out, wanted[0], rtol=1e-6)
    np.testing.assert_allclose(lse, wanted[1], rtol=1e-6)
