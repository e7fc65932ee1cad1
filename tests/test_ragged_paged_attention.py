"""compat.ragged_paged_attention against jax's own reference, and serving engines' caches against one written here."""

from functools import partial

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pages
import pytest
from cases import make_inputs, varlen
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import (
    ref_ragged_paged_attention as reference,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_same, collectives, require_devices

from jax_flash.compat.ragged_paged_attention import ragged_paged_attention, ragged_paged_attention_update

pytestmark = pytest.mark.usefixtures("exact_products")

SIZE, PAGES, TABLE = 8, 24, 5
# (new tokens, keys in all); garbage stands past the sequences in use.
SEQUENCES = ((10, 33), (1, 8), (20, 40), (1, 1))
TOKENS = 37


def batch(layout="table"):
    rng = np.random.default_rng(0)
    tables = rng.permutation(PAGES)[: 4 * TABLE].reshape(4, TABLE).astype(np.int32)
    new, lengths = zip(*SEQUENCES)
    kv_lens = np.array([*lengths, 10**6, -3], np.int32)
    offsets = np.array([*np.cumsum((0, *new)), -5, 10**6], np.int32)
    made = {"kv_lens": kv_lens, "cu_q_lens": offsets}
    whole = np.concatenate([tables, tables[2:]])  # after the rows in use, those of sequences that have ended
    if layout == "packed":  # each sequence's pages follow those of the one before
        used = [-(-x // SIZE) for x in lengths]
        packed = np.concatenate([row[:n] for row, n in zip(tables, used)])
        made["page_indices"] = np.pad(packed, (0, 7), constant_values=-1)
        made["cu_kv_lens"] = np.array([*(SIZE * np.cumsum((0, *used))), 99, -9], np.int32)
    else:
        made["page_indices"] = whole.reshape(-1) if layout == "flat" else whole
    return {name: jnp.asarray(x) for name, x in made.items()}, tables


def random(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def updated(cache_rows, tables, key, value):
    """The K and V of each sequence after the new ones are written; cache_rows [p, ps, hk, 2, d] is changed in place."""
    row = 0
    for table, (new, length) in zip(tables, SEQUENCES):
        for position in range(length - new, length):
            page, slot = table[position // SIZE], position % SIZE
            cache_rows[page, slot, :, 0], cache_rows[page, slot, :, 1] = key[row], value[row]
            row += 1
    return [cache_rows[t].reshape(-1, *cache_rows.shape[2:])[:n] for t, (_, n) in zip(tables, SEQUENCES)]


def attended(query, rows, scale, causal=True, window=None, softcap=None, sinks=None):
    out, row = np.zeros(query.shape), 0
    for kv, (new, length) in zip(rows, SEQUENCES):
        k, v = (np.repeat(kv[:, :, i], query.shape[1] // kv.shape[1], 1) for i in (0, 1))
        s = scale * np.einsum("qhd,khd->hqk", query[row : row + new], k)
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        distance = (length - new + np.arange(new))[:, None] - np.arange(length)
        hidden = (distance < 0 if causal else False) | (distance >= window if window else False)
        s = np.where(hidden, -np.inf, s)
        if sinks is not None:
            s = np.concatenate([s, np.broadcast_to(sinks[:, None, None], (*s.shape[:2], 1))], -1)
        p = np.exp(s - s.max(-1, keepdims=True))
        p = (p / p.sum(-1, keepdims=True))[..., :length]
        out[row : row + new] = np.einsum("hqk,khd->qhd", p, v)
        row += new
    return out


def rounded(query, pool, tables, sliding_window=None, soft_cap=None, sm_scale=1.0, k_scale=1.0, v_scale=1.0):
    """out of plain attention with S and P rounded to the dtype of the query."""
    (new, lengths), window = zip(*SEQUENCES), sliding_window and (sliding_window - 1, 0)
    sizes = {"hq": query.shape[1], "hk": pool.shape[2] // 2, "d": 64, "dv": 64, "dtype": str(query.dtype)}
    options = {"causal": window is None, "window": window, "softcap": soft_cap, "scale": sm_scale}
    case = varlen("ragged", new, k_sequences=lengths, **sizes, **options)
    rows = np.concatenate([pages.gathered(pool, t[None], n)[0] for t, n in zip(tables, lengths)])
    arrays = {"query": query[: sum(new)], "key": rows[:, ::2] * k_scale, "value": rows[:, 1::2] * v_scale}
    return oracle.low(case, checks.with_arrays(make_inputs(case), **arrays), gradients=False).out


OPTIONS = [
    {},
    {"sliding_window": 5, "soft_cap": 3.0, "sm_scale": 0.2},
    {"k_scale": 0.5, "v_scale": 2.0, "sm_scale": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["table", "flat"])
def test_as_jaxs_own(implementation, dtype, options, layout):
    rng = np.random.default_rng(1)
    given, tables = batch(layout)
    query, pool = random(rng, (TOKENS, 8, 64), dtype), random(rng, (PAGES, SIZE, 4, 64), dtype)
    of_jax = given | {"page_indices": jnp.clip(batch()[0]["page_indices"], 0, PAGES - 1)}
    count, (new, _) = jnp.asarray([4]), zip(*SEQUENCES)
    wanted = reference(query.astype("float32"), pool.astype("float32"), **of_jax, num_seqs=count, **options)
    got = ragged_paged_attention(
        query, pool, **given, num_seqs=count, **options, implementation=implementation
    )
    low, softcap = rounded(query, pool, tables, **options), "soft_cap" in options
    oracle.assert_out(np.asarray(got[: sum(new)]), np.asarray(wanted), low, softcap=softcap)
    assert got.dtype == dtype
    assert not np.asarray(got[sum(new) :], np.float32).any()


def test_gradients_as_jaxs_own(implementation):
    rng = np.random.default_rng(2)
    given, _ = batch()
    query, pool = random(rng, (TOKENS, 8, 64), "float32"), random(rng, (PAGES, SIZE, 4, 64), "float32")
    given |= {"page_indices": jnp.clip(given["page_indices"], 0, PAGES - 1)}
    count, used = jnp.asarray([4]), sum(new for new, _ in SEQUENCES)
    weight = random(rng, (used, 8, 64), "float32")

    def loss(function, **options):
        return lambda q, p: (
            function(q, p, **given, num_seqs=count, sm_scale=0.3, **options)[:used] * weight
        ).sum()

    ours = loss(ragged_paged_attention, implementation=implementation)
    found = jax.jit(jax.grad(ours, (0, 1)))(query, pool)
    for x, y in zip(found, jax.grad(loss(reference), (0, 1))(query, pool), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


CACHES = {  # layout, and shape of the cache past [p, ps], for 2 KV heads
    "interleaved": ("interleaved", (4, 64)),
    "interleaved, packed": ("interleaved", (2, 2, 128)),
    "interleaved, padded heads": ("interleaved", (2, 4, 128)),
    "concatenated": ("concatenated", (2, 128)),
    "concatenated, packed": ("concatenated", (1, 2, 128)),
    "concatenated, padded heads": ("concatenated", (1, 4, 128)),
}


def in_cache(rows, layout, shape):
    """[p, ps, hk, 2, d] in a cache's shape, with zeros in padding heads and in padding columns past d."""
    heads, columns = int(np.prod(shape[:-1])), shape[-1]
    pairs, width = (heads // 2, columns) if layout == "interleaved" else (heads, columns // 2)
    wide = np.zeros((PAGES, SIZE, pairs, 2, width), np.float32)
    wide[:, :, : rows.shape[2], :, : rows.shape[-1]] = rows
    return wide.reshape(PAGES, SIZE, *shape)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("options", [
    {}, {"sliding_window": 5, "soft_cap": 3.0, "attention_sink": True}, {"use_causal_mask": False},
    {"use_causal_mask": False, "sliding_window": 6, "attention_sink": True},
], ids=str)  # fmt: skip
def test_new_keys_are_written_and_attended_to(implementation, kind, options):
    layout, shape = CACHES[kind]
    rng = np.random.default_rng(3)
    given, tables = batch("packed" if kind == "interleaved" else "flat")
    query, key, value = (random(rng, (TOKENS, h, 64), "float32") for h in (6, 2, 2))
    rows = rng.standard_normal((PAGES, SIZE, 2, 2, 64)).astype(np.float32)
    cache = jnp.asarray(in_cache(rows, layout, shape))
    sinks = rng.standard_normal(6).astype(np.float32) if options.get("attention_sink") else None
    got, after = ragged_paged_attention_update(
        query, key, value, cache, **given, distribution=jnp.asarray([1, 2, 4]), layout=layout, sm_scale=0.125,
        implementation=implementation, **options | {"attention_sink": sinks},
    )  # fmt: skip
    each = updated(rows, tables, np.asarray(key), np.asarray(value))
    wanted = attended(
        np.asarray(query), each, 0.125, options.get("use_causal_mask", True), options.get("sliding_window"),
        options.get("soft_cap"), sinks,
    )  # fmt: skip
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after, in_cache(rows, layout, shape))


def test_a_shared_cache_is_only_read(implementation):
    rng = np.random.default_rng(4)
    given, tables = batch("flat")
    query, key = random(rng, (TOKENS, 4, 64), "float32"), random(rng, (TOKENS, 2, 64), "float32")
    rows = rng.standard_normal((PAGES, SIZE, 2, 2, 64)).astype(np.float32)
    cache = jnp.asarray(rows.reshape(PAGES, SIZE, 4, 64))
    got, after = ragged_paged_attention_update(
        query, key * np.nan, key * np.nan, cache, **given, distribution=4, update_kv_cache=False,
        implementation=implementation, sm_scale=0.2,
    )  # fmt: skip
    each = [rows[t].reshape(-1, 2, 2, 64)[:n] for t, (_, n) in zip(tables, SEQUENCES)]
    np.testing.assert_allclose(got, attended(np.asarray(query), each, 0.2), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after, cache)


@pytest.mark.parametrize("stored", [True, False], ids=["quantised keys", "wide keys"])
@pytest.mark.parametrize("heads", [1, 2])
def test_float8_caches(implementation, stored, heads):
    """Packed by 4, one KV head's K and V are followed by two heads of padding."""
    float8, k_scale, v_scale = jnp.float8_e4m3fn, 0.5, 2.0
    rng = np.random.default_rng(5)
    given, tables = batch("flat")
    query = random(rng, (TOKENS, 4, 64), "float32")
    key, value = (random(rng, (TOKENS, heads, 64), float8).astype("float32") for _ in range(2))
    new = (key, value) if stored else (key * k_scale, value * v_scale)
    rows = np.asarray(random(rng, (PAGES, SIZE, heads, 2, 64), float8), np.float32)
    cache = jnp.asarray(in_cache(rows, "interleaved", (1, 4, 128)), float8)
    with jax.numpy_rank_promotion("raise"):  # as tpu-inference's tests have it
        got, after = ragged_paged_attention_update(
            query, *(x.astype(float8) if stored else x for x in new), cache, **given,
            distribution=jnp.asarray([0, 0, 4]), k_scale=k_scale, v_scale=v_scale, sm_scale=0.2,
            implementation=implementation,
        )  # fmt: skip
    each = updated(rows, tables, np.asarray(key), np.asarray(value))
    scales = np.array([k_scale, v_scale])[:, None]
    wanted = attended(np.asarray(query), [x * scales for x in each], 0.2)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(after, np.float32), in_cache(rows, "interleaved", (1, 4, 128)))


def test_queries_are_rounded_where_they_have_a_scale(kernel):
    rng = np.random.default_rng(6)
    given, _ = batch("flat")
    query, key = random(rng, (TOKENS, 4, 64), "bfloat16"), random(rng, (TOKENS, 2, 64), "float8_e4m3fn")
    cache = jnp.zeros((PAGES, SIZE, 1, 4, 128), "float8_e4m3fn")
    call = dict(given, distribution=4, sm_scale=0.1, implementation=kernel)
    with jax.numpy_rank_promotion("raise"):
        got, _ = ragged_paged_attention_update(query, key, key, cache, **call, q_scale=0.25)
    rounded = (query / 0.25).astype("float8_e4m3fn").astype("bfloat16")
    wanted, _ = ragged_paged_attention_update(rounded, key, key, cache, **call | {"sm_scale": 0.025})
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(wanted, np.float32))


def test_queries_are_rounded_to_any_cache(kernel):
    rng = np.random.default_rng(6)
    given, _ = batch("flat")
    query, key = random(rng, (TOKENS, 4, 64), "float32"), random(rng, (TOKENS, 2, 64), "float32")
    cache = jnp.zeros((PAGES, SIZE, 1, 4, 128), "float32")
    call = dict(given, distribution=4, sm_scale=0.1, implementation=kernel)
    got, wanted = (
        ragged_paged_attention_update(query, key, key, cache, **call, q_scale=q_scale)[0]
        for q_scale in (4.0, None)
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["k_scale", "v_scale"])
def test_one_scale_alone_is_not_that_of_both(kernel, scale):
    rng = np.random.default_rng(7)
    given, _ = batch("flat")
    query = random(rng, (TOKENS, 4, 64), "bfloat16")
    key, value = (random(rng, (TOKENS, 2, 64), "bfloat16") for _ in range(2))
    cache = jnp.zeros((PAGES, SIZE, 1, 4, 128), "float8_e4m3fn")
    call = dict(given, distribution=4, sm_scale=0.1, implementation=kernel)
    got, wanted = (
        ragged_paged_attention_update(query, key, value, cache, **call, **scales)
        for scales in ({scale: 0.5}, {"k_scale": 1.0, "v_scale": 1.0} | {scale: 0.5})
    )
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_a_step_without_tokens_and_a_window_that_is_no_int(kernel):
    given, _ = batch("flat")
    none = {name: jnp.zeros_like(given[name]) for name in ("kv_lens", "cu_q_lens")}
    cache = jnp.ones((PAGES, SIZE, 1, 4, 128), "float32")
    query, key = jnp.zeros((0, 4, 64)), jnp.zeros((0, 2, 64))
    out, after = ragged_paged_attention_update(
        query, key, key, cache, **given | none, distribution=4, implementation=kernel
    )
    assert out.shape == (0, 4, 64)
    assert (after == 1).all()
    with pytest.raises(ValueError, match=r"sliding_window must be an int of at least 1 or None, got 2\.5"):
        ragged_paged_attention_update(
            query, key, key, cache, **given | none, distribution=4, sliding_window=2.5
        )


@pytest.mark.parametrize("shape", [(8, 64), (4, 2, 64)], ids=str)
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("kept", ["as pages", "by tokens"])  # sglang-jax reshapes [p · ps, 2 hk, d]
def test_the_cache_is_updated_in_place(kernel, layout, shape, kept):
    heads = (4 if layout == "interleaved" else 8, 64 if layout == "interleaved" else 32)
    query, key = jnp.ones((4, heads[0] * 2, heads[1]), jnp.bfloat16), jnp.ones((4, *heads), jnp.bfloat16)
    if kept == "by tokens" and jax.__version_info__ < (0, 11):
        pytest.skip("XLA of JAX 0.10 copies a reshaped cache, also behind a barrier")
    pool = (8192, 16, *shape)  # larger than a GPU's workspace
    cache = jax.ShapeDtypeStruct(pool if kept == "as pages" else (8192 * 16, *shape), jnp.bfloat16)
    size = int(np.prod(cache.shape)) * 2
    arrays = (
        jnp.full(4, 100),
        jnp.zeros(4 * 16, jnp.int32),
        jnp.arange(5, dtype=jnp.int32),
        jnp.asarray([4, 4, 4]),
    )

    def step(cache):
        out, written = ragged_paged_attention_update(
            query, key, key, cache.reshape(pool), *arrays, layout=layout, implementation=kernel
        )
        return out, written.reshape(cache.shape)

    step = jax.jit(step, donate_argnums=0)
    memory = step.lower(cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size / 8
    assert memory.alias_size_in_bytes == size


@pytest.fixture
def place():
    """Places an array of any rank, its axis of heads split over the two devices of an explicit mesh axis."""
    require_devices(2)
    mesh = jax.make_mesh((2,), ("heads",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        yield lambda x, axis: jax.device_put(x, NamedSharding(mesh, P(*(None,) * axis, "heads")))


SPLIT = {  # layout, KV heads, and shape of the cache past [p, ps]
    "interleaved": ("interleaved", 2, (4, 64)),
    "interleaved, packed": ("interleaved", 4, (2, 4, 128)),
    "concatenated": ("concatenated", 4, (2, 2, 128)),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_explicit_axes_split_the_heads_of_a_cache(kernel, place, kind):
    layout, heads, shape = SPLIT[kind]
    rng = np.random.default_rng(7)
    given, _ = batch("flat")
    arrays = [random(rng, (TOKENS, h, 64), "float32") for h in (8, heads, heads)]
    cache = random(rng, (PAGES, SIZE, *shape), "float32")
    step = jax.jit(partial(ragged_paged_attention_update, layout=layout, sm_scale=0.1, implementation=kernel))
    wanted = step(*arrays, cache, **given, distribution=4)
    compiled = step.lower(*(place(x, 1) for x in arrays), place(cache, 2), **given, distribution=4).compile()
    out, after = compiled(*(place(x, 1) for x in arrays), place(cache, 2), **given, distribution=4)
    assert not collectives(compiled.as_text())
    assert jax.typeof(out).sharding.spec == P(None, "heads", None)
    assert jax.typeof(after).sharding.spec[2] == "heads"
    assert_same(jax.device_get((out, after)), jax.device_get(wanted))


def test_gradients_of_a_split_cache_are_split_as_it_is(kernel, place):
    given, _ = batch()
    given |= {"num_seqs": 4, "implementation": kernel}
    pool, query = place(jnp.ones((PAGES, SIZE, 4, 64)), 2), place(jnp.ones((TOKENS, 8, 64)), 1)
    gradient = jax.grad(lambda pool: ragged_paged_attention(query, pool, **given).sum())
    assert jax.eval_shape(gradient, pool).sharding.spec == P(None, None, "heads", None)


@pytest.mark.parametrize(("shape", "axis", "allowed"), [
    ((2, 64), 2, "1; reshard kv_pages"), ((2, 2, 64), 3, "2; reshard kv_pages"), ((4, 64), 3, "2; reshard kv_pages"),
], ids=["one pair", "packing", "head dim"])  # fmt: skip
def test_explicit_axes_that_split_keys_from_values_are_refused(place, shape, axis, allowed):
    pool, (given, _) = place(jnp.ones((PAGES, SIZE, *shape)), axis), batch()
    message = f"ragged_paged_attention: kv_pages is .*@heads.*may not split K from V.* divides {allowed}"
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(jnp.ones((TOKENS, 4, 64)), pool, **given, num_seqs=4)


def test_explicit_axes_that_split_queries_beside_padded_heads_are_refused(place):
    query, (given, _) = place(jnp.ones((TOKENS, 4, 64)), 1), batch("flat")
    key, cache = jnp.ones((TOKENS, 2, 64)), jnp.ones((PAGES, SIZE, 2, 4, 64))
    message = "queries is .*@heads.* where kv_cache has room for 4 heads of keys and holds 2; reshard queries"
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention_update(query, key, key, cache, **given, distribution=4)
