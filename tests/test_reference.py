"""reference.py equals the same equations in numpy (tests/equations.py), forward and backward."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BY_NAME, FIXED, VARLEN, Case, Inputs, make_inputs, operands, spec, varlen

from jax_flash import flash_attention, reference

named = pytest.mark.parametrize("case", FIXED + VARLEN, ids=lambda case: case.name)


def result(case: Case, inputs: Inputs) -> oracle.Result:
    return oracle.plain(case, inputs, operands(inputs))


@named
def test_it_equals_the_equations(case):
    inputs = make_inputs(case)
    right = oracle.exact(case, inputs)
    low = right if case.bias_dtype == "float32" else oracle.low(case, inputs)
    oracle.assert_result(result(case, inputs), right, low, case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["everything", "bias", "sinks", "packed everything", "packed window"])
def test_both_round_the_same_to_16_bits(name, dtype):
    """They may differ where float32 sums in another order fall on another side of a tie."""
    case = BY_NAME[name].replace(dtype=dtype)
    inputs = make_inputs(case)
    got = oracle.on_cpu(oracle.plain)(case, inputs, operands(inputs), round_to=jnp.dtype(dtype))
    results = [got, oracle.low(case, inputs), oracle.exact(case, inputs)]
    assert got.gradients.keys() == results[1].gradients.keys()
    # The gradient of sinks is left out: JAX sums it over the batch before it rounds.
    for of in ("out", "lse", *(got.gradients.keys() - {"sinks"})):
        x, y, z = (r.gradients[of] if of in r.gradients else getattr(r, of) for r in results)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        x, y, z = (np.where(np.isneginf(a), 0, a).astype(np.float64) for a in (x, y, z))
        error = np.abs(y - z).max()
        assert (np.abs(x - y) <= 1e-6 * np.abs(y).max()).mean() > 0.9, of
        assert np.abs(x - y).max() <= error, of
        assert 0.9 * error - 1e-6 <= np.abs(x - z).max() <= 1.1 * error + 1e-6, of


@pytest.mark.parametrize("name", ["causal, more queries", "window that misses", "mask per head"])
def test_rows_that_see_nothing_may_be_nan(name):
    """Stronger than the contract: a fully masked query row is not read either."""
    case = BY_NAME[name]
    inputs = make_inputs(case)
    clean = result(case, inputs)
    unseen = np.swapaxes(np.isneginf(clean.lse), 1, 2)[..., None]  # [b, sq, hq, 1]
    assert unseen.any()
    query = jnp.where(unseen, jnp.nan, inputs.positional["query"])
    dout = jnp.where(unseen, jnp.nan, inputs.dout)
    dirty = Inputs(inputs.positional | {"query": query}, inputs.keywords, dout, inputs.dlse)
    jax.tree.map(np.testing.assert_array_equal, vars(result(case, dirty)), vars(clean))


def test_keys_that_nobody_sees_may_be_nan():
    """Stronger than the contract: keys that nobody sees are not read either."""
    case = BY_NAME["causal top left, more keys"]
    inputs = make_inputs(case)
    dirty = {name: inputs.positional[name].at[:, case.sq :].set(jnp.nan) for name in ("key", "value")}
    dirty = Inputs(inputs.positional | dirty, inputs.keywords, inputs.dout, inputs.dlse)
    jax.tree.map(np.testing.assert_array_equal, vars(result(case, dirty)), vars(result(case, inputs)))


def test_nan_that_is_read_is_not_hidden():
    case = BY_NAME["causal"]
    inputs = make_inputs(case)
    key = inputs.positional["key"].at[0, 5].set(jnp.nan)
    got = result(case, Inputs(inputs.positional | {"key": key}, inputs.keywords, inputs.dout, inputs.dlse))
    assert np.isnan(got.out[0, 5:]).all()
    assert np.isfinite(got.out[0, :5]).all()
    assert np.isfinite(got.out[1]).all()


def test_scores_beyond_what_float32_counts_choose_the_largest():
    """XLA may round scale · score − maximum once, which differs from 0 where the score is the maximum."""
    case = Case("large", b=1, sq=64, sk=64, hq=2, hk=2, dtype="float32")
    arrays = make_inputs(case).positional
    q, k = arrays["query"] * 1e6, arrays["key"] * 1e6
    call = partial(flash_attention, scale=0.3, return_lse=True, implementation="xla")

    def loss(q, k, v):
        out, lse = call(q, k, v)
        return out.sum(), (out, lse)

    optimised = {"xla_backend_optimization_level": 3}  # the tests lower it
    run = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), compiler_options=optimised)
    gradients, (out, lse) = run(q, k, arrays["value"])
    s = 0.3 * np.einsum("bqhd,bkhd->bhqk", *(np.asarray(x, np.float64) for x in (q, k)))
    wanted = np.take_along_axis(np.asarray(arrays["value"]), s.argmax(-1).swapaxes(1, 2)[..., None], axis=1)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_allclose(lse, s.max(-1), rtol=1e-5)
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_of_minus_infinity_is_a_mask(masked):
    case = Case("bias", bias=(2, 4, 12, 12), sinks=masked)
    inputs = make_inputs(case)
    bias = jnp.where(inputs.keywords["bias"] < 0, -jnp.inf, inputs.keywords["bias"]).at[0, 0, 3].set(-jnp.inf)
    inputs = Inputs(inputs.positional, inputs.keywords | {"bias": bias}, inputs.dout, inputs.dlse)
    right = oracle.exact(case, inputs)
    got = result(case, inputs)
    oracle.assert_result(got, right, got, case)
    assert (got.gradients["bias"][np.isneginf(bias)] == 0).all()
    assert (got.out[0, 3, 0] == 0).all()


@pytest.mark.parametrize(
    ("q", "k"),
    [
        ([0, 9, 4, 40], [2, 8, 5, 40]),
        ([0, 9, 4, 40], [2, 2, 30, 1]),
        ([-4, 3, 3, 7], [0, 0, 0, 0]),
        ([50], [3]),
    ],
)
def test_any_offsets_are_read_as_their_running_maximum(q, k):
    case = varlen("garbage", (12,), causal=True, kv_lengths=(5,))
    inputs = make_inputs(case)
    offsets = {"cu_seqlens_q": jnp.array(q, jnp.int32), "cu_seqlens_k": jnp.array(k, jnp.int32)}
    lengths = {"kv_lengths": jnp.array([7, -2, 1000][: len(q) - 1], jnp.int32)}
    inputs = Inputs(inputs.positional | offsets, lengths, inputs.dout, inputs.dlse)
    right = oracle.exact(case, inputs)
    got = result(case, inputs)
    oracle.assert_result(got, right, got, case)
    assert (q, k) != ([0, 9, 4, 40], [2, 8, 5, 40]) or np.isfinite(got.lse[:, [3, 8, 9, 11]]).all()


@pytest.mark.parametrize(("sq", "sk"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("sinks", [False, True])
def test_lengths_of_zero(sq, sk, sinks):
    case = Case("empty", sq=sq, sk=sk, causal=True, sinks=sinks)
    inputs = make_inputs(case)
    right = oracle.exact(case, inputs)
    got = result(case, inputs)
    oracle.assert_result(got, right, got, case)


@pytest.mark.parametrize("slopes", [(4,), (0, 4)])
def test_a_packed_batch_of_no_sequences(slopes):
    case = varlen("nothing", (), padding=(5, 3), alibi_slopes=slopes, sinks=True, kv_lengths=(), causal=True)
    got = oracle.ref(case, make_inputs(case))
    assert (got.out == 0).all()
    assert np.isneginf(got.lse).all()
    assert all((gradient == 0).all() for gradient in got.gradients.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["everything", "packed everything"])
def test_dtypes_under_strict_promotion_and_x64(name, dtype):
    case = BY_NAME[name].replace(dtype=dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(True):
        inputs = make_inputs(case)
        got = result(case, inputs)
    assert (got.out.dtype, got.lse.dtype) == (jnp.dtype(dtype), jnp.float32)
    for operand, gradient in got.gradients.items():
        assert gradient.dtype == operands(inputs)[operand].dtype
    oracle.assert_result(got, *oracle.references(case, inputs), case)


@pytest.mark.parametrize("name", ["everything", "packed everything"])
def test_float64_is_computed_in_float64(name):
    case = BY_NAME[name].replace(dtype="float64", dropout_rate=0.0)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(True):
        inputs = make_inputs(case)
        got = result(case, inputs)
        right = oracle.exact(case, inputs)
    np.testing.assert_allclose(got.out, right.out, atol=1e-12)
    np.testing.assert_allclose(got.lse, right.lse, atol=1e-12)
    for operand in ("query", "key", "value"):
        np.testing.assert_allclose(got.gradients[operand], right.gradients[operand], atol=1e-12)


@pytest.mark.parametrize("name", ["everything", "packed everything"])
def test_vmap_adds_leading_dimensions(name):
    case = BY_NAME[name]
    inputs = [make_inputs(case, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(operands(i) for i in inputs))
    static = spec(case, inputs[0])
    many = jax.jit(jax.vmap(lambda x: reference.attention(static, x)))(stacked)
    one = jax.jit(lambda x: reference.attention(static, x))
    for n, each in enumerate(inputs):
        for got, expected in zip(many, one(operands(each)), strict=True):
            np.testing.assert_allclose(got[n], expected, atol=1e-5, rtol=1e-5)


def test_export_with_symbolic_dimensions():
    b, sq, sk, t = jax.export.symbolic_shape("b, sq, sk, t")
    shapes = {"query": (b, sq, 4, 8), "key": (b, sk, 2, 8), "value": (b, sk, 2, 8)}
    packed = {name: (t, shape[2], 8) for name, shape in shapes.items()}
    offsets = {name: jax.ShapeDtypeStruct((b + 1,), jnp.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    fixed_case = Case("symbolic", sq=5, sk=9, d=8, dv=8, causal=True, window=(4, None))
    for case, dims, indices in (
        (fixed_case, shapes, {}),
        (varlen("symbolic", (3, 4), d=8, dv=8, causal=True), packed, offsets),
    ):
        inputs = make_inputs(case)
        run = jax.jit(partial(reference.attention, spec(case, inputs)))
        arrays = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in dims.items()}
        exported = jax.export.export(run)(arrays | indices)
        for got, expected in zip(exported.call(operands(inputs)), run(operands(inputs)), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_low_is_worse_than_the_float32_result_of_the_same_inputs():
    """`low` is a meaningful limit: S and P in bfloat16 lose more than rounding the output does."""
    case = Case("long", b=1, sq=64, sk=64, dtype="bfloat16")
    inputs = make_inputs(case)
    right, low, fine = oracle.ref(case, inputs), oracle.low(case, inputs), result(case, inputs)
    low_distance, fine_distance = (np.abs(x.out.astype(np.float32) - right.out).max() for x in (low, fine))
    assert 0 < fine_distance < low_distance < 0.1


def test_the_tolerance_catches_small_errors():
    case = Case("wrong")
    inputs = make_inputs(case)
    right, low = oracle.references(case, inputs)
    off = oracle.Result(right.out.copy(), right.lse.copy(), {n: g.copy() for n, g in right.gradients.items()})
    oracle.assert_result(off, right, low, case)
    off.gradients["key"][1, 2, 0, 3] += 1e-2
    with pytest.raises(AssertionError, match=r"dkey is wrong at 1 of .* \(1, 2, 0, 3\)"):
        oracle.assert_result(off, right, low, case)
    off.out[0, 1, 2, 3] = np.nan
    with pytest.raises(AssertionError, match=r"out is wrong at 1 of .* \(0, 1, 2, 3\)"):
        oracle.assert_result(off, right, low, case)


def test_float32_is_held_to_twice_the_error_of_plain_float32_where_that_misses_the_limit():
    case = Case("large scores", sq=40, sk=40, d=136, scale=4.0, dtype="float32")
    inputs = make_inputs(case)
    plain = oracle.ref(case, inputs)
    exact = oracle.exact(case, inputs)
    with pytest.raises(AssertionError, match="out is wrong"):
        oracle.assert_result(plain, exact, exact, case)
    oracle.assert_near_plain(plain, exact, plain, 0.0)
    distance = np.abs(plain.out - exact.out).max()
    further = replace(plain, out=exact.out + 2 * distance + 2e-5 + 2e-5 * np.abs(exact.out))
    with pytest.raises(AssertionError, match="out is wrong"):
        oracle.assert_near_plain(further, exact, plain, 0.0)
    with pytest.raises(AssertionError, match="out is wrong"):
        oracle.assert_near_plain(plain, exact, exact, 0.0)
