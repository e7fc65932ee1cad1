"""vmap on eight devices: a mapped axis is split like any other axis, and arrays without it are not gathered."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import GQA, MHA, PACKED, arrays_of, check, forward, make_mesh, qkv, stack
from programs import assert_same, attention, collectives, shard_shapes, with_gradients

VMAPPED = {
    "inner axes": (P(None, "data", None, "model"), (4, 2, 6, 2, 8)),
    "mapped axis": (P("data"), (2, 4, 6, 8, 8)),
    "mapped axis and heads": (P("data", None, None, "model"), (2, 4, 6, 2, 8)),
    "mapped axis and batch": (P("data", "model"), (2, 1, 6, 8, 8)),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_under_vmap(kernel, mesh, name):
    spec, shard = VMAPPED[name]
    text, _ = check(jax.vmap(attention(GQA, kernel)), mesh, stack(GQA, 4), qkv(spec))
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {shard}


def test_under_vmap_with_shared_keys(kernel, mesh):
    """The mapped axis is sharded. The keys are not mapped, so their gradient is summed over it."""
    arrays = arrays_of(GQA) | {"query": stack(GQA, 4)["query"]}
    call = jax.vmap(attention(GQA, kernel), in_axes=({"query": 0, "key": None, "value": None},))
    specs = qkv(P("data", None, None, "model"), P(None, None, "model"))
    assert not collectives(forward(call, mesh, arrays, specs))
    text, _ = check(call, mesh, arrays, specs)
    assert set(collectives(text)) == {"all-reduce"}


def test_a_query_that_is_not_mapped_stays_whole_beside_mapped_keys(kernel, mesh):
    """The keys' mapped axis is split. Nothing is gathered, and only the query's gradient is summed over it."""
    arrays = stack(GQA, 4) | {"query": arrays_of(GQA)["query"]}
    call = jax.vmap(attention(GQA, kernel), in_axes=({"query": None, "key": 0, "value": 0},))
    specs = qkv(P(None, None, "model"), P("data", None, None, "model"))
    text = forward(call, mesh, arrays, specs)
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(2, 4, 6, 2, 8)}
    text, _ = check(call, mesh, arrays, specs)
    assert set(collectives(text)) == {"all-reduce"}


def test_lengths_that_are_mapped_over_the_axis_of_heads_are_gathered_alone(kernel):
    """Their axis is already that of query's heads, which stay where they are. Explicit axes make JAX refuse this."""
    mesh = make_mesh(AxisType.Auto, AxisType.Auto)
    case = GQA.replace(kv_lengths=(6, 2, 5, 0))
    specs = qkv(P(None, None, None, "model")) | {"kv_lengths": P("model")}
    text = forward(jax.vmap(attention(case, kernel)), mesh, stack(case, 4), specs)
    assert collectives(text) == {"all-gather": 1}
    assert shard_shapes(text, "forward") == {(4, 4, 6, 2, 8)}


@pytest.mark.parametrize("spec", [P(None, "data", None, "model"), P("data", None, None, "model")], ids=str)
def test_dropout_keys_that_are_mapped(kernel, mesh, spec):
    """With each key, a shard drops the weights that one device would drop for the shard's batch entries and heads."""
    case = MHA.replace(dropout_rate=0.5)
    arrays = stack(case, 2)
    arrays["dropout_key"] = jax.random.split(jax.random.key(3), 2)
    call = attention(case, kernel)
    text, _ = check(jax.vmap(call), mesh, arrays, qkv(spec))
    assert not collectives(text)


def test_the_gradient_of_keys_shared_by_two_nested_vmaps_is_their_sum(kernel, mesh):
    queries = jnp.stack([stack(GQA, 2)["query"], 1 - stack(GQA, 2)["query"]])
    arrays = arrays_of(GQA) | {"query": queries}
    axes = ({"query": 0, "key": None, "value": None},)
    call = attention(GQA, kernel)
    specs = qkv(P("data", None, None, None, "model"), P(None, None, "model"))
    _, got = check(jax.vmap(jax.vmap(call, axes), axes), mesh, arrays, specs)

    def loop(arrays):
        each = [[call(arrays | {"query": query}) for query in row] for row in arrays["query"]]
        return jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 2, *x[0].shape), *each[0], *each[1])

    assert_same(jax.device_get(got), jax.device_get(jax.jit(with_gradients(loop))(arrays)))


def test_vmapped_rows_of_packed_documents_are_split_over_rows_and_heads(kernel, mesh):
    arrays = stack(PACKED, 4)
    arrays["cu_seqlens_q"] = arrays["cu_seqlens_k"] = jnp.array(
        [[0, 3, 9], [0, 0, 14], [0, 16, 16], [0, 5, 12]], jnp.int32
    )
    specs = qkv(P("data", None, "model")) | {"cu_seqlens_q": P("data"), "cu_seqlens_k": P("data")}
    text, _ = check(jax.vmap(attention(PACKED, kernel)), mesh, arrays, specs)
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(2, 16, 2, 8)}
