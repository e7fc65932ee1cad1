"""attention_fn, called by itself, gives what the attention functions of linen and nnx give."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_inputs import B, close, linen, nnx, normal, ours, qkv

import jax_flash
from jax_flash import masks
from jax_flash.flax import attention_fn

pytestmark = pytest.mark.usefixtures("exact_products")

# Heads, batch dims, bias, mask, dtypes


def test_is_causal_with_more_keys_than_queries_is_top_left_as_in_flax():
    close(ours(*qkv(B), is_causal=True), nnx.dot_product_attention(*qkv(B), is_causal=True))


def test_is_causal_for_one_query_without_a_mask_leaves_the_first_key():
    """In Flax a decode step has a mask. A single query without one is at the position of the first key."""
    q, k, v = qkv(B, sq=1)
    out = ours(q, k, v, is_causal=True)
    close(out, v[:, :1])
    close(out, nnx.dot_product_attention(q, k, v, is_causal=True))


def test_a_single_query_with_a_mask_of_values_is_a_decode_step():
    q, k, v = qkv(B, sq=1)
    seen = jnp.arange(k.shape[1]) <= 3
    out = ours(q, k, v, mask=masks.causal(3), is_causal=True)
    close(out, ours(q, k, v, mask=seen, is_causal=True))
    close(out, linen.dot_product_attention(q, k, v, mask=seen))
    with pytest.raises(ValueError, match=r"window is \(2, 0\), but the position .* masks.window"):
        ours(q, k, v, mask=masks.causal(3), window=(2, 0))
    near = ours(q, k, v, mask=masks.causal(3) & masks.window(1, 0, offset=3))
    close(near, ours(q, k, v, mask=seen, window=(1, 0)))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_alibi_beside_sinks_counts_from_the_last_visible_key_of_a_decode_step(batch, biased):
    """Without sinks the position that ALiBi counts from changes nothing."""
    q, k, v = qkv(*batch, sq=8, sk=8, kv_heads=2)
    slopes, sinks = jnp.array([0.5, 0.3, 0.2, 0.1]), jnp.array([0.5, 1.0, 0.0, 2.0])
    bias = normal(5, 4, 8, 8) if biased else None
    options = dict(alibi_slopes=slopes, sinks=sinks, window=(3, 0))
    whole = ours(q, k, v, bias, is_causal=True, **options)
    for last in (2, 7):
        at = (..., slice(last, last + 1), slice(None), slice(None))
        seen = jnp.arange(8) <= last
        row = None if bias is None else bias[:, last : last + 1]
        with jax.numpy_rank_promotion("raise"):
            close(ours(q[at], k, v, row, mask=seen, **options), whole[at])
        close(ours(q[at], k, v, row, mask=seen[None, None], **options), whole[at])


def test_slopes_of_each_entry_beside_sinks_in_a_decode_step():
    q, k, v = qkv(B, sq=8, sk=8)
    slopes, sinks = jnp.array([[0.5, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]]), jnp.array([0.5, 1.0, 0.0, 2.0])
    step = functools.partial(ours, q[:, 2:3], k, v, mask=jnp.arange(8) <= 2, sinks=sinks)
    close(step(alibi_slopes=slopes), ours(q, k, v, is_causal=True, alibi_slopes=slopes, sinks=sinks)[:, 2:3])
    assert not jax.grad(lambda slopes: step(alibi_slopes=slopes).sum())(slopes).any()
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in (q[:, 2:3], k, v))
        row = (x.astype(jnp.float64) for x in (q, k, v))
        options = dict(sinks=sinks, alibi_slopes=slopes)
        got = attention_fn(*wide, mask=jnp.arange(8) <= 2, **options)
        whole = attention_fn(*row, is_causal=True, **options)[:, 2:3]
        np.testing.assert_allclose(got, whole, rtol=1e-13, atol=1e-13)
    assert not step(alibi_slopes=slopes, mask=False).any()
    with pytest.raises(ValueError, match=r"alibi_slopes must be \[heads\] = \(4,\) or .* got shape \(3,\)"):
        step(alibi_slopes=slopes[0, :3])
    with pytest.raises(ValueError, match="alibi_slopes are given with sinks"):
        ours(q[:, :1], k, v, mask=masks.causal(2), alibi_slopes=slopes, sinks=sinks)


def test_grouped_heads():
    q, k, v = qkv(B, kv_heads=2)
    close(ours(q, k, v), nnx.dot_product_attention(q, k, v))


def test_value_depth_may_differ():
    q, k, _ = qkv(B)
    v = normal(2, B, 6, 4, 24)
    close(ours(q, k, v), linen.dot_product_attention(q, k, v))


BIASES = {  # those with more batch dims than the arrays give them to the result
    (): [(5, 6), (4, 1, 6), (4, 5, 6), (1, 4, 5, 6), (3, 1, 5, 6)],
    (1,): [(2, 1, 5, 6)],
    (2,): [(5, 6), (4, 1, 6), (2, 1, 5, 6), (1, 4, 5, 1), (1, 2, 4, 5, 6), (3, 1, 1, 5, 6)],
    (2, 3): [(6,), (3, 1, 5, 6), (2, 1, 4, 1, 6), (1, 3, 1, 5, 6), (1, 2, 3, 1, 5, 6)],
    (2, 1, 2): [(2, 1, 1, 1, 5, 6), (2, 1, 2, 4, 5, 6)],
}


@pytest.mark.parametrize(("batch", "shape"), [(b, s) for b, shapes in BIASES.items() for s in shapes])
def test_bias_and_mask_of_any_batch_rank(batch, shape):
    q, k, v = qkv(*batch)
    mask = jax.random.bernoulli(jax.random.key(6), 0.7, shape).at[..., 0].set(True)
    results = {}
    for fn in (ours, linen.dot_product_attention):
        loss = lambda q, k, v, bias: (fn(q, k, v, bias, mask) ** 2).sum()  # noqa: B023, E731
        results[fn] = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(q, k, v, normal(5, *shape))
    close(results[ours], results[linen.dot_product_attention], 1e-4, 1e-4)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_without_bias_and_mask(batch):
    close(ours(*qkv(*batch)), linen.dot_product_attention(*qkv(*batch)))


@pytest.mark.parametrize("dtypes", ["fff", "bfb", "hhh", "bhf", "iif"])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtype_promotion_is_that_of_flax(dtypes, dtype):
    codes = {"f": jnp.float32, "b": jnp.bfloat16, "h": jnp.float16, "i": jnp.int32}
    args = [x.astype(codes[c]) for x, c in zip(qkv(B), dtypes, strict=False)]
    want = linen.dot_product_attention(*args, dtype=dtype)
    got = ours(*args, dtype=dtype)
    assert got.dtype == want.dtype
    tolerance = 1e-5 if got.dtype == jnp.float32 else 0.05
    close(got.astype(jnp.float32), want.astype(jnp.float32), tolerance, tolerance)


def test_promote_dtype_replaces_the_promotion():
    def promote(arrays, *, dtype):
        assert dtype == jnp.float32
        return tuple(2 * x for x in arrays)

    q, k, v = qkv(B)
    close(ours(q, k, v, dtype=jnp.float32, promote_dtype=promote), ours(2 * q, 2 * k, 2 * v))


def test_biases_of_any_number_type():
    q, k, v = qkv(B)
    for bias in (np.arange(6), jnp.arange(6, dtype=jnp.bfloat16)):
        close(ours(q, k, v, bias), linen.dot_product_attention(q, k, v, bias))
    with jax.enable_x64(True):
        bias = np.random.default_rng(0).standard_normal(6)
        assert jnp.asarray(bias).dtype == jnp.float64
        out = ours(q, k, v, bias)
    assert out.dtype == jnp.float32
    close(out, linen.dot_product_attention(q, k, v, bias.astype(np.float32)))


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_segment_ids_and_sinks_are_those_of_flash_attention(batch, by_token):
    q, k, v = qkv(*batch)
    sinks = normal(9, *q.shape[:-1]) if by_token else jnp.array([0.5, -1, 2, 0], jnp.float32)
    flat_sinks = sinks.reshape(-1, *sinks.shape[-2:]) if by_token else sinks
    q_ids, kv_ids = (jax.random.randint(jax.random.key(n), (*batch, s), 0, 2) for n, s in ((7, 5), (8, 6)))
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
    ids = q_ids.reshape(-1, 5), kv_ids.reshape(-1, 6)
    wanted = jax_flash.flash_attention(
        *flat, align="top_left", causal=True, segment_ids=ids, sinks=flat_sinks
    )
    got = ours(q, k, v, is_causal=True, segment_ids=(q_ids, kv_ids), sinks=sinks)
    np.testing.assert_array_equal(got, wanted.reshape(got.shape))


def test_one_array_of_segment_ids_is_that_of_queries_and_keys():
    q, k, v = qkv(B)
    ids = np.array([0, 0, 1, 1, 2])
    mask = ids[:, None] == ids
    close(ours(q, k[:, :5], v[:, :5], segment_ids=ids), ours(q, k[:, :5], v[:, :5], mask=mask))


def test_segment_ids_and_sinks_bound_to_a_layer_train_as_a_mask_does():
    """Options are bound with partial, because Flax passes neither."""
    ids = jnp.array([[0, 0, 1, 1, 1]])
    x = normal(9, 1, 5, 32)

    def trained(fn, **call):
        layer = linen.MultiHeadAttention(4, attention_fn=fn)
        params = layer.init(jax.random.key(0), x)
        return jax.value_and_grad(lambda p: (layer.apply(p, x, **call) ** 2).sum())(params)

    got = trained(functools.partial(ours, segment_ids=ids, sinks=jnp.full(4, -jnp.inf)))
    close(
        got, trained(linen.dot_product_attention, mask=linen.make_attention_mask(ids, ids, jnp.equal)), 1e-4
    )


def test_fully_masked_queries_are_zero_which_flax_makes_a_mean():
    q, k, v = qkv(B)
    out = ours(q, k, v, mask=(jnp.arange(5) != 2)[:, None])
    np.testing.assert_array_equal(out[:, 2], 0)
    close(out[:, 3:], ours(q, k, v)[:, 3:])


@pytest.mark.parametrize(
    "precision", [None, "highest", "default", jax.lax.Precision.HIGH, ("high", "highest")]
)
def test_what_is_always_met_is_accepted(precision):
    close(ours(*qkv(B), precision=precision, force_fp32_for_softmax=True), ours(*qkv(B)))


def test_own_options_are_bound_with_partial():
    q, k, v = qkv(B, sq=6)
    near = jnp.abs(jnp.arange(6)[:, None] - jnp.arange(6)) <= 2
    windowed = functools.partial(ours, window=(2, 2), deterministic_backward=True)
    close(windowed(q, k, v), linen.dot_product_attention(q, k, v, mask=near))
    close(ours(q, k, v, scale=0.0), jnp.broadcast_to(v.mean(1, keepdims=True), q.shape))


# Dropout


def weights(rate, key=0, batch=(2,), s=32, **kwargs):
    """The attention weights after dropout: V is the identity, and all scores are equal."""
    q = jnp.zeros((*batch, s, 2, s))
    v = jnp.broadcast_to(jnp.eye(s)[:, None], q.shape)
    return ours(q, q, v, dropout_rng=jax.random.key(key), dropout_rate=rate, **kwargs) * s


def test_dropout_drops_the_given_share_and_scales_the_rest():
    w = weights(0.25, s=64)
    np.testing.assert_allclose(np.unique(np.round(w, 4)), [0, 1.3333], atol=1e-4)
    assert abs((w == 0).mean() - 0.25) < 0.02


@pytest.mark.parametrize("broadcast_dropout", [True, False])
@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_dropout_is_repeatable_and_differs_between_keys_batch_entries_and_heads(batch, broadcast_dropout):
    w = weights(0.5, batch=batch, broadcast_dropout=broadcast_dropout)
    np.testing.assert_array_equal(w, weights(0.5, batch=batch, broadcast_dropout=broadcast_dropout))
    assert (w != weights(0.5, key=1, batch=batch)).any()
    entries = jnp.moveaxis(w, -2, -3).reshape(-1, *w.shape[-3::2])  # [batch and heads, s, s]
    for i in range(len(entries)):
        for j in range(i):
            assert 0.4 < (entries[i] == entries[j]).mean() < 0.6


def test_dropout_off():
    np.testing.assert_array_equal(weights(0.5, deterministic=True), weights(0.0))


def test_dropout_gradients_use_the_weights_that_the_forward_pass_dropped():
    q, k, v = qkv(B)
    s = k.shape[1]
    fn = functools.partial(ours, dropout_rng=jax.random.key(3), dropout_rate=0.4)
    eye = jnp.broadcast_to(jnp.eye(s)[:, None], (B, s, 4, s))
    p = linen.dot_product_attention_weights(q, k)  # [b, h, sq, sk]
    kept = jnp.where(jnp.swapaxes(fn(q, k, eye), 1, 2) > 0.5 * p, 1 / (1 - 0.4), 0.0)

    def plain(q, k, v):
        return jnp.einsum("bhqk,bkhd->bqhd", linen.dot_product_attention_weights(q, k) * kept, v)

    dout = normal(9, *q.shape)
    close(fn(q, k, v), plain(q, k, v))
    close(jax.vjp(fn, q, k, v)[1](dout), jax.vjp(plain, q, k, v)[1](dout), 1e-4, 1e-4)


# Errors


UNSUPPORTED = {
    "einsum_dot_general": (
        {"einsum_dot_general": jax.lax.dot_general},
        "einsum_dot_general cannot change a fused",
    ),
    "causal": ({"causal": True}, "unknown argument causal; Flax's name is is_causal"),
    "einsums": (
        {"qk_attn_weights_einsum": jnp.einsum, "attn_weights_value_einsum": jnp.einsum},
        "qk_attn_weights_einsum cannot change",
    ),
    "positions": (
        {"input_positions": jnp.arange(5)},
        "unknown argument input_positions; a function around attention_fn",
    ),
    "logits of T5X": (
        {"float32_logits": True},
        "unknown argument float32_logits; scores are always float32, so that a function around",
    ),
    "no argument": ({"wrong": 1}, "unknown argument wrong; leave it out"),
    "algorithm": (
        {"precision": "TF32_TF32_F32"},
        "precision is 'TF32_TF32_F32'; allowed are None and jax.lax.Precision",
    ),
    "preset": (
        {"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32},
        "precision is .*dot algorithms cannot be chosen",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_fused_kernel_cannot_honour_raises(name):
    kwargs, message = UNSUPPORTED[name]
    with pytest.raises(NotImplementedError, match="^attention_fn: " + message):
        ours(*qkv(B), **kwargs)


def test_dropout_without_a_key_raises():
    with pytest.raises(
        ValueError, match=r"^attention_fn: dropout_rng is required where dropout_rate is 0\.1"
    ):
        ours(*qkv(B), dropout_rate=0.1)


@pytest.mark.parametrize("rate", [-0.5, 1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("deterministic", [False, True])
def test_dropout_rates_that_flax_refuses_raise(rate, deterministic):
    with pytest.raises(ValueError, match=r"^attention_fn: dropout_rate must be in the range \[0, 1\), got"):
        ours(*qkv(B), dropout_rate=rate, deterministic=deterministic, dropout_rng=jax.random.key(0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_traced_dropout_rate_raises_as_in_flash_attention(deterministic):
    call = functools.partial(ours, *qkv(B), deterministic=deterministic, dropout_rng=jax.random.key(0))
    with pytest.raises(
        TypeError, match=r"^attention_fn: dropout_rate must be a Python number .* traced value"
    ):
        jax.jit(lambda rate: call(dropout_rate=rate))(0.5)


@pytest.mark.parametrize("name", ["qk_attn_weights_einsum", "attn_weights_value_einsum"])
def test_einsums_that_flax_refuses_raise_as_there(name):
    with pytest.raises(ValueError, match=r"^attention_fn: .* must be specified together"):
        ours(*qkv(B), **{name: jnp.einsum})
    both = {"qk_attn_weights_einsum": jnp.einsum, "attn_weights_value_einsum": jnp.einsum}
    with pytest.raises(ValueError, match=r"^attention_fn: .* exclude each other"):
        ours(*qkv(B), precision="highest", **both)


def test_float64_runs_as_plain_jax():
    with jax.enable_x64(True):
        q, k, v = (np.asarray(x, np.float64) for x in qkv(B))
        out = attention_fn(q, k, v, is_causal=True)
        assert out.dtype == jnp.float64
        close(out, nnx.dot_product_attention(q, k, v, is_causal=True), 1e-12)
        with pytest.raises(TypeError, match="float64"):
            attention_fn(q, k, v, implementation="cpu")


MISFITS = {
    "ranks": (
        lambda q, k, v: (q[0], k, v),
        "query, key and value must have the same rank, .* but have 3, 4 and 4",
    ),
    "rank 2": (lambda q, k, v: (q[0, 0], k[0, 0], v[0, 0]), "same rank, at least 3, but have 2, 2 and 2"),
    "batch": (
        lambda q, k, v: (q[None], k[None], jnp.stack([v, v])),
        r"value has batch dims \(2, 2\), which differ from query's \(1, 2\)",
    ),
    "heads": (lambda q, k, v: (q, k[:, :, :3], v), "query's 4 heads must be a multiple of key's 3"),
    "lengths": (lambda q, k, v: (q, k, v[:, 1:]), "key and value lengths must match, got 6 and 5"),
    "depths": (lambda q, k, v: (q, k[..., 1:], v), "query and key depths must match, got 8 and 7"),
    "bias": (
        lambda q, k, v: (q, k, v, jnp.zeros((3, 1, 1, 1))),
        r"bias must broadcast to \[batch... heads q_length kv_length\] = \(2, 4, 5, 6\), got",
    ),
    "mask": (
        lambda q, k, v: (q[None], k[None], v[None], None, jnp.ones((1, 3, 1, 1, 1), bool)),
        r"mask must broadcast to .* = \(1, 2, 4, 5, 6\)",
    ),
    "function": (lambda q, k, v: (q, k, v, None, masks.causal), "must be an array, got the function causal"),
    "text": (lambda q, k, v: (q, k, v, "alibi"), "bias must be an array, got 'alibi'"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_shapes_that_do_not_fit_raise(name):
    change, message = MISFITS[name]
    error = TypeError if "must be an array" in message else ValueError
    with pytest.raises(error, match="^attention_fn: .*" + message):
        ours(*change(*qkv(B)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            jnp.zeros((B, 6), jnp.int32),
            r"segment_ids must broadcast to \[batch... q_length\] = \(2, 5\), got",
        ),
        (
            jnp.zeros((B, 5), jnp.int32),
            r"segment_ids must broadcast to \[batch... kv_length\] = \(2, 6\), got",
        ),
        ([np.zeros(5, int)] * 3, r"segment_ids must be one array or a pair \(q_ids, kv_ids\), got 3 items"),
        ([[0] * 5] * B, r"segment_ids must be one array or a pair \(q_ids, kv_ids\), got 2 lists of numbers"),
    ],
)
def test_segment_ids_that_do_not_fit_raise(ids, message):
    with pytest.raises(ValueError, match="^attention_fn: " + message):
        ours(*qkv(B), segment_ids=ids)


def test_the_adapter_imports_without_flax():
    code = "import sys; sys.modules['flax'] = None; import jax_flash, jax_flash.flax"
    subprocess.run([sys.executable, "-c", code], check=True)
