"""compat.keras against numpy, and in Keras' layers where Keras is installed."""

import re

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, normal, slope

from jax_flash.compat.keras import dot_product_attention

B, SQ, SK, HQ, HK, D, DV = 2, 7, 9, 4, 2, 16, 8
Q, K, V = normal(0, B, SQ, HQ, D), normal(1, B, SK, HK, D), normal(2, B, SK, HK, DV)
SEEN = np.random.default_rng(3).random((B, 1, SQ, SK)) < 0.6
SEEN[1, 0, 2] = False
OF_HEADS = np.random.default_rng(4).random((1, HQ, SQ, SK)) < 0.6
CAUSAL = np.arange(SQ)[:, None] >= np.arange(SK)
BIAS = normal(5, B, HQ, SQ, SK)
CALLS = {  # the arguments of Keras, and of the reference
    "plain": ({}, {}),
    "scale": (dict(scale=np.float32(0.5)), dict(scale=0.5)),
    "causal": (dict(is_causal=True), dict(seen=CAUSAL)),
    "mask": (dict(mask=SEEN), dict(seen=SEEN)),
    "mask of heads": (dict(mask=OF_HEADS), dict(seen=OF_HEADS)),
    "mask of rank 3": (dict(mask=SEEN[:, 0]), dict(seen=SEEN)),
    "mask of rank 2": (dict(mask=CAUSAL), dict(seen=CAUSAL)),
    "mask of keys": (dict(mask=SEEN[0, 0, 0]), dict(seen=SEEN[0, 0, :1])),
    "padding": (dict(mask=SEEN[:, :, :1]), dict(seen=SEEN[:, :, :1])),
    "mask of ints": (dict(mask=SEEN.astype(np.int32), is_causal=True), dict(seen=SEEN & CAUSAL)),
    "bias": (dict(bias=BIAS, flash_attention=True), dict(bias=BIAS)),
    "bias of rank 3": (dict(bias=BIAS[:, 0]), dict(bias=BIAS[:, :1])),
    "bias of heads": (dict(bias=BIAS[0]), dict(bias=BIAS[:1])),
    "soft cap": (dict(attn_logits_soft_cap=1.5, flash_attention=False), dict(softcap=1.5)),
}


def test_rank_3_is_heads_where_batch_entries_are_as_many():
    """Keras broadcasts first, so that [2, sq, sk] are two heads, as in jax.nn."""
    q, k, v = Q[:, :, :2], K[:, :, :1], V[:, :, :1]
    out = dot_product_attention(q, k, v, bias=BIAS[0, :2])
    assert_close(out, masked_reference.attend(q, k, v, bias=BIAS[:1, :2])[0])


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_equations(name, implementation):
    given, wanted = CALLS[name]
    out = dot_product_attention(Q, K, V, **given, implementation=implementation)
    assert_close(out, masked_reference.attend(Q, K, V, **wanted)[0])


def test_it_differentiates():
    def loss(q, k, v, bias):
        return jnp.sin(dot_product_attention(q, k, v, bias, SEEN, 0.4, True)).sum()

    def equations(q, k, v, bias):
        return np.sin(masked_reference.attend(q, k, v, SEEN & CAUSAL, scale=0.4, bias=bias)[0]).sum()

    arrays = (Q, K, V, BIAS)
    wanted, along = slope(equations, arrays)
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, range(4))(*arrays), along))
    assert_close(got, wanted, 1e-4)


def test_dtypes_are_promoted_to_one():
    half, q = K.astype(jnp.bfloat16), Q.astype(np.float16)
    assert dot_product_attention(q, half, V).dtype == jnp.float32
    assert dot_product_attention(q, K.astype(np.float16), V.astype(np.float16)).dtype == jnp.float16
    with jax.enable_x64(True):
        out = dot_product_attention(Q.astype(float), K, V)
        assert out.dtype == jnp.float64
        assert_close(out, masked_reference.attend(Q, K, V)[0], 1e-12)


ERRORS = {
    "a bias of rank 5": (
        lambda: dot_product_attention(Q, K, V, bias=BIAS[None]),
        "keras.dot_product_attention: bias must broadcast to [b hq sq sk] = (2, 4, 7, 9), or have the shape [b sq sk], "
        "got shape (1, 2, 4, 7, 9)",
    ),
    "no query": (
        lambda: dot_product_attention(None, K, V),
        "keras.dot_product_attention: query must be an array, got None",
    ),
    "a mask of other keys": (
        lambda: dot_product_attention(Q, K, V, mask=SEEN[..., :8]),
        "keras.dot_product_attention: mask must broadcast to [b hq sq sk] = (2, 4, 7, 9), or have the shape [b sq sk], "
        "got shape (2, 1, 7, 8)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        call()


LAYERS = {
    "MultiHeadAttention": (dict(num_heads=4, key_dim=12), dict(use_causal_mask=True)),
    "MultiHeadAttention with a mask": (
        dict(num_heads=4, key_dim=12),
        dict(attention_mask=SEEN[:, 0]),
    ),
    "GroupQueryAttention": (
        dict(head_dim=16, num_query_heads=4, num_key_value_heads=2),
        dict(use_causal_mask=True),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_keras_s_own(name, monkeypatch):
    """A layer has the same output and gradients with compat.keras as with Keras' own function."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    nn = pytest.importorskip("keras.src.backend.jax.nn")
    options, call = LAYERS[name]
    layer = getattr(keras.layers, name.split()[0])(**options)
    x, y = normal(6, B, SQ, 48), normal(7, B, SK, 48)
    layer(x, y)
    weights = [w.value for w in layer.trainable_variables]

    def loss(*arrays):
        out = layer.stateless_call(arrays[2:], [], *arrays[:2], **call)[0]
        if "attention_mask" in call:  # Keras averages the values of a query that sees nothing
            out *= SEEN[:, 0].any(-1, keepdims=True)
        return jnp.sin(out).sum(), out

    found = []
    for function in (nn.dot_product_attention, dot_product_attention):
        monkeypatch.setattr(nn, "dot_product_attention", function)
        run = jax.jit(
            jax.value_and_grad(lambda *arrays: loss(*arrays), range(2 + len(weights)), has_aux=True)
        )
        assert ("jax_flash" in run.lower(x, y, *weights).as_text()) == (function is dot_product_attention)
        with jax.default_matmul_precision("highest"):
            found.append(jax.tree.leaves(run(x, y, *weights)))
    for got, wanted in zip(found[1], found[0]):
        assert_close(got, wanted, 1e-5 * max(1, float(np.abs(wanted).max())))
