"""Dropout: Philox4x32-7's published answers, and which weights are dropped for which key, on every implementation."""

from functools import partial

import checks
import equations
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flash import flash_attention, flash_attention_varlen, philox

FULL = 0xFFFFFFFF
# Random123's kat_vectors: key, counter, answer.
KNOWN = (
    ((0, 0), (0, 0, 0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((FULL, FULL), (FULL,) * 4, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
)


def words(values):
    return tuple(jnp.uint32(value) for value in values)


def kept(dropout, rate, b, hq, sq, sk):
    """philox.keep over a whole `[b, hq, sq, sk]`."""
    z, h, i, j = (
        jnp.arange(n, dtype=jnp.int32).reshape([-1 if axis == n_axis else 1 for axis in range(4)])
        for n_axis, n in enumerate((b, hq, sq, sk))
    )
    return np.asarray(jax.jit(philox.keep, static_argnums=1)(jnp.uint32(dropout), rate, z, h, i, j))


def weights(implementation, key, rate, b=2, hq=2, sq=5, sk=21):
    """P after dropout, `[b, hq, sq, sk]`, from forward and backward; without dropout it is 1 / sk."""
    d, dv = 8, -(-sk // 8) * 8
    query, k = jnp.zeros((b, sq, hq, d), jnp.float32), jnp.zeros((b, sk, hq, d), jnp.float32)
    value = jnp.broadcast_to(jnp.eye(sk, dv)[:, None], (b, sk, hq, dv))
    dout = jnp.broadcast_to(jnp.eye(sq, dv)[:, None], (b, sq, hq, dv))

    @jax.jit
    def run(value):
        def attend(value):
            return flash_attention(
                query, k, value, dropout_rate=rate, dropout_key=key, implementation=implementation
            )

        out, pullback = jax.vjp(attend, value)
        return out, *pullback(dout)

    out, dvalue = run(value)
    forward = jnp.swapaxes(out, 1, 2)[..., :sk]
    backward = jnp.moveaxis(dvalue, 1, -1)[..., :sq, :]
    return np.asarray(forward), np.asarray(backward)


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN)
def test_philox_gives_the_published_answers(key, counter, answer):
    got = philox.philox4x32(words(key), words(counter))
    assert tuple(map(int, got)) == answer
    assert equations.philox(key, counter) == answer


def test_an_element_is_decided_by_its_half_word():
    dropout, rate = [3, 1 << 31, 5, 7, 11, 13], 0.4
    got = kept(dropout, rate, 2, 2, 3, 19)
    for z, h, i, j in np.ndindex(got.shape):
        assert got[z, h, i, j] == (equations.dropout_number(dropout, z, h, i, j) >= round(rate * 32768))


def test_offsets_name_the_place_of_a_shard_in_the_whole():
    whole = kept([1, 2, 0, 0, 0, 0], 0.5, 4, 4, 16, 32)
    shard = kept([1, 2, 1, 2, 3, 13], 0.5, 2, 2, 8, 16)
    np.testing.assert_array_equal(shard, whole[1:3, 2:4, 3:11, 13:29])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_kept(rate):
    n = 4 * 4 * 128 * 128
    dropped = n - kept([7, 9, 0, 0, 0, 0], rate, 4, 4, 128, 128).sum()
    expected = n * round(rate * 32768) / 32768
    assert abs(dropped - expected) < 5 * np.sqrt(n * rate * (1 - rate))


@pytest.mark.parametrize("axis", range(4))
def test_neighbours_are_independent(axis):
    dropped = ~kept([7, 9, 0, 0, 0, 0], 0.5, 8, 8, 64, 64)
    first, second = (np.take(dropped, range(start, dropped.shape[axis], 2), axis) for start in (0, 1))
    agreement = (first == second).mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(first.size)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.7])
def test_rows_that_share_a_block_are_hardly_correlated(rate):
    dropped = ~kept([7, 9, 0, 0, 0, 0], rate, 8, 8, 64, 128)
    rows = dropped.reshape(8, 8, 4, 2, 8, 128).astype(np.float64) - rate
    correlation = (rows[:, :, :, 0] * rows[:, :, :, 1]).mean() / (rate * (1 - rate))
    assert abs(correlation) < 1 / 256 + 5 / np.sqrt(rows.size / 2)


def test_the_same_bits_on_every_implementation(implementation):
    key, rate = jax.random.key(17), round(0.3 * 32768) / 32768
    dropout = [*np.asarray(jax.random.key_data(key)), 0, 0, 0, 0]
    expected = kept(dropout, rate, 2, 2, 5, 21) / (21 * (1 - rate))
    for got in weights(implementation, key, rate):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_same_bits_under_any_tile_shape(implementation):
    key, rate = jax.random.key(3), 0.25
    dropout = [*np.asarray(jax.random.key_data(key)), 0, 0, 0, 0]
    expected = kept(dropout, rate, 1, 1, 150, 201) / (201 * (1 - rate))
    for got in weights(implementation, key, rate, b=1, hq=1, sq=150, sk=201):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_rate_is_rounded_to_the_nearest_number(implementation):
    """0.1 is 3276.8 of the 32768 numbers: the number 3276 is dropped, which a rate rounded down would keep."""
    key, sizes = jax.random.key(0), (2, 2, 150, 201)
    dropout = [*np.asarray(jax.random.key_data(key)), 0, 0, 0, 0]
    expected = kept(dropout, 3277 / 32768, *sizes)
    at_the_edge = kept(dropout, 3276 / 32768, *sizes) & ~expected
    assert at_the_edge.any()
    assert np.array_equal(kept(dropout, 0.1, *sizes), expected)
    for got in weights(implementation, key, 0.1, *sizes):
        np.testing.assert_allclose(got, expected / (201 * (1 - 3277 / 32768)), atol=1e-6)


@pytest.mark.parametrize("rate", [0.999, 0.9999])
def test_large_rates_scale_by_what_they_keep(rate, implementation):
    """Rounded, .9999 is 32765/32768, so that weights are multiplied by 10,922.7 and not by 10,000."""
    forward, _ = weights(implementation, jax.random.key(0), rate, b=4, hq=8, sq=64, sk=64)
    kept_part = 1 - round(rate * 32768) / 32768
    np.testing.assert_allclose(forward[forward != 0] * 64 * kept_part, 1, rtol=1e-5)


def test_another_key_drops_others(implementation):
    first, _ = weights(implementation, jax.random.key(1), 0.5)
    second, _ = weights(implementation, jax.random.key(2), 0.5)
    assert not np.array_equal(first, second)


def test_a_packed_sequence_drops_what_the_same_batch_entry_drops(implementation):
    b, s, h, d = 3, 10, 2, 8
    key, rate = jax.random.key(5), 0.4
    q, k, v = jax.random.normal(jax.random.key(0), (3, b, s, h, d), jnp.float32)
    options = {"dropout_rate": rate, "dropout_key": key, "causal": True, "implementation": implementation}
    fixed = flash_attention(q, k, v, **options)
    packed = flash_attention_varlen(
        *(x.reshape(b * s, h, d) for x in (q, k, v)), jnp.arange(b + 1, dtype=jnp.int32) * s, **options
    )
    np.testing.assert_allclose(packed.reshape(fixed.shape), fixed, atol=1e-5, rtol=1e-5)


def test_a_rate_of_zero_drops_nothing_and_needs_no_key(implementation):
    x = jnp.ones((1, 4, 1, 8), jnp.float32)
    out = flash_attention(x, x, x, dropout_rate=0.0, implementation=implementation)
    np.testing.assert_allclose(out, 1, atol=1e-6)


def test_the_mean_is_kept(implementation):
    forward, _ = weights(implementation, jax.random.key(0), 0.2, b=4, hq=4, sq=64, sk=64)
    assert abs(forward.mean() * 64 - 1) < 5 * np.sqrt(0.25 / forward.size)


@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_a_weight_that_is_dropped_hides_an_infinite_derivative(d, implementation):
    """dP = dO Vᵀ exceeds float32 where a row with a large dO drops the key of a large V."""
    checks.require(implementation, "forward", "backward", dtype="bfloat16", d=d, dv=d)
    key, rate, s = jax.random.key(5), 0.5, 64
    keeps = kept([*np.asarray(jax.random.key_data(key)), 0, 0, 0, 0], rate, 1, 1, s, s)[0, 0]
    row, column = np.argwhere(~keeps)[7]
    draws = np.random.default_rng(0).standard_normal((4, 1, s, 1, d))
    draws[2, :, column] = draws[3, :, row] = 1e30
    query, k, value, dout = jnp.asarray(draws, jnp.bfloat16)

    @jax.jit
    def run(*qkv):
        attend = partial(flash_attention, dropout_rate=rate, dropout_key=key, implementation=implementation)
        out, pullback = jax.vjp(attend, *qkv)
        return out, *pullback(dout)

    for x in run(query, k, value):
        assert np.isfinite(np.asarray(x, np.float32)).all()
