"""apply_rotary against complex numbers in numpy, and append_kv's fused rotation against apply_rotary."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import require_devices

from jax_flash import append_kv, apply_rotary

POSITIONS, D = 10, 16


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tables(half=D // 2, positions=POSITIONS):
    """Tables cos and sin. They are of different angles, so that exchanging them changes results."""
    return np.cos(normal(1, positions, half)), np.sin(normal(2, positions, half))


def i32(*values):
    return np.array(values, np.int32)


def right(x, positions, cos, sin, interleaved=False):
    """The expected result in float64: pairs are complex numbers, multiplied by cos + i·sin. positions has x's shape
    up to the heads."""
    x, half = np.asarray(x).astype(float), cos.shape[1]
    a, b = (np.arange(half) * 2 + i if interleaved else np.arange(half) + half * i for i in (0, 1))
    at = np.clip(np.broadcast_to(positions, x.shape[:-2]), 0, len(cos) - 1)
    turned = (x[..., a] + 1j * x[..., b]) * (cos.astype(float) + 1j * sin)[at][..., None, :]
    out = x.copy()
    out[..., a], out[..., b] = turned.real, turned.imag
    return out


SHAPES = {
    "batch": ((2, 5, 3, D), i32([0, 1, 2, 3, 4], [9, 3, 3, 0, 7])),
    "positions for all of the batch": ((2, 5, 3, D), i32(4, 3, 2, 1, 0)),
    "one position each": ((2, 5, 3, D), i32([4], [7])),
    "a scalar position": ((2, 5, 3, D), i32(6).reshape(())),
    "packed": ((7, 3, D), i32(0, 1, 2, 0, 1, 0, 9)),
    "two batch dims": ((2, 2, 3, 1, D), i32([[0, 1, 2]], [[7, 8, 9]])),
    "no tokens": ((2, 0, 3, D), np.zeros((2, 0), np.int32)),
    "clamped": ((4, 1, D), i32(-1, 10, 2**31 - 1, -(2**31))),
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("name", SHAPES)
def test_rotates_by_the_position(name, interleaved):
    shape, positions = SHAPES[name]
    x = normal(0, *shape)
    got = apply_rotary(x, positions, *tables(), interleaved=interleaved)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, right(x, positions, *tables(), interleaved), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("half", [0, 1, 3, 7])
def test_features_past_the_table_are_kept_as_they_are(half, interleaved):
    x, positions = normal(0, 6, 2, D), np.arange(6, dtype=np.int32)
    got = np.asarray(apply_rotary(x, positions, *tables(half), interleaved=interleaved))
    np.testing.assert_allclose(got, right(x, positions, *tables(half), interleaved), rtol=1e-6, atol=1e-6)
    assert np.array_equal(got[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bits_are_rounded_once(dtype):
    x, positions = jnp.asarray(normal(0, 6, 2, D), dtype), np.arange(6, dtype=np.int32)
    got = apply_rotary(x, positions, *tables(12 // 2))
    wide = apply_rotary(x.astype(jnp.float32), positions, *tables(12 // 2))
    assert got.dtype == dtype
    assert np.array_equal(got, wide.astype(dtype))


def test_the_product_of_rotated_vectors_depends_on_their_distance():
    angles = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(0, D, 2) / D)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    q, k = (np.broadcast_to(normal(i, 1, 1, D), (POSITIONS, 1, D)) for i in (3, 4))
    at = np.arange(POSITIONS, dtype=np.int32)
    for interleaved in (False, True):
        turned = (np.asarray(apply_rotary(x, at, cos, sin, interleaved=interleaved))[:, 0] for x in (q, k))
        products = np.matmul(*(x if i == 0 else x.T for i, x in enumerate(turned)))
        for distance in range(-3, 4):
            np.testing.assert_allclose(np.ptp(np.diagonal(products, distance)), 0, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_its_gradient_is_the_rotation_back(interleaved):
    x, dout, positions = normal(0, 2, 5, 3, D), normal(5, 2, 5, 3, D), i32(4, 3, 2, 1, 0)
    cos, sin = tables(6)
    _, pullback = jax.vjp(lambda x: apply_rotary(x, positions, cos, sin, interleaved=interleaved), x)
    np.testing.assert_allclose(
        pullback(dout)[0], right(dout, positions, cos, -sin, interleaved), rtol=1e-6, atol=1e-6
    )


def test_cos_and_sin_have_gradients_summed_over_the_tokens_at_a_position():
    x, positions = normal(0, 3, 1, 4), i32(2, 2, 5)
    cos, sin = tables(2)
    dcos, dsin = jax.grad(lambda *t: apply_rotary(x, positions, *t).sum(), (0, 1))(cos, sin)
    a, b = x[:, 0, :2], x[:, 0, 2:]
    for got, each in ((dcos, a + b), (dsin, a - b)):
        wanted = np.zeros_like(cos)
        np.add.at(wanted, positions, each)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_jit_vmap_and_strict_promotion():
    x, positions = normal(0, 2, 5, 3, D), i32([0, 1, 2, 3, 4], [9, 3, 3, 0, 7])
    wanted = apply_rotary(x, positions, *tables())
    with jax.numpy_dtype_promotion("strict"):
        each = jax.jit(jax.vmap(lambda x, at: apply_rotary(x, at, *tables())))
        np.testing.assert_allclose(each(x, positions), wanted, rtol=1e-6, atol=1e-6)
    with jax.enable_x64(True):
        assert apply_rotary(x, positions, *tables()).dtype == jnp.float32


@pytest.mark.parametrize(("split", "positions", "at"), [
    (P("x", None, "y", None), i32([4, 3, 2, 1], [9, 3, 3, 0]), P("x")),
    (P("y", None, None, None), i32([4], [7]), P("x")),
    (P(None, "x", None, None), i32(0, 3, 1, 2), P("x")),
], ids=["batch", "lengths, over another axis", "sequence"])  # fmt: skip
def test_explicit_axes_may_split_the_positions(split, positions, at):
    """The result is split as x is."""
    require_devices(4)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    x, tables_of = normal(0, 2, 4, 2, D), tables()
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in ((x, split), (positions, at))]

    def run(x, at):
        got, pullback = jax.vjp(lambda x, *t: apply_rotary(x, at, *t), x, *tables_of)
        return got, pullback(got)[0]

    with jax.set_mesh(mesh):
        got, dx = jax.jit(run)(*placed)
    assert jax.typeof(got).sharding.spec == jax.typeof(dx).sharding.spec == split
    np.testing.assert_allclose(got, right(x, positions, *tables_of), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [D, D // 2], ids=["all columns", "half"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("split", [P("x", None, "y"), P(None, "x")], ids=str)
def test_explicit_axes_outside_jit(split, interleaved, columns):
    require_devices(4)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    x, tables_of = normal(0, 2, 4, 2, D), [t[:, : columns // 2] for t in tables()]
    placed = jax.device_put(x, NamedSharding(mesh, split))
    got = apply_rotary(placed, jnp.arange(4), *tables_of, interleaved=interleaved)
    wanted = apply_rotary(x, jnp.arange(4), *tables_of, interleaved=interleaved)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert got.sharding.is_equivalent_to(placed.sharding, 4)


# append_kv with rotary = append_kv of what apply_rotary makes of the keys.

PAGES = i32([5, 0, 3], [2, 4, 1])
BEFORE = i32(6, 0)
CU = i32(0, 1, 4)


def pools(layout="nhd", dtype=np.float32):
    shape = (6, 4, 2, D) if layout == "nhd" else (6, 2, 4, D)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


APPENDS = {
    "halves": {},
    "interleaved": dict(interleaved=True),
    "some features": dict(half=3),
    "some features, interleaved": dict(half=3, interleaved=True),
    "hnd": dict(page_layout="hnd"),
    "packed": dict(cu_seqlens=CU),
    "packed, hnd, interleaved": dict(cu_seqlens=CU, page_layout="hnd", interleaved=True),
    "positions clamped to the table": dict(positions=7),
}


@pytest.mark.parametrize("name", APPENDS)
def test_append_kv_rotates_keys_while_writing(name, implementation):
    options = dict(APPENDS[name])
    rotary = tables(options.pop("half", D // 2), options.pop("positions", 12))
    interleaved = options.pop("interleaved", False)
    packed = "cu_seqlens" in options
    shape = (5, 2, D) if packed else (2, 3, 2, D)  # the fifth packed token belongs to no sequence
    key, value = normal(6, *shape), normal(7, *shape)
    positions = i32(6, 0, 1, 2, 0) if packed else BEFORE[:, None] + np.arange(3, dtype=np.int32)
    rest = dict(options, implementation=implementation)
    cache = (*pools(options.get("page_layout", "nhd")),)
    got = append_kv(*cache, key, value, PAGES, BEFORE, rotary=rotary, interleaved=interleaved, **rest)
    turned = apply_rotary(key, positions, *rotary, interleaved=interleaved)
    wanted = append_kv(*cache, turned, value, PAGES, BEFORE, **rest)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    assert np.array_equal(got[1], wanted[1])
    assert np.array_equal(got[2], wanted[2])
    assert np.array_equal(got[2], i32(7, 3) if packed else i32(9, 3))
    written = np.asarray(wanted[0]).any(-1)
    assert written.sum() == 2 * (4 if packed else 6)
    assert np.array_equal(np.asarray(got[0]).any(-1), written)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_append_kv_rotates_sixteen_bits_to_the_same_bits(dtype, implementation):
    key, value = (jnp.asarray(normal(i, 2, 3, 2, D), dtype) for i in (6, 7))
    rotary, at = tables(positions=12), BEFORE[:, None] + np.arange(3, dtype=np.int32)
    call = dict(block_tables=PAGES, kv_lengths=BEFORE, implementation=implementation)
    got, _, _ = append_kv(*pools(dtype=dtype), key, value, rotary=rotary, **call)
    wanted, _, _ = append_kv(*pools(dtype=dtype), apply_rotary(key, at, *rotary), value, **call)
    # A product that is fused with a sum may be rounded differently.
    one_rounding = 2.0 ** (-10 if dtype == jnp.float16 else -7)
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=one_rounding, atol=1e-6
    )


def test_append_kv_rotates_before_it_quantises(implementation):
    key, value = (normal(i, 2, 3, 2, D) for i in (6, 7))
    rotary, at = tables(positions=12), BEFORE[:, None] + np.arange(3, dtype=np.int32)
    scales = dict(k_scale=np.array([0.02, 0.05], np.float32), v_scale=np.array([0.03, 0.01], np.float32))
    call = dict(block_tables=PAGES, kv_lengths=BEFORE, implementation=implementation) | scales
    cache = pools(dtype=jnp.float8_e4m3fn)
    got, _, _ = append_kv(*cache, key, value, rotary=rotary, **call)
    stored = np.asarray(got).astype(np.float32) * scales["k_scale"][:, None]
    turned = right(key, at, *rotary)
    for z, row in enumerate(PAGES):
        for i, position in enumerate(at[z]):
            there = stored[row[position // 4], position % 4]
            np.testing.assert_allclose(there, turned[z, i], rtol=2.0**-4, atol=2e-4)


@pytest.mark.parametrize(("dtype", "step"), [(jnp.float16, 2.0**-12), (jnp.bfloat16, 2.0**-10)])
def test_append_kv_rounds_what_it_rotates_to_the_keys_dtype_before_it_quantises(dtype, step, implementation):
    """1.0625 + step is rounded to 1.0625 in the keys' dtype. This lies halfway between two float8 and becomes the even
    one, 1. Rounded directly to float8, 1.0625 + step would become 1.125."""
    key = jnp.ones((2, 3, 2, D), dtype).at[..., : D // 2].set(1.0625)
    cos, sin = np.ones((12, D // 2), np.float32), np.full((12, D // 2), -step, np.float32)
    call = dict(block_tables=PAGES, kv_lengths=BEFORE, implementation=implementation)
    cache = pools(dtype=jnp.float8_e4m3fn)
    got, _, _ = append_kv(*cache, key, key, rotary=(cos, sin), **call)
    at = BEFORE[:, None] + np.arange(3, dtype=np.int32)
    wanted, _, _ = append_kv(*cache, apply_rotary(key, at, cos, sin), key, **call)
    got, wanted = (np.asarray(x).astype(np.float32) for x in (got, wanted))
    assert np.array_equal(got, wanted)
    assert set(got[..., : D // 2].ravel()) == {0.0, 1.0}


@pytest.mark.parametrize(("dtype", "step"), [(jnp.float16, 2.0**-12), (jnp.bfloat16, 2.0**-10)])
def test_dynamic_scales_are_those_of_rotated_keys_in_the_keys_dtype(dtype, step, implementation):
    """1.75 + step is rounded to 1.75 in the keys' dtype. For 1.75 a scale of 1 / 256 is enough, because float8's
    largest number is 448 and 448 / 256 = 1.75. For 1.75 + step the scale would be the next power of two."""
    key = jnp.ones((2, 3, 2, D), dtype).at[..., : D // 2].set(1.75)
    cos, sin = np.ones((12, D // 2), np.float32), np.full((12, D // 2), -step, np.float32)
    scales = {name: jnp.ones((6, 2), jnp.float32) for name in ("k_scale", "v_scale")}
    call = (
        dict(block_tables=PAGES, kv_lengths=BEFORE, scale="dynamic", implementation=implementation) | scales
    )
    cache = pools(dtype=jnp.float8_e4m3fn)
    got = append_kv(*cache, key, key, rotary=(cos, sin), **call)
    at = BEFORE[:, None] + np.arange(3, dtype=np.int32)
    wanted = append_kv(*cache, apply_rotary(key, at, cos, sin), key, **call)
    for x, y in zip(got, wanted, strict=True):
        assert np.array_equal(np.asarray(x).astype(np.float32), np.asarray(y).astype(np.float32))
    assert (np.asarray(got[3])[PAGES[1, 0]] == 1 / 256).all()  # the page that begins


# Errors.

X, AT = normal(0, 2, 5, 3, D), np.arange(5, dtype=np.int32)
COS, SIN = tables()
ERRORS = {
    "rank": (
        lambda: apply_rotary(X[0, 0], AT, COS, SIN),
        ValueError,
        "x must have shape [..., s, h, d], got (3, 16)",
    ),
    "positions' dtype": (
        lambda: apply_rotary(X, AT.astype(np.float64), COS, SIN),
        TypeError,
        "positions must hold integers, got float64",
    ),
    "positions' shape": (
        lambda: apply_rotary(X, AT[:4], COS, SIN),
        ValueError,
        "positions must broadcast to [... s] = (2, 5), got shape (4,)",
    ),
    "positions of more dims": (
        lambda: apply_rotary(X, AT[None, None, None], COS, SIN),
        ValueError,
        "positions must broadcast to [... s] = (2, 5), got shape (1, 1, 1, 5)",
    ),
    "x's dtype": (
        lambda: apply_rotary(X.astype(np.int32), AT, COS, SIN),
        TypeError,
        "x has dtype int32, allowed are float16, bfloat16, float32",
    ),
    "cos' dtype": (
        lambda: apply_rotary(X, AT, jnp.asarray(COS, jnp.bfloat16), SIN),
        TypeError,
        "cos must be float32, got bfloat16; cast it with .astype('float32')",
    ),
    "cos' rank": (
        lambda: apply_rotary(X, AT, COS[0], SIN[0]),
        ValueError,
        "cos must have rank 2 [positions d_rot/2], got shape (8,)",
    ),
    "sin's shape": (
        lambda: apply_rotary(X, AT, COS, SIN[:4]),
        ValueError,
        "sin must have shape [positions d_rot/2] = (10, 8), got (4, 8)",
    ),
    "too many features": (
        lambda: apply_rotary(X, AT, *tables(9)),
        ValueError,
        "cos has 9 columns, for 18 features; the head dim is 16",
    ),
    "no positions": (
        lambda: apply_rotary(X, AT, COS[:0], SIN[:0]),
        ValueError,
        "cos must have at least one position, got 0",
    ),
    "interleaved": (
        lambda: apply_rotary(X, AT, COS, SIN, interleaved=1),
        TypeError,
        "interleaved must be True or False, got 1",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match="^" + re.escape("apply_rotary: " + message)):
        call()


@pytest.mark.parametrize("rotary", [COS, (COS,), "cos"], ids=["an array", "one array", "a word"])
def test_append_kvs_rotary_is_a_pair(rotary):
    key = normal(6, 2, 3, 2, D)
    with pytest.raises(TypeError, match=r"append_kv: rotary must be a pair \(cos, sin\), got"):
        append_kv(*pools(), key, key, PAGES, BEFORE, rotary=rotary)
