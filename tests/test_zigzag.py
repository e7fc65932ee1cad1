"""Zigzag order: the chunks of each shard, the inverse permutation, and the positions of its tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import zigzag_permute, zigzag_positions, zigzag_unpermute


def test_a_shard_holds_a_chunk_from_the_front_and_its_mirror_image_from_the_back():
    letters = np.array([list("aabbccdd")])
    shards = zigzag_permute(letters.view(np.int32), 2).reshape(2, 4)
    assert ["".join(map(chr, shard)) for shard in np.asarray(shards)] == ["aadd", "bbcc"]


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_shards_are_equal_work_under_a_causal_mask(devices):
    positions = np.asarray(zigzag_positions(12 * devices, devices)).reshape(devices, -1)
    keys_seen = (positions + 1).sum(axis=1)
    assert (keys_seen == keys_seen[0]).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_unpermute_is_the_inverse_along_any_axis(axis):
    x = jnp.arange(16 * 8 * 32, dtype=jnp.float32).reshape(16, 8, 32)
    permuted = zigzag_permute(x, 4, axis)
    assert permuted.shape == x.shape
    np.testing.assert_array_equal(zigzag_unpermute(permuted, 4, axis), x)
    np.testing.assert_array_equal(zigzag_permute(zigzag_unpermute(x, 4, axis), 4, axis), x)


def test_positions_say_which_token_is_where():
    x = np.arange(100, 124)
    np.testing.assert_array_equal(x[zigzag_positions(24, 3)], zigzag_permute(x, 3, 0))
    assert zigzag_positions(8, 2).dtype == jnp.int32
    assert zigzag_positions(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


def test_dtypes_stay_and_both_modes_of_differentiation_and_vmap_run():
    assert zigzag_permute(np.ones((1, 4), bool), 2).dtype == bool
    x, dx = jnp.arange(8.0), jnp.cos(jnp.arange(8.0))
    _, tangent = jax.jvp(lambda x: zigzag_permute(x, 2, 0), (x,), (dx,))
    np.testing.assert_array_equal(tangent, zigzag_permute(dx, 2, 0))
    (gradient,) = jax.vjp(lambda x: zigzag_permute(x, 2, 0), x)[1](dx)
    np.testing.assert_array_equal(gradient, zigzag_unpermute(dx, 2, 0))
    batch = jnp.stack([x, dx])
    mapped = jax.vmap(lambda x: zigzag_permute(x, 2, 0))(batch)
    np.testing.assert_array_equal(mapped, zigzag_permute(batch, 2))


@pytest.mark.parametrize("wrong", [2.0, "2", True, None])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("zigzag_permute: devices", lambda x: zigzag_permute(np.ones((1, 8)), x)),
        ("zigzag_unpermute: devices", lambda x: zigzag_unpermute(np.ones((1, 8)), x)),
        ("zigzag_permute: axis", lambda x: zigzag_permute(np.ones((1, 8)), 2, x)),
        ("zigzag_positions: length", lambda x: zigzag_positions(x, 2)),
        ("zigzag_positions: devices", lambda x: zigzag_positions(8, x)),
    ],
)
def test_numbers_that_are_no_ints_are_refused(name, call, wrong):
    with pytest.raises(TypeError, match=f"^{name} must be an int, got {wrong!r}$"):
        call(wrong)


def test_nothing_is_permuted_to_nothing():
    for x in (np.ones((2, 0, 3)), np.ones((0, 8, 3))):
        assert zigzag_permute(x, 2).shape == zigzag_unpermute(x, 2).shape == x.shape


def test_ints_of_numpy_are_taken():
    np.testing.assert_array_equal(zigzag_positions(np.int64(8), np.int32(2)), zigzag_positions(8, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zigzag_positions(-8, 2), "zigzag_positions: length must be at least 0, got -8"),
        (lambda: zigzag_permute(np.ones((1, 12)), 4), r"zigzag_permute: x has length 12 .* 2 · 4 devices"),
        (lambda: zigzag_unpermute(np.ones(6), 2, 0), "zigzag_unpermute: x has length 6 along axis 0"),
        (lambda: zigzag_positions(6, 2), "zigzag_positions: length is 6, not a multiple of 2 · 2 devices"),
        (lambda: zigzag_permute(np.ones(4), 2), r"axis is 1, which an array of shape \(4,\) does not have"),
        (lambda: zigzag_permute(np.ones((1, 4)), 0), "devices must be at least 1, got 0"),
    ],
)
def test_lengths_that_cannot_be_cut_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
