"""jax_flash.compat.flash_attn.flash_attn_with_kvcache: every kind of cache and argument that flash_attn documents."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flash_attn_reference import DV, HK, HQ, OPTIONS, S_MAX, D, assert_close, i32, normal, with_kvcache

from jax_flash.compat.flash_attn import flash_attn_with_kvcache

ENDS = i32(7, 0, 5)


def cache_inputs(rows=3, size=S_MAX, sq=2):
    return normal(0, 3, sq, HQ, D), normal(1, rows, size, HK, D), normal(2, rows, size, HK, DV)


def new_keys(s=2):
    return dict(k=normal(3, 3, s, HK, D), v=normal(4, 3, s, HK, DV))


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
CACHES |= {name: (cache_inputs(), APPEND | x) for name, x in OPTIONS.items() if name != "deterministic"}


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


@pytest.mark.parametrize("left", [None, i32(3, 0, 5)], ids=["from the start", "left padding"])
def test_an_end_past_the_cache_is_the_caches_end(left, implementation):
    """The result depends on the keys of its own cache row only."""
    arrays = cache_inputs()
    got, wanted = (
        flash_attn_with_kvcache(
            *arrays, cache_seqlens=ends, cache_leftpad=left, implementation=implementation
        )[0]
        for ends in (i32(S_MAX + 3, 1000, 2**31 - 1), i32(S_MAX, S_MAX, S_MAX))
    )
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("rows", [None, i32(2, 0, 1)], ids=["rows in order", "rows"])
def test_a_start_before_the_cache_is_the_caches_start(rows, implementation):
    """The result depends on the keys of its own cache row only."""
    (q, k_cache, v_cache), options = cache_inputs(), dict(cache_seqlens=ENDS, cache_batch_idx=rows)
    call = partial(flash_attn_with_kvcache, implementation=implementation, return_softmax_lse=True, **options)
    got = call(q, k_cache, v_cache, cache_leftpad=i32(-3, -(2**31), -1))
    for x, y in zip(got, call(q, k_cache, v_cache, cache_leftpad=i32(0, 0, 0)), strict=True):
        assert np.array_equal(x, y)
    for x, y in zip(got, with_kvcache(q, k_cache, v_cache, **options), strict=True):
        assert_close(x, y)


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
    caches = [jnp.array(x) + 0 for x in caches]  # copies in memory that JAX owns, which can be donated
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
    "causal": (
        kvcache_error(**APPEND, rotary_cos=COS, rotary_sin=SIN, causal=np.ones(2)),
        TypeError,
        "causal must be True or False, got array([1., 1.])",
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
        "cache_seqlens must hold integers, got float32",
    ),
    "return_softmax_lse": (
        kvcache_error(return_softmax_lse=1),
        TypeError,
        "return_softmax_lse must be True or False, got 1",
    ),
    "num_splits": (
        kvcache_error(num_splits=-1),
        ValueError,
        "num_splits must be at least 0, which leaves the choice to the library, got -1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_given_and_what_is_allowed(name):
    call, error, message = ERRORS[name]
    if ": " not in message:
        message = "flash_attn_with_kvcache: " + message
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
