"""Eight devices: forward mode is split as the forward is, and cotangents may be sharded as they like."""

import checks
import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import (
    BATCH_HEADS,
    EVERYTHING,
    FEW,
    GQA,
    MHA,
    MQA,
    OPTIONS,
    PACKED,
    arrays_of,
    check_run,
    make_mesh,
    place,
    qkv,
)
from oracle import split
from programs import (
    assert_same,
    attention,
    collectives,
    custom_calls,
    shard_shapes,
    weights,
    with_gradients,
)
from test_manual_sharding import full, typed


@pytest.fixture
def explicit():
    return make_mesh(AxisType.Explicit, AxisType.Explicit)


@pytest.fixture(autouse=True)
def built(kernel):
    checks.require(kernel, "forward", "tangent")


def jvp_of(call):
    """Results and tangents, for fixed weights as the tangents of all operands that move."""

    def run(arrays):
        moving, fixed = split(arrays)
        tangents = jax.tree.map(weights, moving)
        return jax.jvp(lambda moving: call(moving | fixed), (moving,), (tangents,))

    return run


def check(call, mesh, arrays, specs):
    """Compares with one device the results on sharded arrays; returns the program's text."""
    return check_run(jvp_of(call), mesh, arrays, specs, tolerance=1e-4)[0]


@pytest.mark.parametrize("case", [MHA, GQA], ids=lambda case: case.name)
@pytest.mark.parametrize("spec", [P("data"), BATCH_HEADS], ids=["batch", "batch × heads"])
def test_batch_and_heads_need_no_collective(kernel, mesh, case, spec):
    text = check(attention(case, kernel), mesh, arrays_of(case), qkv(spec))
    assert not collectives(text)
    assert custom_calls(text) == {"forward": 1, "tangent": 1}
    assert shard_shapes(text, "tangent") == shard_shapes(text, "forward")


@pytest.mark.parametrize("case", [MQA, FEW], ids=lambda case: case.name)
def test_fewer_kv_heads_than_devices_need_none_either(kernel, mesh, case):
    specs = qkv(BATCH_HEADS, P("data"))
    text = check(attention(case, kernel), mesh, arrays_of(case), specs)
    assert not collectives(text)
    assert shard_shapes(text, "tangent") == {(2, 6, 2, 8)}


def test_packed_heads_and_every_option(kernel, mesh):
    heads = qkv(P(None, "model"))
    assert not collectives(check(attention(PACKED, kernel), mesh, arrays_of(PACKED), heads))
    text = check(attention(EVERYTHING, kernel), mesh, arrays_of(EVERYTHING), qkv(BATCH_HEADS) | OPTIONS)
    assert not collectives(text)


def test_shard_map_checks_varying_types(kernel, automatic):
    """jvp outside and inside shard_map; over one axis neither keys nor their tangents vary."""
    specs = qkv(BATCH_HEADS, P("data"))
    call, arrays = attention(MQA, kernel), arrays_of(MQA)
    out_specs = (BATCH_HEADS, P("data", "model"))
    mapped = jax.shard_map(call, mesh=automatic, in_specs=(specs,), out_specs=out_specs, check_vma=True)
    assert not collectives(check(mapped, automatic, arrays, specs))

    def inside(arrays, tangents):
        return jax.jvp(call, (arrays,), (tangents,))

    inner = jax.shard_map(
        inside, mesh=automatic, in_specs=(specs, specs), out_specs=(out_specs,) * 2, check_vma=True
    )
    tangents = jax.tree.map(weights, arrays)
    got = jax.jit(inner)(place(automatic, arrays, specs), place(automatic, tangents, specs))
    assert_same(got, jax.jit(inside)(arrays, tangents), tolerance=1e-4)


@pytest.mark.parametrize("case", [GQA, EVERYTHING], ids=["gqa", "everything"])
def test_explicit_types_of_tangents(kernel, explicit, case):
    specs = qkv(BATCH_HEADS) | (OPTIONS if case is EVERYTHING else {})
    run = jvp_of(attention(case, kernel))
    placed = place(explicit, arrays_of(case), specs)
    with jax.set_mesh(explicit):
        compiled = jax.jit(run).lower(placed).compile()
        got = compiled(placed)
    assert typed(got) == ((full(4, *BATCH_HEADS), full(3, "data", "model")),) * 2
    assert not collectives(compiled.as_text())
    assert_same(jax.device_get(got), one_device(run, arrays_of(case)), tolerance=1e-4)


ACROSS = {
    "by token": (GQA.replace(sinks="token"), qkv(BATCH_HEADS) | {"sinks": P("model", None, "data")}),
    "by head, a bias of one column": (
        GQA.replace(sinks=True, bias=(4, 8, 6, 1)),
        qkv(BATCH_HEADS) | {"sinks": P("data"), "bias": P("model", "data")},
    ),
    "packed": (PACKED.replace(sinks="token"), qkv(P(None, "model")) | {"sinks": P("model", "data")}),
}


@pytest.mark.parametrize("name", ACROSS)
def test_explicit_sinks_and_biases_that_are_split_across_the_query_keep_their_types(kernel, explicit, name):
    case, specs = ACROSS[name]
    call = attention(case, kernel)

    def run(arrays):
        return with_gradients(call)(arrays), jvp_of(call)(arrays)

    placed = place(explicit, arrays_of(case), specs)
    with jax.set_mesh(explicit):
        got = jax.jit(run)(placed)
    gradients = got[0]["gradients"]
    assert typed(gradients) == {n: full(x.ndim, *specs[n]) for n, x in gradients.items()}
    assert_same(jax.device_get(got), one_device(run, arrays_of(case)), tolerance=1e-4)


def one_device(run, arrays):
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])):
        return jax.device_get(jax.jit(run)(jax.device_get(arrays)))


@pytest.mark.parametrize("mode", ["op by op", "jit"])
@pytest.mark.parametrize("spec", [BATCH_HEADS, P()], ids=["sharded operands", "replicated operands"])
def test_cotangents_and_tangents_without_the_operands_sharding(kernel, explicit, spec, mode):
    """Under explicit axes, the default of jax.make_mesh, they may be ordinary arrays that were made outside the mesh.

    JAX itself refuses those that are on the mesh and sharded otherwise.
    """
    case = GQA.replace(sinks=True, bias=(4, 8, 6, 1))
    call = attention(case, kernel)

    def run(arrays, cotangents, tangents):
        return jax.vjp(call, arrays)[1](cotangents)[0], jax.jvp(call, (arrays,), (tangents,))[1]

    arrays = arrays_of(case)
    tangents = jax.tree.map(weights, arrays)
    cotangents = jax.tree.map(weights, call(arrays))
    placed = place(explicit, arrays, qkv(spec))
    got = (jax.jit(run) if mode == "jit" else run)(placed, cotangents, tangents)
    assert typed(got[0]) == typed(placed)
    assert_same(
        jax.device_get(got), jax.device_get(jax.jit(run)(arrays, cotangents, tangents)), tolerance=1e-4
    )
