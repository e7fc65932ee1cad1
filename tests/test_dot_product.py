"""dot_product_attention is jax.nn.dot_product_attention: same arguments, same numbers, same gradients."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import IMPLEMENTATION

from jax_flash.dot_product import dot_product_attention

pytestmark = pytest.mark.usefixtures("exact_products")

B, T, S, N, K, H = 2, 9, 13, 4, 2, 16


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def qkv(b=B, t=T, s=S, n=N, k=K, h=H, dtype=jnp.float32):
    return (
        normal(0, b, t, n, h, dtype=dtype),
        normal(1, b, s, k, h, dtype=dtype),
        normal(2, b, s, k, h, dtype=dtype),
    )


def random_mask(*shape):
    return jax.random.bernoulli(jax.random.key(5), 0.6, shape)


def ours(*args, **kwargs):
    return dot_product_attention(*args, implementation=IMPLEMENTATION, **kwargs)


def visible(
    shape,
    mask=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    **_,
):
    """Which queries see which keys, `[b, n, t, s]`, from jax.nn's documentation."""
    b, t, n, s = shape
    i, j = np.arange(t)[:, None], np.arange(s)[None, :]
    seen = np.ones((b, n, t, s), bool)
    if mask is not None:
        seen &= np.asarray(mask)
    if is_causal:
        seen &= j <= i
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        seen &= (j >= i - left) & (j <= i + right)
    if query_seq_lengths is not None:
        seen &= i < np.asarray(query_seq_lengths)[:, None, None, None]
    if key_value_seq_lengths is not None:
        seen &= j < np.asarray(key_value_seq_lengths)[:, None, None, None]
    return seen


def assert_same_as_jax_nn(q, k, v, bias=None, gradients=False, **options):
    """Result, residual and, if asked for, the gradients of query, key, value and bias, in float32."""
    rows = visible((*q.shape[:3], k.shape[1]), **options).any(-1)
    # Rows [b, t, n] that see a key; the others give 0 here and a mean in jax.nn.
    rows = rows.transpose(0, 2, 1)
    dout = normal(9, *q.shape) * rows[..., None]
    operands = (q, k, v) if bias is None else (q, k, v, bias)

    def run(attention):
        def call(*operands):
            return attention(*operands, return_residual=True, **options)

        if not gradients:
            return *call(*operands), ()
        (out, residual), vjp = jax.vjp(call, *operands)
        return out, residual, vjp((dout, jnp.ones_like(residual)))

    out, residual, got_gradients = jax.jit(lambda: run(ours))()
    ref, ref_residual, ref_gradients = jax.jit(lambda: run(jax.nn.dot_product_attention))()
    assert residual.shape == q.shape[:3]
    assert residual.dtype == q.dtype
    np.testing.assert_allclose(out, jnp.where(rows[..., None], ref, 0), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(residual, np.where(rows, ref_residual, -np.inf), atol=1e-4, rtol=1e-5)
    for name, got, want in zip(("query", "key", "value", "bias"), got_gradients, ref_gradients, strict=False):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4, err_msg=name)


SETTINGS = {
    "bias": normal(7, 1, N, 1, S),
    "mask": random_mask(B, 1, T, S),
    "is_causal": True,
    "query_seq_lengths": jnp.array([0, T - 2], jnp.int32),
    "key_value_seq_lengths": jnp.array([S, 3], jnp.int32),
    "local_window_size": (4, 2),
}
COMBINATIONS = [c for n in range(len(SETTINGS) + 1) for c in itertools.combinations(SETTINGS, n)]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_of_arguments(names):
    assert_same_as_jax_nn(*qkv(), **{name: SETTINGS[name] for name in names})


@pytest.mark.parametrize("names", [(), *((name,) for name in SETTINGS), tuple(SETTINGS)], ids="+".join)
def test_gradients(names):
    assert_same_as_jax_nn(*qkv(), gradients=True, **{name: SETTINGS[name] for name in names})


@pytest.mark.parametrize(
    "shape", [(B, N, T, S), (1, N, T, S), (B, 1, 1, S), (1, 1, T, 1), (N, 1, S), (S,), ()]
)
def test_bias_and_mask_broadcast_from_any_shape_that_jax_nn_takes(shape):
    assert_same_as_jax_nn(*qkv(), gradients=True, bias=normal(7, *shape), mask=random_mask(*shape))


@pytest.mark.parametrize("size", [0, 3, (0, 2), (100, 100)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_local_windows(size, is_causal):
    assert_same_as_jax_nn(*qkv(), local_window_size=size, is_causal=is_causal)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 3)])
@pytest.mark.parametrize("lengths", [(1, 20), (20, 1), (17, 17)])
def test_heads_and_lengths(heads, lengths):
    assert_same_as_jax_nn(*qkv(n=heads[0], k=heads[1], t=lengths[0], s=lengths[1]), is_causal=True)


@pytest.mark.parametrize("scale", [0.3, -1.0, 0.0])
def test_scale(scale):
    assert_same_as_jax_nn(*qkv(), scale=scale)


def test_lengths_outside_the_operand_are_clamped():
    assert_same_as_jax_nn(
        *qkv(),
        query_seq_lengths=jnp.array([-1, 99], jnp.int32),
        key_value_seq_lengths=jnp.array([99, -5], jnp.int32),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_16_bit_within_the_contract(dtype, is_causal):
    q, k, v = qkv(t=24, s=24, dtype=dtype)
    bias, dout = normal(7, 1, N, 24, 24, dtype=dtype), normal(9, *q.shape, dtype=dtype)
    seen = visible((B, 24, N, 24), is_causal=is_causal)

    def plain(q, k, v, bias, round_to):
        """The equations in float32, S and P rounded: the contract's `ref` and `low`."""
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        s = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / H**0.5 + bias
        s = jnp.where(seen, s.astype(round_to).astype(jnp.float32), -jnp.inf)
        p = jax.nn.softmax(s).astype(round_to).astype(jnp.float32)
        return jnp.einsum("bhqk,bkhd->bqhd", p, v, precision="highest")

    def results(attention, *operands):
        def run():
            out, vjp = jax.vjp(attention, *operands)
            return out, *vjp(dout.astype(out.dtype))

        return [np.asarray(x, np.float32) for x in jax.jit(run)()]

    wide = [x.astype(jnp.float32) for x in (q, k, v, bias)]
    got = results(lambda *x: ours(*x, is_causal=is_causal), q, k, v, bias)
    ref = results(lambda *x: plain(*x, jnp.float32), *wide)
    low = oracle.on_cpu(results)(lambda *x: plain(*x, dtype), *wide)
    low = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in low]
    for name, x, r, lo in zip(("out", "query", "key", "value", "bias"), got, ref, low, strict=False):
        factor, constant = (2, 1e-5) if name == "out" else (3, 1e-5 * np.abs(r).max())
        assert np.abs(x - r).max() <= factor * np.abs(lo - r).max() + constant, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_residual_has_the_input_dtype_and_no_gradient(dtype):
    q, k, v = qkv(dtype=dtype)
    out, residual = ours(q, k, v, return_residual=True)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (residual.shape, residual.dtype) == ((B, T, N), q.dtype)
    gradients = jax.grad(lambda *x: ours(*x, return_residual=True)[1].sum().astype(jnp.float32), (0, 1, 2))(
        q, k, v
    )
    for gradient in gradients:
        np.testing.assert_array_equal(gradient.astype(jnp.float32), 0)


def test_without_a_batch_dim():
    q, k, v = (x[0] for x in qkv())
    options = {"bias": normal(7, N, T, S), "mask": random_mask(N, T, S), "return_residual": True}
    options["query_seq_lengths"] = jnp.array([7], jnp.int32)
    out, residual = ours(q, k, v, **options)
    ref, ref_residual = jax.nn.dot_product_attention(q, k, v, **options)
    assert out.shape == (T, N, H)
    assert residual.shape == (T, N)
    np.testing.assert_allclose(out, ref, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(residual[:7], ref_residual[:7], atol=1e-4, rtol=1e-5)


def test_ranks_may_be_mixed():
    q, k, v = qkv(b=1)
    np.testing.assert_array_equal(ours(q, k[0], v[0]), ours(q, k, v))


def test_numpy_operands_and_lists_of_lengths():
    q, k, v = map(np.asarray, qkv())
    bias, lengths = np.arange(S), np.array([3, 5], np.int32)
    out = ours(q, k, v, key_value_seq_lengths=[3, 5], bias=bias)
    ref = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, bias=bias)
    np.testing.assert_allclose(out, ref, atol=1e-5, rtol=1e-5)


def test_what_lies_past_the_lengths_is_never_read():
    q, k, v = qkv()
    lengths = {
        "query_seq_lengths": jnp.array([0, 5], jnp.int32),
        "key_value_seq_lengths": jnp.array([4, 9], jnp.int32),
    }
    poisoned = [
        jnp.where((jnp.arange(x.shape[1]) < n[:, None])[..., None, None], x, jnp.nan)
        for x, n in zip((q, k, v), (*lengths.values(), lengths["key_value_seq_lengths"]), strict=False)
    ]

    @jax.jit
    def results(q, k, v):
        out, vjp = jax.vjp(lambda *x: ours(*x, **lengths), q, k, v)
        return out, *vjp(jnp.ones_like(out))

    for clean, got in zip(results(q, k, v), results(*poisoned), strict=False):
        np.testing.assert_array_equal(got, clean)


def test_fully_masked_rows_are_zero_which_jax_nn_makes_a_mean():
    q, k, v = qkv()
    mask = jnp.ones((1, 1, T, S), bool).at[:, :, 3].set(False)
    out, residual = ours(q, k, v, mask=mask, return_residual=True)
    np.testing.assert_array_equal(out[:, 3], 0)
    np.testing.assert_array_equal(residual[:, 3], -np.inf)
    np.testing.assert_array_equal(ours(q, k, v, bias=jnp.where(mask, 0.0, -jnp.inf))[:, 3], 0)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(("b", "t", "s"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_zero_sizes(b, t, s):
    q, k, v = qkv(b=b, t=t, s=s)
    out, residual = ours(q, k, v, return_residual=True)
    assert out.shape == q.shape
    assert residual.shape == (b, t, N)
    np.testing.assert_array_equal(out, 0)


def test_jit_and_vmap():
    q, k, v = (jnp.stack([x, -x, 2 * x]) for x in qkv())
    lengths = jnp.array([[1, 2], [13, 0], [4, 5]], jnp.int32)

    def call(q, k, v, n):
        return ours(q, k, v, key_value_seq_lengths=n)

    got = jax.jit(jax.vmap(call))(q, k, v, lengths)
    for i in range(3):
        np.testing.assert_allclose(got[i], call(q[i], k[i], v[i], lengths[i]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_float64_runs_as_plain_jax(implementation):
    def plain(q, k, v, bias):
        k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
        p = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) * H**-0.5 + bias)
        return np.einsum("bhqk,bkhd->bqhd", p / p.sum(-1, keepdims=True), v)

    random = np.random.default_rng(0)  # numbers that float32 does not have
    operands = [random.standard_normal(x.shape) for x in (*qkv(), normal(7, N, T, S))]
    with jax.enable_x64(True):
        fn = functools.partial(dot_product_attention, implementation=implementation, return_residual=True)
        out, residual = jax.jit(fn)(*operands)
        assert out.dtype == residual.dtype == jnp.float64
        np.testing.assert_allclose(out, plain(*operands), atol=1e-12, rtol=1e-12)


def test_none_and_xla_are_taken_as_jax_nn_takes_them():
    q, k, v = qkv()
    ref = jax.nn.dot_product_attention(q, k, v)
    for implementation in (None, "xla"):
        np.testing.assert_allclose(
            dot_product_attention(q, k, v, implementation=implementation), ref, atol=1e-5, rtol=1e-5
        )


def test_the_signature_is_that_of_jax_nn():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(dot_product_attention) == parameters(jax.nn.dot_product_attention)
