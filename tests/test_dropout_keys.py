"""Dropout keys of every implementation of JAX: distinct keys drop distinct weights, however they were made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import define_prng_impl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import require_devices

from jax_flash import flash_attention, philox

B, S, H, D = 2, 16, 2, 8
QUERY, KEY, VALUE = np.random.default_rng(0).standard_normal((3, B, S, H, D)).astype(np.float32)
FULL = 0xFFFFFFFF
# Random123's kat_vectors for threefry2x32 of 20 rounds: key and counter, answer.
KNOWN = (
    ((0, 0, 0, 0), (0x6B200159, 0x99BA4EFE)),
    ((FULL,) * 4, (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)
MAKERS = {
    "seeded": lambda impl: [jax.random.key(n, impl=impl) for n in range(6)],
    "split": lambda impl: list(jax.random.split(jax.random.key(1, impl=impl), 6)),
    "folded": lambda impl: [jax.random.fold_in(jax.random.key(1, impl=impl), n) for n in range(6)],
}
each_key = pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
each_maker = pytest.mark.parametrize("made", MAKERS)


def dropped(key, implementation):
    """The weights that are dropped, `[b, hq, s, s]`."""
    value = jnp.broadcast_to(jnp.eye(S, dtype=jnp.float32)[:, None], (B, S, H, S))
    out = flash_attention(QUERY, KEY, value, dropout_rate=0.5, dropout_key=key, implementation=implementation)
    return np.swapaxes(np.asarray(out) == 0, 1, 2)


def assert_unlike(masks):
    """Any two masks agree in about half of their elements, as independent ones do."""
    flat = np.stack(masks).reshape(len(masks), -1)
    for n, one in enumerate(flat):
        agreement = (flat[n + 1 :] == one).mean(1)
        assert (abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(flat.shape[1])).all(), n


@each_key
@each_maker
def test_distinct_keys_drop_distinct_weights(implementation, impl, made):
    keys = MAKERS[made](impl)
    masks = [dropped(key, implementation) for key in keys]
    assert_unlike(masks)
    for key, mask in zip(keys, masks):
        np.testing.assert_array_equal(dropped(jax.random.key_data(key), implementation), mask)
        np.testing.assert_array_equal(dropped(key, "xla"), mask)


@each_key
@pytest.mark.parametrize("x64", [False, True])
def test_traced_and_mapped_keys_drop_what_known_ones_do(implementation, impl, x64):
    with jax.enable_x64(x64):
        keys = jax.random.split(jax.random.key(3, impl=impl), 3)
        wanted = [dropped(key, implementation) for key in keys]

        def attend(key):
            value = jnp.broadcast_to(jnp.eye(S, dtype=jnp.float32)[:, None], (B, S, H, S))
            return flash_attention(
                QUERY, KEY, value, dropout_rate=0.5, dropout_key=key, implementation=implementation
            )

        for run in (
            jax.jit(jax.vmap(attend)),
            jax.vmap(attend),
            lambda x: jnp.stack([*map(jax.jit(attend), x)]),
        ):
            for given in (keys, jax.random.key_data(keys)):
                got = np.swapaxes(np.asarray(run(given)) == 0, 2, 3)
                np.testing.assert_array_equal(got, wanted)


def test_keys_under_the_default_that_large_trainings_choose_drop_distinct_weights(implementation):
    with jax.default_prng_impl("rbg"):
        raw, typed = jax.random.PRNGKey(0), jax.random.key(0)
        assert_unlike([dropped(key, implementation) for key in jax.random.split(raw, 5)])
        assert_unlike([dropped(key, implementation) for key in jax.random.split(typed, 5)])


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2), (5,)], ids=str)
def test_keys_of_an_implementation_of_ones_own(implementation, shape):
    size = int(np.prod(shape))
    words = np.random.default_rng(2).integers(0, 2**32, (4, *shape), np.uint32)
    other = define_prng_impl(
        key_shape=shape, seed=lambda seed: None, split=lambda key, n: None, fold_in=lambda key, n: None,
        random_bits=lambda key, width, n: None, name=f"of {size} words", tag=f"own{size}",
    )  # fmt: skip
    assert_unlike([dropped(jax.random.wrap_key_data(w, impl=other), implementation) for w in words])


def test_a_key_of_two_words_is_taken_as_it_is():
    np.testing.assert_array_equal(philox.key_words(jnp.uint32([7, FULL])), [7, FULL])


@pytest.mark.parametrize(("words", "answer"), KNOWN)
def test_four_words_make_two_by_threefrys_published_answers(words, answer):
    np.testing.assert_array_equal(philox.key_words(jnp.array(words, jnp.uint32)), answer)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
def test_every_bit_of_every_word_counts(size):
    words = np.random.default_rng(size).integers(0, 2**32, size, np.uint32)
    flipped = [words] + [
        words ^ np.uint32(1 << bit) * (np.arange(size) == n) for n in range(size) for bit in range(32)
    ]
    made = jax.jit(jax.vmap(philox.key_words))(jnp.asarray(np.stack(flipped).astype(np.uint32)))
    assert len({tuple(pair) for pair in np.asarray(made).tolist()}) == len(flipped)


@pytest.mark.parametrize("wrong", [(3,), (1,), (2, 2), (5,)], ids=str)
def test_raw_words_that_are_no_key_of_jax_are_refused(wrong):
    with pytest.raises(TypeError, match=r"dropout_key must be one jax.random.key, got dtype uint32"):
        dropped(jnp.zeros(wrong, jnp.uint32), "xla")


@each_key
def test_several_keys_are_refused(impl):
    with pytest.raises(
        TypeError, match=r"dropout_key must be one jax.random.key, got dtype key<.*> and shape \(2,\)"
    ):
        dropped(jax.random.split(jax.random.key(0, impl=impl)), "xla")


@pytest.mark.parametrize("words", [2, 4])
def test_raw_words_that_explicit_axes_split_are_gathered(implementation, words):
    require_devices(2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    key = np.random.default_rng(3).integers(0, 2**32, words, np.uint32)

    def attend(key):
        options = dict(dropout_rate=0.5, dropout_key=key, implementation=implementation)
        return flash_attention(QUERY, KEY, VALUE, **options)

    wanted = attend(key)
    with jax.set_mesh(mesh):
        split = jax.device_put(key, NamedSharding(mesh, P("data")))
        for call in (attend, jax.jit(attend)):
            np.testing.assert_allclose(call(split), wanted, atol=1e-6)


@each_key
def test_the_reuse_of_a_key_is_seen_where_jax_looks_for_it(implementation, impl):
    def attend(key, query=QUERY):
        options = dict(dropout_rate=0.5, dropout_key=key, implementation=implementation)
        return flash_attention(query, KEY, VALUE, **options)

    def gradient(key):
        return jax.grad(lambda query: attend(key, query).sum())(QUERY)

    once = [f(jax.random.key(0, impl=impl)) for f in (attend, gradient)]
    with jax.debug_key_reuse(True):
        for f, wanted in zip((attend, gradient), once):
            for call in (f, jax.jit(f)):
                np.testing.assert_allclose(call(jax.random.key(0, impl=impl)), wanted, atol=1e-6)
                with pytest.raises(jax.errors.KeyReuseError):
                    (lambda key: (call(key), call(key)))(jax.random.key(0, impl=impl))
