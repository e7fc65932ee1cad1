"""What the tests of the Flax adapter share: attention_fn under test, layers that use it, inputs and masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMPLEMENTATION

from jax_flash.flax import attention_fn

linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")


ours = functools.partial(attention_fn, implementation=IMPLEMENTATION)
B, S, HEADS, FEATURES = 2, 7, 2, 16
X = jax.random.normal(jax.random.key(0), (B, S, FEATURES))
CAUSAL = linen.make_causal_mask(X[..., 0])
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "causal bool": CAUSAL.astype(bool),
    "padding": linen.make_attention_mask(jnp.ones((B, S)), jnp.arange(S) < jnp.array([[3], [S]])),
    "causal and padding": linen.combine_masks(CAUSAL, (jnp.arange(S) < 4)[None, None, None]),
    "heads": jax.random.bernoulli(jax.random.key(1), 0.5, (HEADS, S, S)).at[..., 0].set(True),
}


def close(got, want, atol=1e-5, rtol=1e-5):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=atol, rtol=rtol), got, want)


def linen_layer(fn, **kwargs):
    return linen.MultiHeadDotProductAttention(
        num_heads=HEADS, qkv_features=FEATURES, attention_fn=fn, **kwargs
    )


def nnx_layer(fn, **kwargs):
    kwargs = {"decode": False, "rngs": nnx.Rngs(0)} | kwargs
    return nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=fn, **kwargs)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def qkv(*batch, sq=5, sk=6, heads=4, kv_heads=4, d=8):
    return (
        normal(0, *batch, sq, heads, d),
        normal(1, *batch, sk, kv_heads, d),
        normal(2, *batch, sk, kv_heads, d),
    )
