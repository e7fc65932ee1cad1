"""append_kv and paged_attention in shard_map: over all axes of a mesh or some, beside automatic and explicit ones."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, place
from programs import assert_same, require_devices
from test_partly_manual import manual_over

from jax_flash import append_kv, paged_attention

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


@pytest.mark.parametrize("packed", [False, True], ids=["equal", "packed"])
def test_sequences_of_pages_split_over_one_of_two_free_axes(implementation, axis_type, packed):
    """XLA's partitioner aborts where tables and lengths that are split like this are read by indices."""
    if packed and implementation == "xla" and axis_type is not EXPLICIT and jax.__version_info__ < (0, 11):
        pytest.skip("XLA of JAX 0.10 aborts in packed plain JAX")
    require_devices(8)
    mesh = jax.make_mesh((2, 2, 2), ("pipe", "data", "model"), axis_types=(axis_type,) * 3)
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 8, 4, 8), "k_pages": (4, 8, 2, 8), "v_pages": (4, 8, 2, 8), "new": (2, 4, 2, 8)}
    heads, tokens = P(None, None, "pipe"), P("data", None, "pipe")
    if packed:
        shapes |= {"query": (16, 4, 8), "new": (8, 2, 8)}
        tokens = P("data", "pipe")
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays |= {"tables": np.array([[0, 1], [2, 3]], np.int32), "lengths": np.array([9, 5], np.int32)}
    offsets = (np.array([0, 9, 14], np.int32), np.array([0, 3, 7], np.int32)) if packed else (None, None)
    specs = dict.fromkeys(("query", "new"), tokens) | dict.fromkeys(("k_pages", "v_pages"), heads)
    specs |= dict.fromkeys(("tables", "lengths"), P("data"))

    def call(x):
        pools, where = (x["k_pages"], x["v_pages"]), (x["tables"], x["lengths"])
        *appended, after = append_kv(
            *jax.lax.stop_gradient((*pools, x["new"], x["new"])), *where, cu_seqlens=offsets[1],
            implementation=implementation,
        )  # fmt: skip
        out = paged_attention(
            x["query"], *pools, *where, cu_seqlens_q=offsets[0], implementation=implementation
        )
        return out, *appended, after

    whole = P(*(axis if axis == "pipe" else None for axis in tokens))
    mapped = manual_over({"pipe"}, call, specs, (whole, heads, heads, P()), mesh=mesh)

    def run(call):
        def gradient(moving, x):
            return jnp.sin(call({**x, **moving})[0]).sum()

        names = "query", "k_pages", "v_pages"
        return lambda x: (call(x), jax.grad(gradient)({name: x[name] for name in names}, x))

    with jax.set_mesh(mesh) if axis_type is EXPLICIT else nullcontext():
        got = jax.jit(run(mapped))(place(mesh, arrays, specs))
    assert_same(got, run(call)(arrays))
