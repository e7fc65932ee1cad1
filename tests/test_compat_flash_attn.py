"""jax_flash.compat.flash_attn: the arguments of flash_attn mean what its documentation says."""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import usual_dtype
from flash_attn_reference import (
    CU_K,
    CU_Q,
    DV,
    HK,
    HQ,
    OPTIONS,
    D,
    assert_close,
    attend_batch,
    attend_packed,
    i32,
    normal,
    slope,
)  # fmt: skip

import jax_flash
from jax_flash.compat import flash_attn
from jax_flash.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

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
    flash_attn_qkvpacked_func: ("qkv", ATTENTION),
    flash_attn_kvpacked_func: ("q kv", ATTENTION),
    flash_attn_varlen_qkvpacked_func: ("qkv cu_seqlens max_seqlen", ATTENTION),
    flash_attn_varlen_kvpacked_func: (
        "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        ATTENTION,
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


def test_all_names_the_functions():
    assert flash_attn.__all__ == sorted(f.__name__ for f in INTERFACE)


# flash_attn_func and flash_attn_varlen_func.


def fixed_inputs(sq=6, sk=9):
    return normal(0, 3, sq, HQ, D), normal(1, 3, sk, HK, D), normal(2, 3, sk, HK, DV)


def packed_inputs():
    return normal(0, 8, HQ, D), normal(1, 12, HK, D), normal(2, 12, HK, DV)


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


@pytest.mark.parametrize("softcap", [0, -1.0])
def test_a_softcap_that_is_not_positive_is_off(softcap):
    q, k, v = fixed_inputs()
    for call in (partial(flash_attn_func, q, k, v), partial(flash_attn_with_kvcache, q, k, v)):
        assert np.array_equal(jax.tree.leaves(call(softcap=softcap))[0], jax.tree.leaves(call())[0])
    assert np.array_equal(varlen(*packed_inputs(), softcap=softcap), varlen(*packed_inputs()))


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
    with pytest.raises(
        ValueError, match=r"flash_attn_(varlen_)?func: dropout_p is 0.4, which needs a dropout_key"
    ):
        call()
    with pytest.raises(NotImplementedError, match=r"attention weights, which never exist .* return_lse=True"):
        call(dropout_key=key, return_attn_probs=True)


def paged(k, v, cu=CU_K, page_size=3):
    """Packed keys in the pages of a pool, in random order; NaN and large indices where nothing is read."""
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
    weight = normal(7, 8, HQ, DV)
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


# Errors.

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
    "return_attn_probs": (
        lambda: flash_attn_func(*fixed_inputs(), return_attn_probs="no"),
        TypeError,
        "flash_attn_func: return_attn_probs must be True or False, got 'no'",
    ),
    "softcap": (
        lambda: flash_attn_func(*fixed_inputs(), softcap="a"),
        TypeError,
        "flash_attn_func: softcap must be a Python number (it is compiled in), got str",
    ),
    "heads": (
        lambda: flash_attn_func(normal(0, 3, 6, 5, D), *fixed_inputs()[1:]),
        ValueError,
        "flash_attention: key has 2 heads, which does not divide query's 5",
    ),
    "dropout over pages": (
        lambda: varlen(*packed_inputs(), dropout_p=0.5, block_table=np.zeros((3, 4), np.int32)),
        NotImplementedError,
        "flash_attn_varlen_func: dropout_p is 0.5 with a block_table; pages have no dropout, pass dropout_p=0.0",
    ),
    "dropout_p": (
        lambda: flash_attn_func(*fixed_inputs(), "a", return_attn_probs=True),
        TypeError,
        "flash_attn_func: dropout_p must be a Python number (it is compiled in), got str",
    ),
    "cu_seqlens_k of other sequences": (
        lambda: flash_attn_varlen_func(
            *packed_inputs(), i32(*CU_Q), i32(0, 3), 5, 5, block_table=np.zeros((3, 4), np.int32)
        ),
        ValueError,
        "flash_attn_varlen_func: cu_seqlens_k must have shape [n+1] = (4,), got (2,)",
    ),
    "cu_seqlens_k": (
        lambda: flash_attn_varlen_func(
            *packed_inputs(),
            i32(*CU_Q),
            np.array(CU_K, np.float32),
            5,
            5,
            block_table=np.zeros((3, 4), np.int32),
        ),
        TypeError,
        "flash_attn_varlen_func: cu_seqlens_k must hold integers, got float32",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_given_and_what_is_allowed(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
