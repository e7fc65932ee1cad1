"""Errors that other attention libraries had, one test each."""

import checks
import equations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, make_inputs, varlen

from jax_flash import flash_attention, merge_attention


def usual(case, implementation):
    return case.replace(dtype=checks.usual_dtype(implementation))


def attend(implementation, *arrays, **options):
    return flash_attention(*arrays, **options, implementation=implementation, return_lse=True)


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Tiles and head dims.


@pytest.mark.parametrize("d", [96, 160, 224])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head_dims_that_are_no_power_of_two_do_not_collide(d, dtype, kernel):
    checks.check(Case("dims", b=1, sq=70, sk=130, hq=2, hk=1, d=d, dv=d, dtype=dtype), kernel)


@pytest.mark.parametrize("causal", [False, True])
def test_an_odd_number_of_tiles_of_queries_before_many_keys(causal, kernel):
    """On Hopper 2-CTA clusters run this; with an odd number of tiles, one CTA has one tile less."""
    case = Case("odd", b=1, sq=17 * 128 - 40, sk=4099, hq=1, hk=1, d=256, dv=256, causal=causal)
    checks.check(usual(case, kernel), kernel)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("lengths", [(160, 192), (192, 160)])
def test_causal_with_different_lengths_never_sees_the_future(lengths, align, kernel):
    """Changing keys that no query may see changes no bit, and the results over visible keys are right."""
    sq, sk = lengths
    case = usual(Case("future", b=1, sq=sq, sk=sk, hq=2, hk=1, causal=True, align=align), kernel)
    checks.check(case, kernel)
    inputs = make_inputs(case)
    i = 100
    diagonal = i + sk - sq if align == "bottom_right" else i
    changed = {
        name: x.at[:, diagonal + 1 :].set(7.0) for name, x in inputs.positional.items() if name != "query"
    }
    before = checks.run(case, inputs, kernel)
    after = checks.run(case, checks.with_arrays(inputs, **changed), kernel)
    np.testing.assert_array_equal(before.out[:, : i + 1], after.out[:, : i + 1])
    assert (before.out[:, i + 1] != after.out[:, i + 1]).any()


def zeros_without_memory(shape, dtype):
    """A zero array of which only written pages take memory. It is aligned, so that DLPack shares it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def test_offsets_above_two_to_the_31_elements(kernel):
    """The last entry of the batch lies past 2³¹ elements of key and value."""
    checks.require(kernel, dtype="float16", d=256, dv=256)
    sk, used = 2**22 + 64, 5
    k = zeros_without_memory((3, sk, 1, 256), np.float16)
    assert k[0].size * 2 > 2**31
    q, kv = (
        normal(3, 2, 1, 256, dtype=jnp.float16),
        np.asarray(normal(used, 1, 256, dtype=jnp.float16, seed=1)),
    )
    k[2, :used] = kv
    k = jax.device_put(jax.dlpack.from_dlpack(k), jax.devices()[0])
    lengths = jnp.asarray([0, 0, used], jnp.int32)
    out, lse = attend(kernel, q, k, k, kv_lengths=lengths)
    _, wanted_lse = attend("xla", q[2:], kv[None], kv[None])
    kv = jnp.asarray(kv[None])
    oracle.assert_out(np.asarray(out[2:]), *oracle.plain_outs(q[2:], kv, kv, np.ones((1, 2, used), bool)))
    np.testing.assert_allclose(lse[2], wanted_lse[0], rtol=1e-4, atol=1e-4)
    assert np.isneginf(lse[:2]).all()


# Softmax.


def means(q, k, v):
    """oracle.plain_outs() of one row whose scores are all equal."""
    return oracle.plain_outs(0 * q[:, :1], k, v, np.ones((len(q), 1, k.shape[1]), bool))


def test_rows_of_very_negative_scores_are_not_zero(implementation):
    """A running maximum that started at the smallest positive float would stay there."""
    checks.require(implementation, dtype="bfloat16")
    v = normal(1, 70, 1, 16, dtype=jnp.bfloat16)
    q = jnp.full((1, 3, 1, 16), 10, jnp.bfloat16)
    k = jnp.full((1, 70, 1, 16), -10, jnp.bfloat16)
    for options in ({}, {"bias": jnp.full((1,), -1e30)}, {"bias": jnp.full((3, 1), -1e4), "softcap": 5.0}):
        out, lse = attend(implementation, q, k, v, **options)
        mean = v.astype(jnp.float32).mean(1)[:, None]
        np.testing.assert_allclose(out.astype(jnp.float32), np.broadcast_to(mean, out.shape), atol=1e-3)
        assert (lse < -380).all() or "softcap" in options
        assert np.isfinite(lse).all()


@pytest.mark.parametrize("row", [-1e30, -1e4, 1e4, 1e30])
def test_a_row_with_an_enormous_bias_has_the_same_softmax_as_without(row, implementation):
    """The other rows agree bit for bit. The bias is the same for the whole row, so it must not change the softmax, even
    if float32 rounds the scores away. Compared with a bias of zeros, since no bias may run another kernel."""
    case = usual(Case("enormous", sk=70), implementation)
    inputs = make_inputs(case)
    none = jnp.zeros((12, 1))
    got, plain = (
        checks.run(case, checks.with_arrays(inputs, bias=bias), implementation)
        for bias in (none.at[3].set(row), none)
    )
    others = np.arange(12) != 3
    np.testing.assert_array_equal(got.out[:, others], plain.out[:, others])
    if abs(row) > 1e20:  # the scores are rounded away, so that each equals the bias
        oracle.assert_out(got.out[:, 3:4], *means(*inputs.positional.values()))
    else:
        # A score beside 10⁴ has a unit of 2⁻¹⁰ in float32, and a result one of its dtype.
        unit = float(jnp.finfo(got.out.dtype).eps)
        np.testing.assert_allclose(*(np.float32(x.out[:, 3]) for x in (got, plain)), rtol=unit, atol=2**-10)
    np.testing.assert_allclose(got.lse[..., 3], row + plain.lse[..., 3], rtol=1e-5)


@pytest.mark.parametrize("factor", [100.0, -100.0, 3000.0])
def test_scores_of_thousands_neither_overflow_nor_become_nan(factor, implementation):
    case = usual(Case("large", sk=70, causal=True), implementation)
    inputs = make_inputs(case)
    large = checks.with_arrays(inputs, query=inputs.positional["query"] * factor)
    got = checks.run(case, large, implementation)
    wanted = checks.run(case.replace(dtype="float32"), large, "xla")
    assert np.isfinite(got.out.astype(np.float32)).all()
    np.testing.assert_allclose(got.lse, wanted.lse, rtol=1e-5, atol=1e-2)
    assert all(np.isfinite(x.astype(np.float32)).all() for x in got.gradients.values())


@pytest.mark.parametrize("big", [-1e9, -1e30, "lowest"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [128, 130])
def test_a_bias_that_hides_keys_by_a_large_number(n, dtype, big, implementation):
    """A common way to mask: such a key has no weight if the row sees others, and a row of only such keys is not NaN."""
    checks.require(implementation, dtype=dtype)
    q, k, v = (normal(1, n, 2, 64, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    mask = np.random.default_rng(0).random((n, n)) < 0.5
    mask[5], mask[70] = False, True
    bias = jnp.where(mask, 0.0, float(jnp.finfo(dtype).min) if big == "lowest" else big).astype(dtype)
    out, lse = map(np.asarray, attend(implementation, q, k, v, bias=bias))
    seen = mask.any(1)
    oracle.assert_out(out[:, seen], *(x[:, seen] for x in oracle.plain_outs(q, k, v, mask[None])))
    assert np.isfinite(out.astype(np.float32)).all()
    assert not np.isnan(lse).any()
    loss = lambda *x: attend(implementation, *x[:3], bias=x[3])[0].astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.grad(loss, (0, 1, 2, 3))(q, k, v, bias)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradients)
    if big != "lowest":  # 2^x of the lowest number may be −∞, which hides the key like a mask
        oracle.assert_out(out[:, 5:6], *means(q, k, v))


@pytest.mark.parametrize("sign", ["both", "negative"])
@pytest.mark.parametrize("option", [None, "bias", "rows of bias", "alibi", "segments", "two"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_beyond_what_float32_counts_choose_the_largest(dtype, option, sign, implementation):
    """From 2³² on, the rounding of scale · score exceeds the largest exponent that 2^x takes without overflow."""
    checks.require(implementation, dtype=dtype)
    q, k = (jnp.clip(normal(1, 200, 2, 64, seed=seed) * 3e4, -6e4, 6e4).astype(dtype) for seed in (1, 2))
    if sign == "negative":
        q, k = jnp.abs(q), -jnp.abs(k)
    v = normal(1, 200, 2, 64, dtype=dtype, seed=3)
    alibi, ids = {"alibi_slopes": jnp.full((2,), 0.5)}, jnp.zeros((1, 200), jnp.int32)
    options = {"scale": 2.0} | {
        None: {},
        "bias": {"bias": jnp.zeros((1,))},
        "rows of bias": {"bias": jnp.zeros((1, 1, 200, 200), dtype)},
        "alibi": alibi,
        "segments": {"segment_ids": (ids, ids)},
        "two": alibi | {"bias": jnp.zeros((1, 200))},
    }[option]

    def loss(q, k, v):
        out, lse = attend(implementation, q, k, v, **options)
        return jnp.sum(out.astype(jnp.float32) * 3), (out, lse)

    (_, (out, lse)), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    s = np.einsum("bqhd,bkhd->bhqk", *(np.asarray(x, np.float64) for x in (q, k))) * 2
    wanted = np.take_along_axis(np.asarray(v, np.float32), s.argmax(-1).swapaxes(1, 2)[..., None], axis=1)
    assert abs(s.max(-1)).min() > 2**32
    np.testing.assert_array_equal(np.asarray(out, np.float32), wanted)
    np.testing.assert_allclose(lse, s.max(-1), rtol=1e-5)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradients)


def test_parts_with_large_lse_are_merged_without_overflow(implementation):
    """exp(lse) overflows above 88: the parts are weighed with their maximum subtracted."""
    checks.require(implementation, dtype="float16")
    q, k, v = normal(2, 9, 4, 16) * 40, normal(2, 70, 2, 16, seed=1) * 10, normal(2, 70, 2, 16, seed=2)
    q, k, v = (x.astype(checks.usual_dtype(implementation)) for x in (q, k, v))
    whole, lse = attend(implementation, q, k, v)
    assert lse.max() > 500
    parts = [attend(implementation, q, k[:, a:b], v[:, a:b]) for a, b in ((0, 33), (33, 64), (64, 70))]
    out, merged = merge_attention(*zip(*parts, strict=True))
    np.testing.assert_allclose(merged, lse, rtol=1e-5)
    # lse beside 2000 has a unit of 2⁻¹³, and 16-bit results are rounded in the parts and in the merge.
    limit = max(2**-11, 2 * float(jnp.finfo(q.dtype).eps))
    np.testing.assert_allclose(out.astype(np.float32), whole.astype(np.float32), rtol=limit, atol=limit)


# Lengths.


def test_lengths_absent_full_and_zero(implementation):
    checks.require(implementation, dtype="bfloat16")
    q, k, v = make_inputs(Case("lengths", dtype="bfloat16")).positional.values()
    absent = attend(implementation, q, k, v)
    full = jnp.full(2, 12, jnp.int32)

    def same(x, y):
        # Plain JAX runs these as two programs, whose products XLA tunes separately on a GPU.
        tuned = implementation == "xla" and jax.default_backend() == "gpu"
        tolerance = float(jnp.finfo(x.dtype).eps) if tuned else 0
        np.testing.assert_allclose(
            *(np.asarray(z, np.float64) for z in (x, y)), rtol=2 * tolerance, atol=tolerance
        )

    jax.tree.map(same, attend(implementation, q, k, v, kv_lengths=full), absent)
    jax.tree.map(same, attend(implementation, q, k, v, q_lengths=full, kv_lengths=full), absent)
    out, lse = attend(implementation, q, k, v, kv_lengths=jnp.zeros(2, jnp.int32))
    assert not out.any()
    assert np.isneginf(lse).all()


def test_rows_with_no_visible_key_are_written(kernel):
    """The result's memory is full of another call's values: rows nobody computes must still become 0 and −inf."""
    for case in (
        Case("first rows", sq=130, sk=5, causal=True),
        Case("window", sq=130, sk=70, window=(3, 0), align="top_left"),
        Case("mask", sq=130, sk=70, mask=(130, 1)),
        varlen("no keys", (64, 70, 3), k_sequences=(0, 5, 0), padding=(9, 2), causal=True),
    ):
        case = usual(case, kernel)
        inputs = make_inputs(case)
        for _ in range(3):
            got = checks.run(case, inputs, kernel)
            rows = np.swapaxes(got.lse, -1, -2)
            assert np.isneginf(rows).any()
            assert (got.out[np.isneginf(rows)] == 0).all()
            if "query" in got.gradients:
                assert (got.gradients["query"][np.isneginf(rows)] == 0).all()


@pytest.mark.parametrize(
    "sequences", [((5, 9, 1), (30, 2, 40)), ((50, 20), (3, 4)), ((3, 0), (0, 9))], ids=str
)
def test_packed_keys_of_another_total_than_the_queries(sequences, kernel):
    q_sequences, k_sequences = sequences
    case = varlen("totals", q_sequences, k_sequences=k_sequences, causal=True)
    checks.check(usual(case, kernel), kernel)


# Padding.


def test_zero_times_nan_in_the_padding_of_value(implementation):
    """P = 0 past the length, but 0 × NaN is NaN: value itself must be masked. The tail is within the last tile."""
    checks.require(implementation, dtype="bfloat16")
    q, k, v = make_inputs(Case("padding", sk=70, dtype="bfloat16")).positional.values()
    lengths = jnp.asarray([65, 1], jnp.int32)
    wanted = attend(implementation, q, k, v, kv_lengths=lengths)
    past = (np.arange(70) >= np.array(lengths)[:, None])[..., None, None]
    for poison in (np.nan, np.inf):
        k, v = (jnp.where(past, jnp.asarray(poison, x.dtype), x) for x in (k, v))
        got = attend(implementation, q, k, v, kv_lengths=lengths)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


# Bias.


@pytest.mark.parametrize("sk", [1, 7, 9, 63, 65])
@pytest.mark.parametrize("shape", ["b hq sq sk", "sq 1", "sk", "hq 1 1"])
def test_bias_whose_last_dim_is_one_or_no_multiple_of_eight(sk, shape, kernel):
    sizes = dict(b=2, hq=4, sq=12, sk=sk)
    bias = tuple(int(sizes.get(dim, dim)) for dim in shape.split())
    checks.check(usual(Case("bias", sk=sk, bias=bias), kernel), kernel)


def test_the_gradient_of_a_broadcast_bias_is_its_sum(implementation):
    checks.require(
        implementation, "forward", "backward", "bias_gradient", dtype=checks.usual_dtype(implementation)
    )
    case = usual(Case("bias", sk=21, causal=True), implementation)
    q, k, v = make_inputs(case).positional.values()

    def gradient(bias):
        return jax.grad(lambda b: (attend(implementation, q, k, v, bias=b, causal=True)[0] ** 2).sum())(bias)

    full = gradient(jnp.zeros((2, 4, 12, 21)))
    for axes in ((0,), (1, 2), (3,), (0, 1, 2, 3)):
        shape = [1 if axis in axes else size for axis, size in enumerate(full.shape)]
        np.testing.assert_allclose(
            gradient(jnp.zeros(shape)), full.sum(axes, keepdims=True), rtol=1e-3, atol=1e-4
        )


# Dropout and lse.


def test_forward_and_backward_drop_the_same_weights_in_every_tile(implementation):
    """With value = I the output is P itself; with do = I, dv is Pᵀ as the backward recomputed it."""
    checks.require(
        implementation, "forward", "backward", dtype=checks.usual_dtype(implementation), d=128, dv=128
    )
    dtype, s = checks.usual_dtype(implementation), 128
    q, k = normal(1, s, 1, 128, dtype=dtype), normal(1, s, 1, 128, dtype=dtype, seed=1)
    eye = jnp.eye(s, dtype=dtype)[None, :, None]
    key = jax.random.key(5)
    (p, _), pullback = jax.vjp(
        lambda v: attend(implementation, q, k, v, dropout_rate=0.5, dropout_key=key), eye
    )
    (transposed,) = pullback((eye, jnp.zeros((1, 1, s))))
    dropped = np.asarray(p[0, :, 0] == 0)
    np.testing.assert_array_equal(dropped, np.asarray(transposed[0, :, 0] == 0).T)
    words = np.concatenate([np.asarray(jax.random.key_data(key)), np.zeros(4, np.uint32)])
    numbers = equations.dropout_number(words, 0, 0, *np.ogrid[:s, :s])
    np.testing.assert_array_equal(dropped, numbers < 16384)


def test_the_cotangent_of_lse_is_not_forgotten(implementation):
    """d lse / d q = scale · P k, which needs no dout at all: delta = rowsum(do ∘ o) − dlse."""
    case = usual(Case("lse", causal=True, sk=17), implementation)
    checks.require(implementation, "forward", "backward", dtype=case.dtype)
    inputs = make_inputs(case)
    gradients = jax.grad(
        lambda q, k, v: attend(implementation, q, k, v, causal=True)[1].sum(), argnums=(0, 1, 2)
    )(*inputs.positional.values())
    alone = {"dout": jnp.zeros_like(inputs.dout), "dlse": jnp.ones_like(inputs.dlse)}
    right, low = oracle.references(case, checks.with_arrays(inputs, **alone))
    for name, got in zip(("query", "key"), gradients):
        oracle.assert_gradient(name, np.asarray(got), right.gradients[name], low.gradients[name])
    assert not gradients[2].any()


# Errors are raised, and the process goes on.


def test_a_wrong_call_is_an_exception_and_the_next_call_is_right(implementation):
    checks.require(implementation, dtype="bfloat16")
    q, k, v = make_inputs(Case("next", dtype="bfloat16")).positional.values()
    before = attend(implementation, q, k, v)
    with pytest.raises(ValueError, match="key has 3 heads, which does not divide query's 4"):
        attend(implementation, q, q[:, :, :3], q[:, :, :3])
    jax.tree.map(np.testing.assert_array_equal, attend(implementation, q, k, v), before)


def test_calls_of_many_sizes_in_turn(implementation):
    """The plans of a thread's last calls are kept: each size has its own, and it is made again after many others."""
    dtype = checks.usual_dtype(implementation)
    checks.require(implementation, "forward", "backward", dtype=dtype, d=64, dv=64)
    for s in (*range(20, 220, 20), 20, 200):
        case = Case(f"{s} rows", sq=s, sk=s + 9, d=64, dv=64, causal=True, dtype=dtype)
        checks.check(case, implementation)


# Segments.


@pytest.mark.parametrize("d", checks.HOPPER_HEAD_DIMS)
@pytest.mark.parametrize("order", ["sorted", "mixed", "strangers"])
def test_segments_that_hide_whole_tiles_of_keys(d, order, kernel):
    """Kernels skip tiles by their smallest and largest ids: rows in any order, and keys of no row's segment."""
    sq, sk = 500, 900
    case = Case("tiles", b=1, sq=sq, sk=sk, hq=2, hk=1, d=d, dv=d, causal=order == "mixed", dtype="float16")
    checks.require(kernel, dtype=case.dtype, d=d, dv=d)
    q_ids, k_ids = np.sort(np.arange(sq) * 7 // sq), np.sort(np.arange(sk) * 7 // sk)
    if order == "mixed":
        q_ids, k_ids = q_ids[::-1] * 3 % 7, k_ids * 3 % 7
    elif order == "strangers":
        k_ids[:300], k_ids[800:], q_ids[:100] = 90, -5, 50
    ids = tuple(jnp.asarray(x[None], jnp.int32) for x in (q_ids, k_ids))
    inputs = checks.with_arrays(make_inputs(case), segment_ids=ids)
    right, low = oracle.references(case, inputs)
    got = checks.run(case, inputs, kernel)
    if not got.gradients:
        right, low = (oracle.Result(x.out, x.lse) for x in (right, low))
    oracle.assert_result(got, right, low, case)
