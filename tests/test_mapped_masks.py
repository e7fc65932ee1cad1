"""Masks under vmap, scan and shard_map, which take the first dimension of their arrays away; masks that are equal."""

from functools import partial, reduce
from operator import and_

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import require_devices

from jax_flash import check_inputs, flash_attention, flash_attention_varlen, flops, masks

B, S, H, D = 4, 32, 2, 8
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((B, S, H, D)), jnp.float32)
ENDS = jnp.asarray(np.sort(RNG.integers(3, S, (2, B, H, S)), 0), jnp.int32)
POSITIONS = jnp.asarray(np.sort(RNG.integers(0, 20, (B, S))), jnp.int32)
EACH = jnp.asarray([2, 7, 11, 30], jnp.int32)

FORMS = {
    "causal": masks.causal(EACH),
    "window": masks.window(EACH, 0),
    "segments and causal": masks.segments(POSITIONS) & masks.causal(),
    "ranges and window": masks.ranges(ENDS[0] - 3, ENDS[1]) & masks.window(9, None),
    "ranges that end apart": masks.ranges(0, ENDS[1]) & masks.ranges(ENDS[0, 0, 0] - 3, ENDS[1, :, :1]),
    "ranges of numbers": masks.segments(POSITIONS) & (masks.chunked(8) | masks.ranges(0, 2)),
    "twice segments": masks.segments(POSITIONS // 2) & masks.segments(POSITIONS // 5),
    "positions": masks.by_position(POSITIONS, POSITIONS),
    "positions and window": masks.by_position(POSITIONS, POSITIONS, window=(4, 1), causal=False),
    "prefix": masks.prefix_lm(EACH),
    "spans": masks.bidirectional_spans(POSITIONS // 3),
    "first and window": masks.first_and_window(EACH, 3),
    "blocks": masks.blocks(jnp.asarray(RNG.integers(-1, 2, (B, H, 2, 1)), jnp.int32), (16, 16)),
    "blocks and causal": masks.blocks(jnp.ones((B, 1, 2, 1), jnp.int32), (16, 16)) & masks.causal(),
    "dense": masks.dense(jnp.asarray(RNG.random((B, H, S, S)) < 0.5)),
    "dense of keys": masks.dense(jnp.asarray(RNG.random((B, 1, 1, S)) < 0.5)) & masks.causal(),
}


def attend(x, mask, implementation):
    return flash_attention(x, x, x, mask=mask, implementation=implementation)


@pytest.mark.parametrize("name", FORMS)
def test_a_mapped_mask_is_the_mask_of_each_entry(name, implementation):
    def one(x, mask):
        return attend(x[None], mask, implementation)[0]

    got = jax.jit(jax.vmap(one))(X, FORMS[name])
    np.testing.assert_allclose(got, attend(X, FORMS[name], implementation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["window", "segments and causal", "positions", "blocks and causal", "dense"])
def test_a_scan_over_a_mask_has_one_entry_in_each_step(name, implementation):
    def layer(x, mask):
        return attend(x, mask, implementation), None

    @jax.jit
    def layers(x, mask):
        return jax.grad(lambda x: (jax.lax.scan(layer, x, mask)[0] ** 2).sum())(x)

    def one_by_one(x):
        for z in range(B):
            x, _ = layer(x, jax.tree.map(lambda array, z=z: array[z], FORMS[name]))
        return (x**2).sum()

    np.testing.assert_allclose(layers(X[:1], FORMS[name]), jax.grad(one_by_one)(X[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["segments and causal", "positions", "blocks", "dense of keys"])
def test_one_spec_splits_a_mask_of_arrays_and_numbers(name, kernel):
    require_devices(4)
    mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda x, m: attend(x, m, kernel), mesh=mesh, in_specs=P("b"), out_specs=P("b"))
    got = jax.jit(split)(X, FORMS[name])
    np.testing.assert_allclose(got, attend(X, FORMS[name], kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_known_of_an_entry(name):
    """The picture, check_inputs and flops of a mask's first entry, whose arrays have a dimension less."""
    entry = jax.tree.map(lambda array: array[0], FORMS[name])
    assert entry.picture(S, head=1) == FORMS[name].picture(S, head=1)
    first = jax.tree.map(lambda array: array[:1], FORMS[name])
    counts = set()
    for mask in (entry, first):
        check_inputs(query=X[:1], key=X[:1], mask=mask)
        counts.add(flops(flash_attention, *[X[:1]] * 3, mask=mask))
    assert len(counts) == 1


def test_masks_are_joined_where_they_are_mapped(kernel):
    joined = [FORMS[name] for name in ("dense", "dense of keys", "blocks", "blocks and causal")]
    joined += [masks.segments(POSITIONS // 3), masks.segments(POSITIONS // 4)]

    def one(x, each):
        return attend(x[None], reduce(and_, each), kernel)[0]

    wanted = attend(X, reduce(and_, joined), kernel)
    np.testing.assert_allclose(jax.vmap(one)(X, joined), wanted, rtol=1e-5, atol=1e-5)


def test_a_mapped_mask_of_packed_sequences(kernel):
    """Its ranges have dimensions for sequences and heads."""
    tokens, ends = X.reshape(B * S, H, D), jnp.array([0, 20, 70, B * S], jnp.int32)
    several = [
        masks.from_function(
            lambda b, h, i, j, n=n: (j <= i) & (j >= i // 4 - b - h - n), 60, 60, batch=3, heads=H
        )
        for n in range(2)
    ]

    def one(mask):
        return flash_attention_varlen(*[tokens] * 3, ends, ends, mask=mask, implementation=kernel)

    got = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *several))
    np.testing.assert_allclose(got, jnp.stack([one(x) for x in several]), rtol=1e-5, atol=1e-5)


def test_arrays_of_too_many_dimensions_are_refused():
    for name, message in (
        ("dense", "dense array must broadcast"),
        ("blocks", "chosen blocks must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(X, jax.tree.map(lambda x: x[None], FORMS[name]), "xla")


def test_masks_are_equal_if_their_numbers_and_array_objects_are():
    by_segment = masks.segments(jnp.zeros((1, 4), jnp.int32))
    assert masks.window(3, 0) == masks.window(3, 0) != masks.window(4, 0)
    assert by_segment & masks.causal() == by_segment & masks.causal() != by_segment
    assert by_segment != masks.segments(jnp.zeros((1, 4), jnp.int32))
    assert masks.causal() not in (masks.window(None, 0, jnp.int32(0)), "causal")
    assert len({masks.chunked(3), masks.chunked(3), masks.causal(), masks.causal(1)}) == 3


def test_numbers_of_masks_are_compiled_in(kernel):
    """As an argument of a program, and as a static one: a program for each number."""

    def record(traced, x, mask):
        traced.append(mask)
        return attend(x, mask, "xla")

    for how in ({}, {"static_argnames": "mask"}):
        traced = []
        program = jax.jit(partial(record, traced), **how)
        for left in (3, 3, 4, 3):
            program(X, mask=masks.window(left, 0))
        assert traced == [masks.window(3, 0), masks.window(4, 0)]
    numbers = masks.window(3, 0) & masks.prefix_lm(2) & masks.chunked(5) & masks.ranges(0, 9)
    assert jax.tree.leaves(numbers) == []
    assert masks.window(np.int64(3), 0, np.int32(1)) == masks.window(3, 0, 1)
    for left, as_array in ((3, False), (jnp.int32(3), True)):
        equations = jax.make_jaxpr(lambda m: attend(X, m, kernel))(masks.window(left, 0))
        assert ("window_left" in str(equations)) == as_array
