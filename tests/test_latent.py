"""Latent pools (multi-head latent attention): one pool, whose first columns are the values, against the oracle."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pages
import pytest
from cases import Case, varlen
from conftest import IMPLEMENTATION
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from pages import FLOAT8, latent, require
from programs import collectives, require_devices

from jax_flash import append_kv, flops, masks, merge_attention, paged_attention
from jax_flash.operands import BACKWARD, BIAS_GRADIENT, FORWARD, TANGENT
from jax_flash.primitives import bind
from jax_flash.spec import AttentionSpec

# As in DeepSeek-V2 and V3: 128 query heads over one KV head of 576 columns, of which the first 512 are values.
WIDE = dict(hk=1, d=576, dv=512)
DECODE = Case("decode", b=3, sq=1, sk=200, kv_lengths=(200, 0, 77), hq=16, **WIDE)
ALL_HEADS = DECODE.replace(name="all heads", hq=128)
DRAFTED = DECODE.replace(name="drafted", sq=5, causal=True, kv_lengths=(200, 3, 77))
MIXED = varlen(
    "mixed", (1, 9, 0, 1, 2), k_sequences=(130, 20, 5, 0, 66), padding=(3, 0), causal=True, hq=16, **WIDE
)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


OPTIONS = [
    DECODE,
    ALL_HEADS,
    DRAFTED,
    MIXED,
    MIXED.replace(name="mixed, all heads", hq=128),
    DECODE.replace(name="several KV heads", hq=8, hk=2),
    DRAFTED.replace(name="more heads than a tile has rows", hq=72, sq=2),
    DRAFTED.replace(name="window", window=(70, 0)),
    ALL_HEADS.replace(name="bounds that are raised from tile to tile", scale=1.0),
    DRAFTED.replace(
        name="every option", window=(150, 0), softcap=3.0, sinks="token", alibi_slopes=(16,), scale=-0.1
    ),
    MIXED.replace(name="top left", align="top_left"),
    DECODE.replace(name="other head dims", d=320, dv=264),
    DECODE.replace(name="values as wide as keys", d=72, dv=72),
    DECODE.replace(name="small and odd head dims", d=45, dv=31, hq=6, hk=2),
    DECODE.replace(name="bounds of few rows that are raised from tile to tile", scale=1.0),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@by_name(OPTIONS)
def test_each_option(case, dtype):
    pages.check(latent(case.replace(dtype=dtype), 16), IMPLEMENTATION)


@by_name([DECODE, ALL_HEADS, DRAFTED, MIXED])
def test_float32(case):
    if IMPLEMENTATION == "cuda":
        pytest.skip("CUDA has kernels of 16-bit latent pools")
    pages.check(latent(case, 16), IMPLEMENTATION)


@by_name(OPTIONS[::3])
def test_each_option_in_plain_jax(case):
    pages.check(latent(case), "xla")


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("size", [1, 5, 16, 64, 100, 512])
def test_any_page_size(size, layout):
    case = DRAFTED.replace(hq=32, hk=2, sq=2, kv_lengths=(200, 128, 65), dtype="bfloat16")
    pages.check(latent(case, size, layout), IMPLEMENTATION)


@pytest.mark.parametrize("options", [{"num_splits": 3}, {"batch_invariant": True}], ids=str)
@by_name([DECODE.replace(sk=5000, kv_lengths=(5000, 2100, 77)), MIXED])
def test_fixed_splits(case, options):
    pages.check(latent(case.replace(dtype="bfloat16"), 64), IMPLEMENTATION, **options)


@pytest.mark.parametrize("heads", [16, 80])
def test_many_sequences_of_other_lengths(heads):
    """There are more work items than a GPU has CTAs, and some items that many CTAs share."""
    longest = 3000 if IMPLEMENTATION == "cuda" else 301  # only CUDA depends on it
    lengths = np.random.default_rng(0).choice([0, 1, 63, 64, 65, 300, longest], 60)
    case = ALL_HEADS.replace(
        b=60, sk=longest, kv_lengths=tuple(map(int, lengths)), dtype="bfloat16", hq=heads
    )
    pages.check(latent(case, 64), IMPLEMENTATION)


@pytest.mark.parametrize("heads", [16, 80])
def test_a_batch_invariant_sequence_keeps_its_bits(kernel, heads):
    require(kernel, DECODE.replace(dtype="bfloat16"))
    case = DECODE.replace(sk=4500, kv_lengths=(4500, 2100, 77), dtype="bfloat16", hq=heads)
    call = latent(case, 64)
    run = call.call(kernel, batch_invariant=True)
    out, lse = run({})
    alone = {name: call.arrays[name][1:2] for name in ("query", "block_tables", "kv_lengths")}
    for x, y in zip(run(alone), (out[1:2], lse[1:2]), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("page", [-1, 2**31 - 1])
def test_a_page_outside_the_pool_makes_the_rows_that_see_it_nan(implementation, page):
    case = DRAFTED.replace(sk=40, kv_lengths=(37, 40, 12), dtype="bfloat16", window=(4, 0))
    require(implementation, case)
    call = latent(case, 3)
    # The missing page has keys 33 to 35. Rows 0 to 4 are at positions 32 to 36, so that all but row 0 see them.
    bad = call.arrays["block_tables"].at[0, 11].set(page)
    got, whole = call.call(implementation)({"block_tables": bad}), call.call(implementation)({})
    hit = np.zeros((3, 5), bool)
    hit[0, 1:] = True
    pages.assert_nan_where(hit, *got)
    pages.assert_same_rows(~hit, got, whole, "where another row misses a page")


def test_a_draft_mask_hides_new_tokens(kernel):
    for heads in (16, 128):
        case = DRAFTED.replace(hq=heads, draft_mask=(3, 5, 5), dtype="bfloat16")
        require(kernel, case)
        pages.check(latent(case, 16), kernel)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("heads", [16, 128])
def test_pages_that_ranges_hide_are_not_read(heads, tokens, packed, kernel):
    require(kernel, DECODE.replace(dtype="bfloat16", hq=heads))
    keys, size, d = 1024, 64, 576
    rng = np.random.default_rng(heads)
    q, pool = (
        jnp.asarray(rng.standard_normal(x), "bfloat16")
        for x in ((2, tokens, heads, d), (2 * keys // size, size, 1, d))
    )
    tables = jnp.arange(len(pool), dtype=jnp.int32).reshape(2, -1)
    mask = masks.window(jnp.array([200, 5], jnp.int32), 0, offset=keys - tokens)
    if packed:
        at = np.arange(keys - tokens, keys)
        mask = masks.ranges(
            jnp.asarray(np.concatenate((at - 200, at - 5)), jnp.int32)[None],
            jnp.asarray(np.tile(at + 1, 2), jnp.int32)[None],
        )

    @jax.jit
    def attend(pool):
        options = {"value_dim": 512, "mask": mask, "implementation": kernel}
        if packed:
            options["cu_seqlens_q"] = jnp.array([0, tokens, 2 * tokens], jnp.int32)
        rows = q.reshape(-1, heads, d) if packed else q
        return paged_attention(rows, pool, None, tables, jnp.full(2, keys, jnp.int32), **options)

    rows, at = np.arange(keys - tokens, keys)[:, None], np.arange(keys)
    seen = np.stack([(rows - left <= at) & (at <= rows) for left in (200, 5)])
    whole = pool.reshape(2, keys, 1, d)
    out = np.asarray(attend(whole.at[:, :700].set(jnp.nan).reshape(pool.shape)))
    oracle.assert_out(out.reshape((*q.shape[:3], 512)), *oracle.plain_outs(q, whole, whole[..., :512], seen))


@pytest.mark.parametrize("float8", FLOAT8)
def test_float8_pools_have_one_scale_for_keys_and_values(float8):
    if IMPLEMENTATION == "cuda":
        pytest.skip("CUDA has kernels of 16-bit latent pools")
    for case in (DECODE.replace(dtype="bfloat16"), DRAFTED, DRAFTED.replace(hq=8, hk=2)):
        pages.check(latent(case, 16, pool_dtype=float8), IMPLEMENTATION)


def test_a_contiguous_cache_is_a_pool(implementation):
    case = ALL_HEADS.replace(dtype="bfloat16")
    require(implementation, case)
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.standard_normal((3, 200, 1, 576)), jnp.bfloat16)
    query = jnp.asarray(rng.standard_normal((3, 1, 128, 576)), jnp.bfloat16)
    tables, lengths = jnp.arange(3, dtype=jnp.int32)[:, None], jnp.asarray([200, 7, 129], jnp.int32)

    def run(pool, tables):
        return paged_attention(
            query, pool, None, tables, lengths, value_dim=512, implementation=implementation
        )

    paged = run(cache.reshape(3 * 25, 8, 1, 576), jnp.arange(75, dtype=jnp.int32).reshape(3, 25))
    np.testing.assert_array_equal(run(cache, tables), paged)


def test_parts_of_the_keys_merge_to_the_whole(implementation):
    case = DECODE.replace(dtype="bfloat16", sk=192, kv_lengths=(192, 130, 64))
    require(implementation, case)
    call = latent(case, 64)
    run = call.call(implementation)
    lengths, tables = call.arrays["kv_lengths"], call.arrays["block_tables"]
    parts = [
        run({"block_tables": tables[:, first:end], "kv_lengths": jnp.clip(lengths - 64 * first, 0, 64 * (end - first))})
        for first, end in ((0, 1), (1, 3))
    ]  # fmt: skip
    merged = merge_attention(*zip(*parts, strict=True))
    oracle.assert_result(
        oracle.Result(*map(np.asarray, merged)), *pages.references(call, gradients=False), case
    )


def test_vmap_over_queries_and_tables(implementation):
    case = DECODE.replace(b=1, kv_lengths=(200,), dtype="bfloat16", hq=80)
    require(implementation, case)
    call = latent(case, 16)
    run = call.call(implementation)
    queries = jnp.stack([call.arrays["query"], -call.arrays["query"]])
    used = call.arrays["block_tables"]
    tables = jnp.stack([used, used.at[:, :12].set(used[:, 11::-1])])  # 200 tokens fill 12 pages
    lengths = jnp.asarray([[200], [130]], jnp.int32)

    def one(query, tables, lengths):
        return run({"query": query, "block_tables": tables, "kv_lengths": lengths})

    mapped = jax.jit(jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None)))(queries, tables, lengths)
    for i, j in np.ndindex(2, 2):
        key = pages.gathered(call.arrays["key"], tables[j], case.sk)
        dense = {"query": queries[i], "key": key, "value": key[..., : case.dv], "kv_lengths": lengths[j]}
        right = oracle.references(case, checks.with_arrays(call.inputs, **dense), gradients=False)
        oracle.assert_result(oracle.Result(*(np.asarray(x[i, j]) for x in mapped)), *right, case)


def test_query_heads_are_split_over_devices_without_communication(kernel, axis_type):
    require_devices(8)
    case = ALL_HEADS.replace(dtype="bfloat16")
    require(kernel, case)
    mesh = jax.make_mesh((8,), ("heads",), axis_types=(axis_type,))
    call = latent(case, 16)
    by_heads, whole = NamedSharding(mesh, P(None, None, "heads")), NamedSharding(mesh, P())
    arrays = {n: jax.device_put(x, by_heads if n == "query" else whole) for n, x in call.arrays.items()}
    program = jax.jit(call.call(kernel)).lower(arrays).compile()
    assert not collectives(program.as_text())
    out, lse = program(arrays)
    assert out.sharding.is_equivalent_to(by_heads, 4)
    got = oracle.Result(np.asarray(out), np.asarray(lse))
    oracle.assert_result(got, *pages.references(call, gradients=False), case)


def test_gradients_in_plain_jax():
    """The pool's gradient is that of its keys and, in the first columns, of its values."""
    call = latent(DRAFTED.replace(sk=40, kv_lengths=(37, 3, 12), hq=8), 8)
    got = pages.check(call, "xla", gradients=True)
    assert got.gradients.keys() == {"query", "key"}


def test_gradients_of_small_head_dims(implementation):
    case = DRAFTED.replace(sk=40, kv_lengths=(37, 3, 12), hq=8, d=24, dv=16)
    require(implementation, case)
    call = latent(case, 8)
    pages.check(call, implementation, gradients=True)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_wide_head_dims_have_no_derivative_in_the_kernels(kernel, mode):
    call = latent(DECODE.replace(dtype="bfloat16"), 16)
    query = call.arrays["query"]

    def out(x):
        return call.call(kernel)({"query": x})[0].astype("float32").sum()

    derivative = jax.grad(out) if mode == "reverse" else lambda x: jax.jvp(out, (x,), (x,))
    message = 'the head dim is 576, and the kernels of derivatives have at most 512; implementation="xla"'
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(derivative).lower(query)


@pytest.mark.parametrize("dims", [(520, 64), (64, 520), (576, 512)], ids=str)
@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, BIAS_GRADIENT, TANGENT], ids=lambda pass_: pass_.name)
def test_the_cpu_kernels_refuse_head_dims_past_their_buffers(pass_, dims):
    """The handlers themselves refuse them, whatever Python has checked before."""
    if IMPLEMENTATION != "cpu":
        pytest.skip("CUDA plans each call, and a plan needs a kernel of the head dims (test_plan.py)")
    sizes = dict(b=1, sq=2, sk=3, columns=3, hq=2, hk=1, d=dims[0], dv=dims[1])
    spec = AttentionSpec("fixed", operands=("bias",))
    arrays = {
        name: jnp.zeros([sizes[x.strip("*")] for x in spec.dims[name]]) for name in (*pass_.operands, "bias")
    }
    message = f"head dims {dims[0]} and {dims[1]} exceed the CPU kernels' 512 and 512"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(bind(pass_, spec, arrays))


def test_flop_counts_both_products():
    shape = jax.ShapeDtypeStruct
    arrays = shape((2, 1, 16, 576), "bfloat16"), shape((9, 64, 1, 576), "bfloat16")
    tables, lengths = shape((2, 4), "int32"), np.asarray([100, 30], np.int32)
    assert flops(paged_attention, *arrays, None, tables, lengths, value_dim=512) == 2 * 16 * 130 * (576 + 512)


# append_kv.


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("d", [576, 45])
def test_tokens_are_appended_to_the_one_pool(implementation, layout, d):
    require(implementation)
    rng = np.random.default_rng(0)
    shape = (7, 4, 1, d) if layout == "nhd" else (7, 1, 4, d)
    pool = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    new = jnp.asarray(rng.standard_normal((2, 3, 1, d)), jnp.bfloat16)
    tables = jnp.asarray([[3, 1, 99], [0, 6, 2]], jnp.int32)
    lengths = jnp.asarray([6, 1], jnp.int32)

    def run(implementation):
        return append_kv(
            pool, None, new, None, tables, lengths, page_layout=layout, implementation=implementation
        )

    appended, values, after = run(implementation)
    assert values is None
    assert after.tolist() == [8, 4]  # the third token of the first sequence has no page
    np.testing.assert_array_equal(appended, run("xla")[0])
    by_token = jnp.swapaxes(appended, 1, 2) if layout == "hnd" else appended
    np.testing.assert_array_equal(by_token[1, 2:], new[0, :2])
    np.testing.assert_array_equal(by_token[0, 1:], new[1])


def test_tokens_are_appended_to_a_pool_with_dynamic_scales(implementation):
    require(implementation)
    pool, scale = jnp.zeros((3, 4, 1, 48), jnp.float8_e4m3fn), jnp.ones((3, 1))
    new = jnp.full((2, 2, 1, 48), 1000.0)
    tables = jnp.asarray([[2], [0]], jnp.int32)
    got, values, lengths, scale, of_values = append_kv(
        pool, None, new, None, tables, 0, k_scale=scale, scale="dynamic", implementation=implementation
    )
    assert values is None
    assert of_values is None
    assert lengths.tolist() == [2, 2]
    wide = got.astype(jnp.float32) * scale[:, None, :, None]
    np.testing.assert_allclose(wide[jnp.array([2, 0]), :2], new, rtol=1 / 16)


def test_append_is_in_place_where_the_pool_is_donated(implementation):
    require(implementation)
    append = jax.jit(
        lambda pool, new, tables, lengths: append_kv(
            pool, None, new, None, tables, lengths, implementation=implementation
        ),
        donate_argnums=0,
    )
    pool = jnp.zeros((7, 4, 1, 576), jnp.bfloat16)
    place = pool.unsafe_buffer_pointer()
    tables = jnp.asarray([[3, 1]], jnp.int32)
    pool, values, _ = append(pool, jnp.ones((1, 2, 1, 576), jnp.bfloat16), tables, jnp.zeros(1, jnp.int32))
    assert values is None
    if implementation != "xla":
        assert pool.unsafe_buffer_pointer() == place
    assert float(pool.astype("float32").sum()) == 2 * 576
