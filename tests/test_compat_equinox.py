"""compat.equinox in a stand-in of Equinox's layer against numpy, and in Equinox's own where it is installed."""

import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import masked_reference
import numpy as np
import pytest
from flash_attn_reference import assert_close, i32, normal, slope

from jax_flash import masks
from jax_flash.compat.equinox import multihead_attention

B, SQ, SK, H, D, DV, FEATURES = 2, 7, 9, 4, 8, 6, 16
X, Y = normal(0, B, SQ, FEATURES), normal(1, B, SK, FEATURES)
SHAPES = (H * D, FEATURES), (H * D, FEATURES), (H * DV, FEATURES), (5, H * DV)
WEIGHTS = [normal(2 + i, *shape) / np.float32(3) for i, shape in enumerate(SHAPES)]
SEEN = np.random.default_rng(6).random((B, H, SQ, SK)) < 0.6
CAUSAL = np.arange(SQ)[:, None] >= np.arange(SK)
IDS, KEY_IDS = i32([0] * 3 + [1] * 4), i32([0] * 4 + [1] * 5)


class Layer:
    """The fields of a MultiheadAttention that the adapter reads."""

    num_heads = H
    __call__ = multihead_attention

    def __init__(self, weights=WEIGHTS, p=0.0, inference=False):
        products = [partial(jnp.dot, jnp.asarray(w), precision="highest") for w in weights]
        self.query_proj, self.key_proj, self.value_proj, self.output_proj = products
        self.dropout = types.SimpleNamespace(p=p, inference=inference)


def right(x=X, y=Y, seen=True, weights=WEIGHTS, turn=1.0):
    """The output that float64 numpy gives, [B, SQ, 5]."""
    q, k, v = (a @ w.T.astype(float) for a, w in zip((x, y, y), weights))
    q, k, v = (a.reshape(*a.shape[:2], H, -1) for a in (turn * q, k, v))
    return masked_reference.attend(q, k, v, seen)[0].reshape(B, SQ, -1) @ weights[3].T


MASKS = {
    "none": (None, True),
    "of all heads": (CAUSAL, CAUSAL),
    "of each head": (SEEN[0], SEEN[:1]),
    "of ints": (3 * CAUSAL, CAUSAL),
    "a value": (masks.causal(), CAUSAL),
    "values": (masks.causal() & masks.segments(IDS, KEY_IDS), CAUSAL & (IDS.T == KEY_IDS)),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, implementation):
    mask, seen = MASKS[name]
    layer = partial(Layer(), mask=mask, implementation=implementation)
    assert_close(jax.vmap(layer)(X, Y, Y), right(seen=seen))


def test_a_mask_of_each_batch_entry():
    assert_close(jax.vmap(Layer())(X, Y, Y, SEEN[:, 0]), right(seen=SEEN[:, :1]))
    assert_close(jax.vmap(Layer())(X, Y, Y, SEEN), right(seen=SEEN))


def test_process_heads():
    def turned(q, k, v):
        return 0.5 * q, k, v

    assert_close(jax.vmap(partial(Layer(), process_heads=turned))(X, Y, Y), right(turn=0.5))


def test_it_differentiates():
    def loss(x, y, *weights):
        return jnp.sin(jax.vmap(Layer(weights))(x, y, y, SEEN)).sum()

    def equations(x, y, *weights):
        return np.sin(right(x, y, SEEN, weights)).sum()

    arrays = (X, Y, *WEIGHTS)
    wanted, along = slope(equations, arrays)
    got = sum((g * u).sum() for g, u in zip(jax.grad(loss, range(6))(*arrays), along))
    assert_close(got, wanted, 1e-4)


def test_dropout():
    plain, keys = Layer()(X[0], Y[0], Y[0]), jax.random.split(jax.random.key(0), B)
    dropping = Layer(p=0.5)
    for off in (dict(inference=True), dict(deterministic=True)):
        assert np.array_equal(dropping(X[0], Y[0], Y[0], key=keys[0], **off), plain)
    assert np.array_equal(Layer(p=0.5, inference=True)(X[0], Y[0], Y[0]), plain)
    out = jax.vmap(lambda x, y, key: dropping(x, y, y, key=key))(X, Y, keys)
    assert not np.allclose(out[0], plain)
    assert_close(out, np.stack([dropping(x, y, y, key=key) for x, y, key in zip(X, Y, keys)]))


def test_dtypes_are_promoted_to_one():
    half = [w.astype(np.float16) for w in WEIGHTS]
    assert Layer(half)(*(x.astype(np.float16) for x in (X[0], Y[0], Y[0]))).dtype == jnp.float16
    assert Layer(half)(X[0].astype(np.float16), Y[0], Y[0]).dtype == jnp.float32
    with jax.enable_x64(True):
        out = jax.vmap(Layer([w.astype(float) for w in WEIGHTS]))(X, Y, Y)
        assert out.dtype == jnp.float64
        assert_close(out, right(), 1e-12)


ERRORS = {
    "a batch": (
        lambda: Layer()(X, Y, Y),
        "query must have rank 2 [tokens, features], got shape (2, 7, 16); jax.vmap maps a layer over batches",
    ),
    "no key": (
        lambda: Layer(p=0.1)(X[0], Y[0], Y[0]),
        "dropout.p is 0.1, which needs key (a jax.random.key), or inference=True",
    ),
    "a key": (
        lambda: Layer(p=0.1)(X[0], Y[0], Y[0], key=3),
        "key must be one jax.random.key, got dtype int32 and shape ()",
    ),
    "a mask": (
        lambda: Layer()(X[0], Y[0], Y[0], masks.causal),
        "mask must be an array, got the function causal; pass what it returns",
    ),
    "a traced rate": (
        lambda: jax.jit(lambda p: Layer(p=p)(X[0], Y[0], Y[0]))(0.1),
        "dropout.p must be a Python number (it is compiled in), got a traced value; keep it a float",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(
        (ValueError, TypeError), match="^" + re.escape("equinox.multihead_attention: " + message)
    ):
        call()


OPTIONS = {
    "biases": dict(use_query_bias=True, use_output_bias=True),
    "sizes": dict(qk_size=D, vo_size=DV, output_size=5),
    "inference": dict(dropout_p=0.4, inference=True),
}


@pytest.mark.parametrize("mask", ["none", "of all heads", "of each head"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_equinox_s_own(name, mask, monkeypatch):
    """A layer has the same output and gradients with compat.equinox as with Equinox's own method."""
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.MultiheadAttention(H, FEATURES, key=jax.random.key(0), **OPTIONS[name])
    # Equinox averages the values of a query that sees nothing.
    mask = None if mask == "none" else jnp.asarray(MASKS[mask][0]).at[..., 0].set(True)

    def loss(given):
        layer, x, y = given
        rope = eqx.nn.RotaryPositionalEmbedding(layer.qk_size)
        turn = jax.vmap(rope, in_axes=1, out_axes=1)
        process = lambda q, k, v: (turn(q), turn(k), v)  # noqa: E731
        out = jax.vmap(lambda x, y: layer(x, y, y, mask, process_heads=process))(x, y)
        return jnp.sin(out).sum(), out

    found = []
    for method in (None, multihead_attention):
        if method is not None:
            monkeypatch.setattr(eqx.nn.MultiheadAttention, "__call__", method)
        jax.clear_caches()
        run = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
        with jax.default_matmul_precision("highest"):
            results = run((layer, jnp.asarray(X), jnp.asarray(Y)))
        found.append(jax.tree.leaves(eqx.filter(results, eqx.is_array)))
    assert len(found[0]) == len(found[1]) > 7
    for got, wanted in zip(found[1], found[0]):
        assert_close(got, wanted, 2e-5, max(1, np.abs(wanted).max()))
