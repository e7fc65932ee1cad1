"""append_kv in shard_map: over all axes of a mesh or some, beside automatic and explicit ones."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from programs import assert_same, require_devices

from jax_flash import append_kv

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
HEADS_OF_POOLS = P(None, None, "model")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("types", [(AUTO, AUTO), (EXPLICIT, AUTO)], ids=["automatic", "explicit"])
@pytest.mark.parametrize("manual", [{"model"}, {"data", "model"}], ids=["model", "all"])
def test_lengths_after_append_vary_over_no_axis_of_heads(kernel, types, manual, packed):
    """So that a tensor-parallel step may return them whole."""
    pool, lengths = jnp.zeros((8, 4, 4, 8)), jnp.array([1, 2], jnp.int32)
    tables = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)
    new = jnp.arange(128.0).reshape((4, 4, 8) if packed else (2, 2, 4, 8))
    options = {"cu_seqlens": jnp.array([0, 3, 4], jnp.int32)} if packed else {}
    of_new = P(None, "model") if packed else HEADS_OF_POOLS

    def step(pool, new, tables, lengths):
        return append_kv(pool, pool, new, new, tables, lengths, implementation=kernel, **options)

    mesh = make_mesh(*types)
    specs = (HEADS_OF_POOLS, of_new, P(), P())
    arguments = [jax.device_put(x, NamedSharding(mesh, P())) for x in (pool, new, tables, lengths)]
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            step, in_specs=specs, out_specs=(HEADS_OF_POOLS, HEADS_OF_POOLS, P()), axis_names=manual
        )
        got = jax.device_get(jax.jit(mapped)(*arguments))
    assert_same(got, jax.device_get(step(pool, new, tables, lengths)))


def test_append_with_tables_split_over_an_automatic_axis(kernel):
    """XLA's partitioner aborted on a gather by two indices (jaxlib 0.12.0)."""
    require_devices(8)
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "model"), axis_types=(AUTO,) * 3)
    pool, new = jnp.zeros((16, 4, 4, 8)), jnp.ones((4, 1, 4, 8))
    lengths, tables = jnp.array([1, 2, 3, 5], jnp.int32), jnp.arange(8, dtype=jnp.int32).reshape(4, 2)

    def step(pool, new, tables, lengths):
        return append_kv(pool, pool, new, new, tables, lengths, implementation=kernel)

    specs = (HEADS_OF_POOLS, HEADS_OF_POOLS, P(), P())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(*specs[:2], P()), axis_names={"model"})
    by_sequence = NamedSharding(mesh, P("data"))
    split = [pool, *(jax.device_put(x, by_sequence) for x in (new, tables, lengths))]
    assert_same(jax.device_get(jax.jit(mapped)(*split)), jax.device_get(step(pool, new, tables, lengths)))
