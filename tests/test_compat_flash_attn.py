"""jax_flash.compat.flash_attn: the arguments of flash_attn mean what its documentation says.

What is right is written here once more, in numpy and float64, a query row at a time.
"""

import inspect
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import usual_dtype

import jax_flash
from jax_flash.compat import flash_attn
from jax_flash.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

HQ, HK, D = 4, 2, 16
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
CU_Q, CU_K = (0, 3, 3, 8), (0, 5, 9, 12)  # lengths 3, 0, 5 and 5, 4, 3
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window_size=(2, 1)),
    "left window": dict(window_size=(2, -1)),
    "right window": dict(window_size=(-1, 1)),
    "causal window": dict(causal=True, window_size=(3, 5)),
    "scale": dict(softmax_scale=0.7),
    "softcap": dict(softcap=1.5, causal=True),
    "alibi": dict(alibi_slopes=SLOPES),
    "alibi of each sequence": dict(alibi_slopes=np.stack([SLOPES * i for i in range(1, 4)])),
    "deterministic": dict(deterministic=True),
}
KVCACHE_OPTIONS = {name: x for name, x in OPTIONS.items() if name != "deterministic"}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def i32(*values):
    return np.array(values, np.int32)


def attend(
    q, k, v, z=0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, **_
):
    """One sequence: q [sq, hq, d], k [sk, hk, d] → out [sq, hq, dv], lse [hq, sq]."""
    (sq, hq, d), (sk, hk, _) = q.shape, k.shape
    out, lse = np.zeros((sq, hq, v.shape[-1])), np.full((hq, sq), -np.inf)
    left, right = window_size[0], 0 if causal else window_size[1]
    for i in range(sq):
        middle = i + sk - sq
        first = 0 if left < 0 else max(middle - left, 0)
        last = sk - 1 if right < 0 else min(middle + right, sk - 1)
        seen = np.arange(first, last + 1)
        for h in range(hq if len(seen) else 0):
            kv = h // (hq // hk)
            s = (
                (1 / math.sqrt(d) if softmax_scale is None else softmax_scale)
                * k[seen, kv].astype(float)
                @ q[i, h]
            )
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if alibi_slopes is not None:
                s = s - np.broadcast_to(alibi_slopes, (3, hq))[z, h] * np.abs(middle - seen)
            lse[h, i] = s.max() + np.log(np.exp(s - s.max()).sum())
            out[i, h] = np.exp(s - lse[h, i]) @ v[seen, kv]
    return out, lse


def attend_batch(q, k, v, **options):
    pairs = [attend(*x, z=z, **options) for z, x in enumerate(zip(q, k, v))]
    return tuple(np.stack(x) for x in zip(*pairs))


def attend_packed(q, k, v, cu_q=CU_Q, cu_k=CU_K, **options):
    pairs = [
        attend(q[cu_q[z] : cu_q[z + 1]], k[cu_k[z] : cu_k[z + 1]], v[cu_k[z] : cu_k[z + 1]], z=z, **options)
        for z in range(len(cu_q) - 1)
    ]
    outs, lses = zip(*pairs)
    return np.concatenate(outs), np.concatenate(lses, 1)


def assert_close(got, wanted, tolerance=1e-5):
    assert np.shape(got) == np.shape(wanted)
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=tolerance, atol=tolerance)


def slope(function, arrays, seed=9):
    """d function along a random direction, by central differences in float64; and the direction."""
    arrays = [x.astype(float) for x in arrays]
    along = [np.random.default_rng(seed + i).normal(size=x.shape) for i, x in enumerate(arrays)]
    ahead, behind = (function(*(x + e * u for x, u in zip(arrays, along))) for e in (1e-5, -1e-5))
    return (ahead - behind) / 2e-5, along


# The interface.

ATTENTION = dict(
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
)  # fmt: skip
INTERFACE = {
    flash_attn_func: ("q k v", ATTENTION),
    flash_attn_varlen_func: (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        ATTENTION | dict(block_table=None),
    ),
    flash_attn_with_kvcache: (
        "q k_cache v_cache",
        dict(
            k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
            cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1),
            softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", INTERFACE, ids=lambda f: f.__name__)
def test_names_order_and_defaults_are_flash_attns(function):
    required, optional = INTERFACE[function]
    parameters = inspect.signature(function).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [(name, inspect.Parameter.empty) for name in required.split()] + list(
        optional.items()
    )
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} <= {"dropout_key", "implementation"}


def test_all_names_the_three_functions():
    assert flash_attn.__all__ == [f.__name__ for f in INTERFACE]


# flash_attn_func and flash_attn_varlen_func.


def fixed_inputs(sq=6, sk=9):
    return normal(0, 3, sq, HQ, D), normal(1, 3, sk, HK, D), normal(2, 3, sk, HK, D)


def packed_inputs():
    return normal(0, 8, HQ, D), normal(1, 12, HK, D), normal(2, 12, HK, D)


def varlen(q, k, v, **options):
    return flash_attn_varlen_func(q, k, v, i32(*CU_Q), i32(*CU_K), 5, 5, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_func(name, implementation):
    q, k, v = fixed_inputs()
    out, lse, weights = flash_attn_func(
        q, k, v, **OPTIONS[name], return_attn_probs=True, implementation=implementation
    )
    right, right_lse = attend_batch(q, k, v, **OPTIONS[name])
    assert_close(out, right)
    assert_close(lse, right_lse)
    assert weights is None
    assert_close(flash_attn_func(q, k, v, **OPTIONS[name], implementation=implementation), right)


def test_func_with_more_queries_than_keys_has_empty_rows(implementation):
    q, k, v = fixed_inputs(sq=5, sk=2)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, implementation=implementation)
    right, right_lse = attend_batch(q, k, v, causal=True)
    assert_close(out, right)
    assert_close(lse, right_lse)
    assert not np.asarray(out)[:, :3].any()


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name, implementation):
    q, k, v = packed_inputs()
    out, lse, weights = varlen(
        q, k, v, **OPTIONS[name], return_attn_probs=True, implementation=implementation
    )
    right, right_lse = attend_packed(q, k, v, **OPTIONS[name])
    assert_close(out, right)
    assert_close(lse, right_lse)
    assert weights is None


def test_varlen_takes_any_max_seqlen(implementation):
    q, k, v = packed_inputs()
    wanted = varlen(q, k, v, implementation=implementation)
    call = partial(flash_attn_varlen_func, q, k, v, i32(*CU_Q), i32(*CU_K), implementation=implementation)
    for given in (0, None, 99):
        assert np.array_equal(call(given, given), wanted)
    assert np.array_equal(jax.jit(call)(5, 5), wanted)


@pytest.mark.parametrize("name", ["causal window", "softcap", "alibi"])
@pytest.mark.parametrize("packed", [False, True], ids=["func", "varlen"])
def test_gradients(packed, name, implementation):
    function, right, arrays = (
        (varlen, attend_packed, packed_inputs())
        if packed
        else (flash_attn_func, attend_batch, fixed_inputs())
    )
    by_out, by_lse = (normal(5 + i, *x.shape) for i, x in enumerate(right(*arrays)))
    seen = np.isfinite(right(*arrays, **OPTIONS[name])[1])

    def loss(*arrays):
        out, lse, _ = function(
            *arrays,
            **OPTIONS[name],
            deterministic=True,
            return_attn_probs=True,
            implementation=implementation,
        )
        return (out * by_out).sum() + jnp.where(seen, lse * by_lse, 0).sum()

    def right_loss(*arrays):
        out, lse = right(*arrays, **OPTIONS[name])
        return (out * by_out).sum() + (lse[seen] * by_lse[seen]).sum()

    wanted, along = slope(right_loss, arrays)
    gradients = jax.grad(loss, (0, 1, 2))(*arrays)
    got = sum((np.asarray(g, float) * u).sum() for g, u in zip(gradients, along))
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["func", "varlen"])
def test_dropout_is_that_of_the_public_function(packed, implementation):
    dtype = usual_dtype(implementation)
    arrays = [jnp.asarray(x, dtype) for x in (packed_inputs() if packed else fixed_inputs())]
    key, other = jax.random.split(jax.random.key(3))
    function = varlen if packed else flash_attn_func
    call = partial(function, *arrays, 0.4, implementation=implementation) if not packed else partial(
        function, *arrays, dropout_p=0.4, implementation=implementation
    )  # fmt: skip
    public = jax_flash.flash_attention
    if packed:
        public = partial(jax_flash.flash_attention_varlen, cu_seqlens_q=i32(*CU_Q), cu_seqlens_k=i32(*CU_K))
    wanted = public(*arrays, dropout_rate=0.4, dropout_key=key, implementation=implementation)
    assert np.array_equal(call(dropout_key=key), wanted)
    assert not np.array_equal(call(dropout_key=other), wanted)
    with pytest.raises(ValueError, match="needs a dropout_key"):
        call()
    with pytest.raises(NotImplementedError, match=r"attention weights, which never exist .* return_lse=True"):
        call(dropout_key=key, return_attn_probs=True)


def paged(k, v, cu=CU_K, page_size=3):
    """Packed keys in pages of a pool, in no order; NaN and far entries where nothing is read."""
    lengths = np.diff(cu)
    table = np.random.default_rng(4).permutation(12).reshape(3, 4).astype(np.int32)
    pools = [np.full((12, page_size, *x.shape[1:]), np.nan, np.float32) for x in (k, v)]
    for z, n in enumerate(lengths):
        for j in range(n):
            for pool, x in zip(pools, (k, v)):
                pool[table[z, j // page_size], j % page_size] = x[cu[z] + j]
        table[z, -(-n // page_size) :] = -99
    return *pools, table


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen_with_block_table(name, implementation):
    q, k, v = packed_inputs()
    k_pool, v_pool, table = paged(k, v)
    out, lse, weights = varlen(
        q,
        k_pool,
        v_pool,
        **OPTIONS[name],
        block_table=table,
        return_attn_probs=True,
        implementation=implementation,
    )
    right, right_lse = attend_packed(q, k, v, **OPTIONS[name])
    assert_close(out, right)
    assert_close(lse, right_lse)
    assert weights is None


def test_varlen_with_block_table_differentiates_through_the_pages(implementation):
    arrays = packed_inputs()
    weight = normal(7, 8, HQ, D)
    pools = paged(*arrays[1:])

    def loss(q, k_pool, v_pool):
        out = varlen(q, k_pool, v_pool, causal=True, block_table=pools[2], implementation=implementation)
        return (out * weight).sum()

    wanted, along = slope(lambda *x: (attend_packed(*x, causal=True)[0] * weight).sum(), arrays)
    gradients = jax.grad(loss, (0, 1, 2))(arrays[0], *(np.nan_to_num(x) for x in pools[:2]))
    directions = along[0], *(np.nan_to_num(x) for x in paged(*along[1:])[:2])
    got = sum((np.asarray(g, float) * u).sum() for g, u in zip(gradients, directions))
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    unused = np.isnan(pools[0])
    assert not np.asarray(gradients[1])[unused].any()


# flash_attn_with_kvcache.

S_MAX, ENDS = 12, i32(7, 0, 5)


def rotate(x, positions, cos, sin, interleaved):
    """x [s, h, d] rotated at positions [s]."""
    x, half = x.astype(float), cos.shape[1]
    out = x.copy()
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        c, s = (t[positions, i][:, None].astype(float) for t in (cos, sin))
        out[..., a], out[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return out


def with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, rotary_interleaved=True, num_splits=0, **options,
):  # fmt: skip
    """flash_attn's documentation as a loop: (out, lse, k_cache, v_cache)."""
    caches = k_cache.astype(float), v_cache.astype(float)
    size = k_cache.shape[1]
    limited = options.get("causal", False) or options.get("window_size", (-1, -1)) != (-1, -1)

    def slot(z, position):
        if block_table is not None:
            return block_table[z, position // size], position % size
        row = z if cache_batch_idx is None else cache_batch_idx[z]
        return row, position + (0 if cache_leftpad is None else cache_leftpad[z])

    found = []
    for z in range(len(q)):
        n = size if cache_seqlens is None else int(np.broadcast_to(cache_seqlens, len(q))[z])
        n -= 0 if cache_leftpad is None else int(cache_leftpad[z])
        query = q[z].astype(float)
        if k is not None:
            new = k[z].astype(float)
            if rotary_cos is not None:
                turn = partial(rotate, cos=rotary_cos, sin=rotary_sin, interleaved=rotary_interleaved)
                new = turn(new, n + np.arange(len(new)))
                query = turn(query, n + np.arange(len(query)) * limited)
            for i in range(len(new)):
                caches[0][slot(z, n + i)], caches[1][slot(z, n + i)] = new[i], v[z, i]
            n += len(new)
        keys, values = (
            np.array([x[slot(z, j)] for j in range(n)]).reshape(n, HK, x.shape[-1]) for x in caches
        )
        found.append(attend(query, keys, values, z=z, **options))
    out, lse = (np.stack(x) for x in zip(*found))
    return out, lse, *caches


def cache_inputs(rows=3, size=S_MAX, sq=2):
    return normal(0, 3, sq, HQ, D), normal(1, rows, size, HK, D), normal(2, rows, size, HK, D)


def new_keys(s=2):
    return dict(k=normal(3, 3, s, HK, D), v=normal(4, 3, s, HK, D))


def angles(positions=S_MAX, half=D // 2):
    x = normal(5, positions, half)
    return dict(rotary_cos=np.cos(x), rotary_sin=np.sin(x))


TABLE = i32([9, 4, 0], [3, 8, 99], [1, 7, 2])  # pages of 4; the last entry of the middle row is never read
APPEND = dict(cache_seqlens=ENDS) | new_keys()
CACHES = {
    "full": (cache_inputs(), {}),
    "an int": (cache_inputs(), dict(cache_seqlens=7)),
    "lengths": (cache_inputs(), dict(cache_seqlens=ENDS)),
    "new keys": (cache_inputs(), APPEND),
    "new keys at an int": (cache_inputs(), APPEND | dict(cache_seqlens=3)),
    "fewer queries than new keys": (cache_inputs(sq=1), APPEND | new_keys(3)),
    "up to the end": (cache_inputs(), APPEND | dict(cache_seqlens=i32(10, 10, 9))),
    "rows of the cache": (cache_inputs(rows=5), APPEND | dict(cache_batch_idx=i32(4, 0, 2))),
    "more rows than queries": (cache_inputs(rows=5), APPEND),
    "rows read only": (cache_inputs(rows=2), dict(cache_seqlens=ENDS, cache_batch_idx=i32(1, 1, 0))),
    "left padding": (cache_inputs(), APPEND | dict(cache_leftpad=i32(3, 0, 5))),
    "left padding, full": (cache_inputs(), dict(cache_leftpad=i32(3, 0, 12))),
    "left padding of rows": (
        cache_inputs(rows=5),
        APPEND | dict(cache_leftpad=i32(3, 0, 5), cache_batch_idx=i32(4, 0, 2)),
    ),
    "pages": (cache_inputs(rows=10, size=4), APPEND | dict(block_table=TABLE)),
    "pages, read only": (cache_inputs(rows=10, size=4), dict(block_table=TABLE, cache_seqlens=ENDS)),
    "rotary": (cache_inputs(), APPEND | angles()),
    "rotary by halves": (cache_inputs(), APPEND | angles() | dict(rotary_interleaved=False)),
    "rotary of some features": (cache_inputs(), APPEND | angles(20, 3)),
    "rotary, causal": (cache_inputs(), APPEND | angles() | dict(causal=True)),
    "rotary, window": (cache_inputs(), APPEND | angles() | dict(window_size=(3, -1))),
    "rotary, pages": (
        cache_inputs(rows=10, size=4),
        APPEND | angles() | dict(block_table=TABLE, causal=True, rotary_interleaved=False),
    ),
    "rotary, left padding": (
        cache_inputs(),
        APPEND | angles() | dict(cache_leftpad=i32(3, 0, 5), causal=True),
    ),
    "one part": (cache_inputs(), APPEND | dict(num_splits=1)),
    "parts": (cache_inputs(), APPEND | dict(num_splits=3, causal=True)),
}
CACHES |= {name: (cache_inputs(), APPEND | options) for name, options in KVCACHE_OPTIONS.items()}


@pytest.mark.parametrize("name", CACHES)
def test_with_kvcache(name, implementation):
    arrays, options = CACHES[name]
    out, lse, k_cache, v_cache = flash_attn_with_kvcache(
        *arrays, **options, return_softmax_lse=True, implementation=implementation
    )
    wanted = with_kvcache(*arrays, **options)
    for got, right in zip((out, lse, k_cache, v_cache), wanted):
        assert_close(got, right)


def test_with_kvcache_returns_the_caches_last(implementation):
    arrays, options = CACHES["new keys"]
    call = partial(flash_attn_with_kvcache, *arrays, **options, implementation=implementation)
    out, *caches = call()
    out_too, _, *caches_too = call(return_softmax_lse=True)
    assert np.array_equal(out, out_too)
    assert all(np.array_equal(x, y) for x, y in zip(caches, caches_too, strict=True))


def test_with_kvcache_does_not_read_past_the_ends(implementation):
    (q, k_cache, v_cache), options = CACHES["left padding"]
    wanted = flash_attn_with_kvcache(q, k_cache, v_cache, **options, implementation=implementation)[0]
    position = np.arange(S_MAX)
    used = (position >= options["cache_leftpad"][:, None]) & (position < ENDS[:, None])
    poisoned = (np.where(used[..., None, None], x, np.nan) for x in (k_cache, v_cache))
    got = flash_attn_with_kvcache(q, *poisoned, **options, implementation=implementation)[0]
    assert np.array_equal(got, wanted)


def test_cache_seqlens_may_be_a_traced_int(implementation):
    arrays, options = CACHES["new keys at an int"]
    rest = {name: x for name, x in options.items() if name != "cache_seqlens"}
    step = jax.jit(
        lambda n: flash_attn_with_kvcache(*arrays, **rest, cache_seqlens=n, implementation=implementation)
    )
    out, _, *caches = with_kvcache(*arrays, **options)
    for got, right in zip(step(3), (out, *caches), strict=True):
        assert_close(got, right)


def test_strict_promotion_and_x64(implementation):
    arrays, options = CACHES["rotary, left padding"]
    wanted = flash_attn_with_kvcache(*arrays, **options, implementation=implementation)
    for how in (jax.numpy_dtype_promotion("strict"), jax.enable_x64(True)):
        with how:
            got = flash_attn_with_kvcache(*arrays, **options, implementation=implementation)
            start = flash_attn_with_kvcache(
                *arrays, **options | dict(cache_seqlens=0), implementation=implementation
            )
        assert [x.dtype for x in (*got, *start)] == [jnp.float32] * 6
        for x, y in zip(got, wanted, strict=True):
            assert_close(x, y)


def test_rotary_of_16_bits_is_rotary_of_the_same_values_in_32(implementation):
    arrays, options = CACHES["rotary, causal"]
    half = {name: jnp.asarray(options[name], jnp.bfloat16) for name in ("rotary_cos", "rotary_sin")}
    wide = {name: x.astype(jnp.float32) for name, x in half.items()}
    got, wanted = (
        flash_attn_with_kvcache(*arrays, **options | x, implementation=implementation) for x in (half, wide)
    )
    assert all(np.array_equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_keys_past_the_end_of_the_cache_are_dropped(implementation):
    (q, k_cache, v_cache), options = CACHES["new keys"]
    full = APPEND | dict(cache_seqlens=i32(12, 11, 10))
    out, k_after, _ = flash_attn_with_kvcache(q, k_cache, v_cache, **full, implementation=implementation)
    assert np.array_equal(k_after[0], k_cache[0])
    assert np.array_equal(k_after[1, :11], k_cache[1, :11])
    assert np.array_equal(k_after[1, 11], options["k"][1, 0])
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    "name", ["rotary, causal", "rows of the cache", "rotary, pages", "rotary, left padding"]
)
def test_donated_caches_are_updated_in_place(name, kernel):
    (q, *caches), options = CACHES[name]
    static = {n: x for n, x in options.items() if not isinstance(x, np.ndarray)}
    moving = {n: x for n, x in options.items() if isinstance(x, np.ndarray)}
    step = jax.jit(partial(flash_attn_with_kvcache, **static, implementation=kernel), donate_argnums=(1, 2))
    caches = [jnp.array(x) + 0 for x in caches]  # memory of JAX's own, not numpy's
    compiled = step.lower(q, *caches, **moving).compile()
    pool = "f32" + re.escape(str(list(caches[0].shape)).replace(" ", ""))
    assert not re.search(rf"= {pool}\S* (copy|broadcast|fusion)\(", compiled.as_text())
    places = [x.unsafe_buffer_pointer() for x in caches]
    after = compiled(q, *caches, **moving)[1:]
    assert [x.unsafe_buffer_pointer() for x in after] == places
    assert all(x.is_deleted() for x in caches)


# Errors.


def kvcache_error(**options):
    q, k_cache, v_cache = cache_inputs()
    return lambda: flash_attn_with_kvcache(q, **dict(k_cache=k_cache, v_cache=v_cache) | options)


K, V = new_keys().values()
COS, SIN = angles().values()
ERRORS = {
    "window_size": (
        lambda: flash_attn_func(*fixed_inputs(), window_size=5),
        TypeError,
        "flash_attn_func: window_size must be a pair (left, right), got 5",
    ),
    "window_size of floats": (
        lambda: varlen(*packed_inputs(), window_size=(1.0, 0)),
        TypeError,
        "flash_attn_varlen_func: window_size must hold two ints, −1 for unlimited, got (1.0, 0)",
    ),
    "softcap": (
        lambda: flash_attn_func(*fixed_inputs(), softcap=-1.0),
        ValueError,
        "flash_attn_func: softcap must be positive, or 0.0 for none, got -1.0",
    ),
    "heads": (
        lambda: flash_attn_func(normal(0, 3, 6, 5, D), *fixed_inputs()[1:]),
        ValueError,
        "flash_attention: key has 2 heads, which does not divide query's 5",
    ),
    "dropout over pages": (
        lambda: varlen(*packed_inputs(), dropout_p=0.5, block_table=TABLE),
        NotImplementedError,
        "flash_attn_varlen_func: dropout_p is 0.5 with a block_table; pages have no dropout, pass dropout_p=0.0",
    ),
    "cu_seqlens_k": (
        lambda: flash_attn_varlen_func(
            *packed_inputs(), i32(*CU_Q), np.array(CU_K, np.int64), 5, 5, block_table=TABLE
        ),
        TypeError,
        "flash_attn_varlen_func: cu_seqlens_k must be int32, got int64; cast it with .astype('int32')",
    ),
    "k alone": (
        kvcache_error(k=K, cache_seqlens=1),
        ValueError,
        "k was given without v; pass both or neither",
    ),
    "v alone": (
        kvcache_error(v=V, cache_seqlens=1),
        ValueError,
        "v was given without k; pass both or neither",
    ),
    "no place for k": (
        kvcache_error(k=K, v=V),
        ValueError,
        "cache_seqlens is None with k and v; it says where they are appended",
    ),
    "cos alone": (
        kvcache_error(**APPEND, rotary_cos=COS),
        ValueError,
        "rotary_cos was given without rotary_sin; pass both or neither",
    ),
    "rotary of q alone": (
        kvcache_error(rotary_cos=COS, rotary_sin=SIN),
        ValueError,
        "rotary_cos needs k and v; to rotate q alone, use jax_flash.apply_rotary",
    ),
    "few positions": (
        kvcache_error(**APPEND, rotary_cos=COS[:9], rotary_sin=SIN[:9]),
        ValueError,
        "rotary_cos has 9 positions, fewer than the 12 keys a sequence may have",
    ),
    "rows of pages": (
        kvcache_error(block_table=TABLE, cache_batch_idx=i32(0, 1, 2)),
        ValueError,
        "cache_batch_idx must be None with a block_table, which already says where keys lie",
    ),
    "left padding of pages": (
        kvcache_error(block_table=TABLE, cache_leftpad=i32(0, 1, 2)),
        ValueError,
        "cache_leftpad must be None with a block_table, which already says where keys lie",
    ),
    "fewer rows": (
        kvcache_error(**dict(zip(("k_cache", "v_cache"), cache_inputs(rows=2)[1:]))),
        ValueError,
        "k_cache has 2 rows, fewer than q's batch of 3; name rows by cache_batch_idx",
    ),
    "cache rank": (
        kvcache_error(k_cache=K[0]),
        ValueError,
        "k_cache must have rank 4 [b_cache s_max hk d], got shape (2, 2, 16)",
    ),
    "cache_seqlens": (
        kvcache_error(cache_seqlens=i32(1, 2)),
        ValueError,
        "cache_seqlens must have shape [b] = (3,), got (2,)",
    ),
    "cache_seqlens of floats": (
        kvcache_error(cache_seqlens=np.ones(3, np.float32)),
        TypeError,
        "cache_seqlens must be int32, got float32",
    ),
    "num_splits": (
        kvcache_error(num_splits=-1),
        ValueError,
        "paged_attention: num_splits must be an int ≥ 1 or None, got -1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_given_and_what_is_allowed(name):
    call, error, message = ERRORS[name]
    if ": " not in message:
        message = "flash_attn_with_kvcache: " + message
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
