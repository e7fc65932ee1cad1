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

from jax_flash import append_kv, masks, paged_attention

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
HEADS_OF_POOLS = P(None, None, "model")
HEADS = P(None, None, "pipe")
OFFSETS = np.array([0, 9, 14], np.int32)
BY_SEQUENCE = {  # what a row reads by its sequence: an array of two, its spec, and the argument that it makes
    "draft_mask": (np.tri(9) > 0, P("data"), lambda x: {"draft_mask": x}),
    "alibi_slopes": (
        np.array([1, 0.5, 0.25, 0.5], np.float32),
        P("data", "pipe"),
        lambda x: {"alibi_slopes": x},
    ),
    "window": (np.int32(3), P("data"), lambda x: {"mask": masks.window(x, None)}),
    "prefix_lm": (np.int32(3), P("data"), lambda x: {"mask": masks.prefix_lm(x)}),
    "dense": (np.tri(9, 16, 3)[None] > 0, P("data"), lambda x: {"mask": masks.dense(x)}),
    "blocks": (np.zeros((1, 1, 1), np.int32), P("data"), lambda x: {"mask": masks.blocks(x, (16, 16))}),
}


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


each_layout = pytest.mark.parametrize("packed", [False, True], ids=["equal", "packed"])


def two_sequences(axis_type, packed):
    """A mesh, and arrays of two sequences and their specs: heads split over "pipe", sequences or tokens over "data"."""
    require_devices(8)
    mesh = jax.make_mesh((2, 2, 2), ("pipe", "data", "model"), axis_types=(axis_type,) * 3)
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 8, 4, 8), "k_pages": (4, 8, 2, 8), "v_pages": (4, 8, 2, 8), "new": (2, 4, 2, 8)}
    tokens = P("data", None, "pipe")
    if packed:
        shapes |= {"query": (16, 4, 8), "new": (8, 2, 8)}
        tokens = P("data", "pipe")
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    arrays |= {"tables": np.array([[0, 1], [2, 3]], np.int32), "lengths": np.array([9, 5], np.int32)}
    specs = dict.fromkeys(("query", "new"), tokens) | dict.fromkeys(("k_pages", "v_pages"), HEADS)
    specs |= dict.fromkeys(("tables", "lengths"), P("data"))
    return mesh, arrays, specs


def whole_but_for_heads(spec):
    return P(*(axis if axis == "pipe" else None for axis in spec))


@each_layout
def test_sequences_of_pages_split_over_one_of_two_free_axes(implementation, axis_type, packed):
    """XLA's partitioner aborts where tables and lengths that are split like this are read by indices."""
    mesh, arrays, specs = two_sequences(axis_type, packed)
    offsets = (OFFSETS, np.array([0, 3, 7], np.int32)) if packed else (None, None)

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

    results = whole_but_for_heads(specs["query"]), HEADS, HEADS, P()
    mapped = manual_over({"pipe"}, call, specs, results, mesh=mesh)

    def run(call):
        def gradient(moving, x):
            return jnp.sin(call({**x, **moving})[0]).sum()

        names = "query", "k_pages", "v_pages"
        return lambda x: (call(x), jax.grad(gradient)({name: x[name] for name in names}, x))

    with jax.set_mesh(mesh) if axis_type is EXPLICIT else nullcontext():
        got = jax.jit(run(mapped))(place(mesh, arrays, specs))
    assert_same(got, run(call)(arrays))


@each_layout
@pytest.mark.parametrize("name", BY_SEQUENCE)
def test_options_of_sequences_split_over_one_of_two_free_axes(implementation, name, packed):
    """As above, without an append: XLA's partitioner aborts on reads by indices of any of these."""
    mesh, arrays, specs = two_sequences(AUTO, packed)
    one, spec, made = BY_SEQUENCE[name]
    if name in ("draft_mask", "dense") and not packed:  # sequences of 8 tokens instead of 9
        one = one[..., :8, : 8 if name == "draft_mask" else None]
    arrays, specs = arrays | {"option": np.stack([one, one])}, specs | {"option": spec}

    def call(x):
        out = paged_attention(
            x["query"], x["k_pages"], x["v_pages"], x["tables"], x["lengths"], implementation=implementation,
            cu_seqlens_q=OFFSETS if packed else None, **made(x["option"]),
        )  # fmt: skip
        return (out,)

    mapped = manual_over({"pipe"}, call, specs, (whole_but_for_heads(specs["query"]),), mesh=mesh)

    def run(call):
        if packed and name == "draft_mask" and implementation != "xla":  # there is no gradient
            return call
        return lambda x: (call(x), jax.grad(lambda q: jnp.sin(call(x | {"query": q})[0]).sum())(x["query"]))

    assert_same(jax.jit(run(mapped))(place(mesh, arrays, specs)), run(call)(arrays))
