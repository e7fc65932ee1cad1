"""`checkify.index_checks` reports no attention that is right, though unused parts of its index arrays hold anything."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

from jax_flash import flash_attention, flash_attention_varlen, masks, paged_attention

X = jnp.ones((2, 5, 4, 8))
TOKENS = X.reshape(10, 4, 8)
OFFSETS = jnp.array([0, 4, 10])
POSITIONS = jnp.array([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]])
POOL = jnp.ones((6, 4, 2, 8))
TABLES, LENGTHS = jnp.array([[0, 3, -1], [5, -1, 77]]), jnp.array([7, 3])


def packed(implementation, mask):
    return flash_attention_varlen(
        TOKENS, TOKENS, TOKENS, OFFSETS, OFFSETS, mask=mask, implementation=implementation
    )


def paged(query, pool, implementation, **options):
    return paged_attention(
        query, pool, pool, TABLES, LENGTHS, causal=True, implementation=implementation, **options
    )


def paged_gradient(implementation, query=X, **options):
    return jax.grad(lambda *x: paged(*x, implementation, **options).sum(), (0, 1))(query, POOL)


def float8(implementation):
    scales = jnp.ones((6, 2))
    return paged(X, POOL.astype("float8_e4m3fn"), implementation, k_scale=scales, v_scale=scales)


CALLS = {
    "positions": lambda by: flash_attention(
        X, X, X, mask=masks.by_position(POSITIONS, POSITIONS), implementation=by
    ),
    "segments": lambda by: packed(by, masks.segments(jnp.arange(10) // 4)),
    "blocks": lambda by: flash_attention(
        X, X, X, mask=masks.blocks([[[[0, -1, 7]]]], (16, 16)), implementation=by
    ),
    "pages": lambda by: paged(X, POOL, by),
    "pages, gradient": paged_gradient,
    "pages, packed, gradient": lambda by: paged_gradient(by, TOKENS, cu_seqlens_q=OFFSETS),
    "pages, tangent": lambda by: jax.jvp(partial(paged, implementation=by), (X, POOL), (X, POOL)),
    "float8 pages": float8,
    "more drafts than keys": lambda by: paged(
        jnp.ones((2, 12, 4, 8)), POOL[:, :1], by, draft_mask=jnp.ones((1, 12, 12), bool)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_index_is_reported(implementation, name):
    error, _ = checkify.checkify(partial(CALLS[name], implementation), errors=checkify.index_checks)()
    assert error.get() is None
