"""Masks of a call whose arrays lie on explicit mesh axes, under jit and outside it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import collectives, require_devices
from test_mask_calls import S, X, loss

from jax_flash import flash_attention, flops, masks


@pytest.fixture
def mesh():
    require_devices(4)
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)


def test_explicit_axes_take_masks(implementation, mesh):
    mask = masks.prefix_lm(jnp.array([30, 7], jnp.int32)) & masks.chunked(20)
    wanted = jax.grad(loss)(*X, mask, implementation)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y"))) for x in X]
        got = jax.jit(partial(jax.grad(loss), implementation=implementation))(*arrays, mask)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "other", [masks.chunked(8), masks.first_and_window(2, 4), masks.prefix_lm(3)], ids=str
)
def test_calls_outside_jit_take_masks_of_which_a_part_lies_on_no_mesh(other, implementation, mesh):
    ids = jnp.arange(2 * S, dtype=jnp.int32).reshape(2, S) // 20
    arrays = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y"))) for x in X]
    split = masks.segments(jax.device_put(ids, NamedSharding(mesh, P("x")))) & other
    wanted = flash_attention(*X, mask=masks.segments(ids) & other, implementation=implementation)
    got = flash_attention(*arrays, mask=split, implementation=implementation)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert flops(flash_attention, *arrays, mask=split) == flops(
        flash_attention, *X, mask=masks.segments(ids) & other
    )


def test_a_second_call_outside_jit_compiles_nothing(caplog, mesh):
    arrays = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y"))) for x in X]
    ids = jax.device_put(jnp.zeros((2, S), jnp.int32), NamedSharding(mesh, P("x")))

    def compiles(call):
        call()
        caplog.clear()
        with jax.log_compiles():
            call()
        return any("Compiling" in x.getMessage() for x in caplog.records)

    mask = masks.segments(ids) & masks.chunked(8)
    assert not compiles(lambda: flash_attention(*arrays, mask=mask, implementation="xla"))
    positions = masks.by_position(np.arange(S)[None], np.arange(S)[None], window=(3, 0))
    assert not compiles(lambda: flash_attention(*X, mask=positions, implementation="xla"))
    assert compiles(lambda: jax.jit(lambda x: x + 1)(1.0))  # a new function each time


def test_masks_with_explicit_sharding(implementation, mesh):
    """JAX refuses their gathers and scatters under explicit axes; the results stay split like rows and keys."""
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 5, (2, S)).cumsum(1) // 9, jnp.int32)
    chosen = jnp.asarray(np.random.default_rng(1).integers(-1, 3, (2, 2, 3, 2)), jnp.int32)
    spans, position = masks.bidirectional_spans(ids - 1), masks.by_position(ids, ids, window=(2, None))
    segments = masks.segments(ids // 2) & masks.segments(ids // 3)
    each = (
        (masks.blocks(chosen, (16, 16)), P("x", None, "y"), P("x")),
        (spans & position & segments, P("x", "y"), P("x", "y")),
        (spans & position & segments, P("x", None, "y"), P("x")),
    )
    for mask, of_tokens, of_mask in each:
        wanted = jax.grad(loss)(*X, mask, implementation)
        with jax.set_mesh(mesh):
            arrays = [jax.device_put(x, NamedSharding(mesh, of_tokens)) for x in X]
            split = jax.device_put(mask, NamedSharding(mesh, of_mask))
            got = jax.jit(partial(jax.grad(loss), implementation=implementation))(*arrays, split)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "of_mask", [P("x"), P("x", "y"), P(None, "y")], ids=["of entries", "of entries and heads", "of heads"]
)
def test_blocks_and_positions_are_made_where_their_arrays_lie(of_mask, kind, kernel):
    """Split with the batch entries and heads of the call, they need no collective, in either pass."""
    require_devices(4)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind,) * 2)
    rng = np.random.default_rng(3)
    shape = tuple(2 if axis else 1 for axis in (*of_mask, None)[:2])
    mask = masks.blocks(jnp.asarray(rng.integers(-1, 3, (*shape, 3, 2)), jnp.int32), (16, 16))
    if of_mask == P("x"):
        positions = jnp.asarray(rng.integers(0, 2, (2, S)).cumsum(1), jnp.int32)
        mask &= masks.by_position(positions, positions, window=(7, 2))
    wanted = jax.grad(loss)(*X, mask, kernel)
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y"))) for x in X]
        split = jax.device_put(mask, NamedSharding(mesh, of_mask))
        program = jax.jit(partial(jax.grad(loss), implementation=kernel)).lower(*arrays, split).compile()
    assert not collectives(program.as_text())
    np.testing.assert_allclose(program(*arrays, split), wanted, rtol=1e-4, atol=1e-4)
