"""linen's and nnx's attention layers with attention_fn give what they give with Flax's own, in training and decode."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_inputs import (
    CAUSAL,
    FEATURES,
    HEADS,
    MASKS,
    B,
    S,
    X,
    close,
    linen,
    linen_layer,
    nnx,
    nnx_layer,
    normal,
    ours,
)

from jax_flash import flash_attention

pytestmark = pytest.mark.usefixtures("exact_products")


@pytest.mark.parametrize("mask", MASKS)
def test_linen_training_step(mask):
    params = linen_layer(ours).init(jax.random.key(0), X)

    def step(fn):
        return jax.jit(
            jax.value_and_grad(lambda p: (linen_layer(fn).apply(p, X, mask=MASKS[mask]) ** 2).sum())
        )(params)

    close(step(ours), step(linen.dot_product_attention), 1e-4, 1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_nnx_training_step(mask):
    def step(fn):
        return nnx.jit(nnx.value_and_grad(lambda m: (m(X, mask=MASKS[mask]) ** 2).sum()))(nnx_layer(fn))

    close(step(ours), step(nnx.dot_product_attention), 1e-4, 1e-4)


@pytest.mark.parametrize("mask", ["none", "causal and padding"])
def test_nnx_is_causal(mask):
    want = nnx_layer(nnx.dot_product_attention)(X, mask=MASKS[mask], is_causal=True)
    close(nnx_layer(ours)(X, mask=MASKS[mask], is_causal=True), want)


def test_cross_attention():
    y = normal(3, B, 11, FEATURES)
    params = linen_layer(ours).init(jax.random.key(0), X, y)
    close(linen_layer(ours).apply(params, X, y), linen_layer(linen.dot_product_attention).apply(params, X, y))
    close(nnx_layer(ours)(X, y), nnx_layer(nnx.dot_product_attention)(X, y))


class Model(linen.Module):
    """One that passes no attention_fn to its layer."""

    @linen.compact
    def __call__(self, x):
        return linen.MultiHeadDotProductAttention(num_heads=HEADS)(x)


def test_a_model_of_linen_whose_layers_take_no_attention_fn(monkeypatch):
    def step(params):
        return jax.value_and_grad(lambda p: (Model().apply(p, X) ** 2).sum())(params)

    params = Model().init(jax.random.key(0), X)
    want, layer = step(params), linen.MultiHeadDotProductAttention
    monkeypatch.setattr(
        linen, "MultiHeadDotProductAttention", functools.partial(layer, attention_fn=counted(calls := []))
    )
    close(step(params), want, 1e-4, 1e-4)
    assert calls
    assert jax.tree.structure(Model().init(jax.random.key(0), X)) == jax.tree.structure(params)


def test_a_model_of_nnx_that_was_built_with_flax_s_own_attention():
    model, calls = nnx.Sequential(nnx_layer(nnx.dot_product_attention), nnx.relu), []
    want = model(X)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.MultiHeadAttention):
            layer.attention_fn = counted(calls)
    close(model(X), want)
    assert calls


def counted(calls):
    """attention_fn with its signature, which appends to `calls`; linen passes what the signature names."""

    @functools.wraps(ours)
    def attention_fn(*given, **options):
        calls.append(options)
        return ours(*given, **options)

    return attention_fn


def test_a_layer_takes_options_bound_with_partial():
    params = linen_layer(ours).init(jax.random.key(0), X)
    causal = functools.partial(ours, window=(S, 0))
    close(linen_layer(causal).apply(params, X), linen_layer(ours).apply(params, X, mask=CAUSAL))
    close(nnx_layer(causal)(X), nnx_layer(ours)(X, mask=CAUSAL))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layer", [linen_layer, nnx_layer])
def test_16_bit_layers(layer, dtype):
    """The layer in 16 bit is as near to the float32 layer as with Flax's own attention."""

    def run(fn, dtype):
        if layer is nnx_layer:
            out = nnx_layer(fn, dtype=dtype)(X, mask=CAUSAL)
        else:
            params = linen_layer(fn).init(jax.random.key(0), X)
            out = linen_layer(fn, dtype=dtype).apply(params, X, mask=CAUSAL)
        assert out.dtype == dtype
        return np.asarray(out, np.float32)

    flax_fn = nnx.dot_product_attention if layer is nnx_layer else linen.dot_product_attention
    ref = run(flax_fn, jnp.float32)
    assert np.abs(run(ours, dtype) - ref).max() <= 2 * np.abs(run(flax_fn, dtype) - ref).max() + 1e-5


@pytest.mark.parametrize("layer", ["linen", "nnx"])
def test_dropout_in_a_layer(layer):
    params = linen_layer(ours).init(jax.random.key(0), X)

    def run(seed, deterministic=False, rate=0.5):
        if layer == "nnx":
            return nnx_layer(ours, dropout_rate=rate, rngs=nnx.Rngs(0, dropout=seed))(
                X, deterministic=deterministic
            )
        module = linen_layer(ours, dropout_rate=rate)
        return module.apply(params, X, deterministic=deterministic, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(run(1), run(1))
    assert np.abs(run(1) - run(2)).max() > 1e-3
    np.testing.assert_array_equal(run(1, deterministic=True), run(2, rate=0.0))


def linen_sown(fn):
    layer = functools.partial(linen_layer, dropout_rate=0.5)
    params = layer(fn).init(jax.random.key(0), X, deterministic=True)
    call = dict(mask=MASKS["heads"], sow_weights=True, mutable=["intermediates"])
    _, state = layer(fn).apply(params, X, deterministic=False, rngs={"dropout": jax.random.key(1)}, **call)
    return state["intermediates"]["attention_weights"]


def nnx_sown(fn):
    layer = nnx_layer(fn, num_kv_heads=1)
    out, state = nnx.capture(layer, nnx.Intermediate)(X, mask=MASKS["heads"], sow_weights=True)
    close(out, nnx_layer(fn, num_kv_heads=1)(X, mask=MASKS["heads"]))
    return nnx.to_pure_dict(state)["attention_weights"]


@pytest.mark.parametrize("sown", [linen_sown, nnx_sown])
def test_weights_are_sown_as_flax_sows_them_before_dropout(sown):
    theirs = linen.dot_product_attention if sown is linen_sown else nnx.dot_product_attention
    (want,) = sown(theirs)
    (got,) = sown(ours)
    assert got.shape == (B, HEADS, S, S)
    close(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sown_weights_are_float32_where_the_softmax_is_forced_to_be(dtype):
    layer = linen_layer(ours, dtype=dtype, force_fp32_for_softmax=True)
    params = layer.init(jax.random.key(0), X)
    out, state = layer.apply(params, X, sow_weights=True, mutable=["intermediates"])
    (weights,) = state["intermediates"]["attention_weights"]
    assert (out.dtype, weights.dtype) == (dtype, jnp.float32)


# Decode


def linen_decode(fn, params, x, steps, mask=None):
    layer = linen_layer(fn, decode=True)
    cache = layer.init(jax.random.key(0), x)["cache"]

    @jax.jit
    def step(cache, token):
        return layer.apply({**params, "cache": cache}, token, mask=mask, mutable=["cache"])

    outs = []
    for i in range(steps):
        out, state = step(cache, x[..., i : i + 1, :])
        cache = state["cache"]
        outs.append(out)
    return jnp.concatenate(outs, axis=-2)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_linen_decode_equals_the_causal_forward(batch):
    x = normal(4, *batch, S, FEATURES)
    params = linen_layer(ours).init(jax.random.key(0), x)
    full = linen_layer(ours).apply(params, x, mask=linen.make_causal_mask(x[..., 0]))
    close(linen_decode(ours, params, x, S), full)
    close(linen_decode(linen.dot_product_attention, params, x, S), full)


# A decode step has one query, whose position only its mask tells.
BOUND = {"window": {"window": (3, 0)}, "alibi": {"alibi_slopes": jnp.geomspace(0.5, 0.1, HEADS)}}


@pytest.mark.parametrize("bound", BOUND)
def test_decode_with_bound_options_equals_the_causal_forward(bound):
    fn = functools.partial(ours, **BOUND[bound])
    params = linen_layer(fn).init(jax.random.key(0), X)
    full = linen_layer(fn).apply(params, X, mask=CAUSAL)
    close(linen_decode(fn, params, X, S), full)
    layer = nnx_layer(fn)
    full = layer(X, mask=CAUSAL)
    layer.init_cache(X.shape)
    step = nnx.jit(lambda m, token: m(token, decode=True))
    close(jnp.concatenate([step(layer, X[:, i : i + 1]) for i in range(S)], axis=1), full)


def test_linen_decode_with_a_mask_of_its_own():
    params = linen_layer(ours).init(jax.random.key(0), X)
    not_second = (jnp.arange(S) != 1)[None, None, None]
    full = linen_layer(ours).apply(params, X, mask=linen.combine_masks(CAUSAL, not_second))
    close(linen_decode(ours, params, X, 5, mask=not_second), full[:, :5])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_nnx_decode_equals_the_causal_forward(kv_heads, is_causal):
    layer = nnx_layer(ours, num_kv_heads=kv_heads)
    full = layer(X, mask=CAUSAL)
    layer.init_cache(X.shape)
    step = nnx.jit(lambda m, token: m(token, decode=True, is_causal=is_causal))
    close(jnp.concatenate([step(layer, X[:, i : i + 1]) for i in range(S)], axis=1), full)


def test_variables_of_nnx_are_arrays():
    """A mask and a key may be in variables, which can be called like functions."""
    q, key, mask = normal(0, B, S, HEADS, 8), jax.random.key(0), CAUSAL.astype(bool)
    see = functools.partial(flash_attention, q, q, q)
    np.testing.assert_array_equal(see(mask=nnx.Variable(mask)), see(mask=mask))
    drop = functools.partial(flash_attention, q, q, q, dropout_rate=0.5)
    np.testing.assert_array_equal(drop(dropout_key=nnx.Variable(key)), drop(dropout_key=key))


@pytest.mark.parametrize("batch", [(B,), (2, B)], ids=str)
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (3, "be one jax.random.key, got dtype int32 and shape ()"),
        ("x", "be an array, got 'x'"),
        (nnx.Rngs(0), "be one jax.random.key, got Rngs, which makes keys: pass rngs.dropout() or rngs()"),
        (jax.random.split(jax.random.key(0)), "be one jax.random.key, got dtype key<fry> and shape (2,)"),
    ],
    ids=str,
)
def test_errors_of_a_key_have_flax_s_name_for_it(key, message, batch):
    q = jnp.ones((*batch, S, HEADS, 8))
    with pytest.raises(TypeError, match="^" + re.escape(f"attention_fn: dropout_rng must {message}")):
        ours(q, q, q, dropout_rng=key, dropout_rate=0.5)
