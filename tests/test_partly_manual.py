"""Partially manual shard_map, and meshes of manual, explicit and automatic axes: what is not manual stays split."""

from contextlib import nullcontext

import checks
import jax
import jax.numpy as jnp
import pytest
from cases import make_inputs
from jax.export import DisabledSafetyCheck, deserialize, export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    BATCH_HEADS,
    EVERYTHING,
    GQA,
    MHA,
    MQA,
    OPTIONS,
    PACKED,
    arrays_of,
    make_mesh,
    place,
    qkv,
    stack,
)
from programs import (
    assert_same,
    attention,
    collectives,
    custom_calls,
    require_devices,
    shard_shapes,
    with_gradients,
)

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
LSE = P("data", "model")


@pytest.fixture
def mesh():
    return make_mesh(AUTO, AUTO)


def only(spec, axes):
    """The part of a spec that names these axes, which shard_map takes if only they are manual."""
    entries = [e if isinstance(e, tuple) else (e,) for e in spec]
    return P(*(tuple(a for a in entry if a in axes) or None for entry in entries))


def manual_over(axes, call, specs, results=(BATCH_HEADS, LSE), mesh=None):
    """call in a shard_map that is manual over these axes only."""
    in_specs = ({name: only(spec, axes) for name, spec in specs.items()},)
    out_specs = tuple(only(spec, axes) for spec in results)
    return jax.shard_map(call, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes))


def check(mapped, call, mesh, arrays, specs):
    """Runs mapped and its gradients on sharded arrays and compares with one device; returns the program's text."""
    placed = place(mesh, arrays, specs)
    compiled = jax.jit(with_gradients(mapped)).lower(placed).compile()
    got = compiled(placed)
    one = jax.make_mesh((1,), ("one",), devices=jax.devices()[:1], axis_types=(AUTO,))
    with jax.set_mesh(one):
        assert_same(jax.device_get(got), jax.device_get(jax.jit(with_gradients(call))(arrays)))
    return compiled.as_text()


# the automatic axes of a region


@pytest.mark.parametrize("manual", ["data", "model"])
@pytest.mark.parametrize("case", [MHA, GQA, MQA], ids=lambda case: case.name)
def test_automatic_axes_keep_their_sharding(kernel, mesh, case, manual):
    """Batch manual and heads automatic, and the other way round."""
    specs = qkv(BATCH_HEADS, BATCH_HEADS if case.hk > 1 else P("data"))
    call = attention(case, kernel)
    mapped = manual_over({manual}, call, specs, mesh=mesh)
    text = check(mapped, call, mesh, arrays_of(case), specs)
    assert collectives(text) == ({} if case.hk > 1 else {"all-reduce": collectives(text)["all-reduce"]})
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 6, 2, 8)}


def test_axes_that_nothing_is_split_over(kernel, mesh):
    specs, call = qkv(P("data")), attention(GQA, kernel)
    mapped = manual_over({"data"}, call, specs, mesh=mesh)
    assert not collectives(check(mapped, call, mesh, arrays_of(GQA), specs))


def test_query_heads_that_are_no_whole_groups(kernel, mesh):
    case = MHA.replace(hq=12, hk=3)
    specs, call = qkv(BATCH_HEADS, P("data")), attention(case, kernel)
    text = check(manual_over({"data"}, call, specs, mesh=mesh), call, mesh, arrays_of(case), specs)
    assert collectives(text) == {"all-reduce": 1}  # of dk and dv
    assert shard_shapes(text, "forward") == {(2, 6, 3, 8)}


def test_all_operands(kernel, mesh):
    case = EVERYTHING.replace(dropout_rate=0.0)
    specs, call = qkv(BATCH_HEADS) | OPTIONS, attention(case, kernel)
    text = check(manual_over({"data"}, call, specs, mesh=mesh), call, mesh, arrays_of(case), specs)
    assert set(collectives(text)) == {"all-reduce"}  # of sinks
    assert shard_shapes(text, "bias_gradient") == {(2, 2, 6, 10)}


def test_dropout_counts_the_heads_of_automatic_axes(kernel, mesh):
    """Nothing is split over the manual axis, so that the dropped weights are those of one device."""
    case = MHA.replace(dropout_rate=0.5)
    specs, call = qkv(P(None, None, "model")) | {"dropout_key": P()}, attention(case, kernel)
    mapped = manual_over({"data"}, call, specs, (P(), P()), mesh=mesh)
    text = check(mapped, call, mesh, arrays_of(case), specs)
    assert shard_shapes(text, "forward") == {(4, 6, 2, 8)}


TWO_FREE = {
    "a ring": (MHA, qkv(P(None, "model"))),
    "batch": (MHA.replace(dropout_rate=0.5), qkv(P("model")) | {"dropout_key": P()}),
    "heads": (MHA.replace(dropout_rate=0.5), qkv(P(None, None, "model")) | {"dropout_key": P()}),
    "query heads": (MQA, qkv(P(None, None, "model"), P())),
    "heads before batch": (MQA, qkv(P("model", None, "data"), P("model"))),
    "everything": (EVERYTHING, qkv(BATCH_HEADS) | OPTIONS | {"dropout_key": P()}),
}


SHARDS = {"a ring": (4, 3, 8, 8), "batch": (2, 6, 8, 8), "heads": (4, 6, 4, 8), "query heads": (4, 6, 4, 8)}


@pytest.mark.parametrize("name", TWO_FREE)
def test_several_axes_are_free(kernel, name):
    """XLA may number the devices of a region in another order than the mesh does, here where the first free axis splits
    nothing or a later dimension."""
    require_devices(8)
    mesh = jax.make_mesh((2, 2, 2), ("pipe", "data", "model"), axis_types=(AUTO,) * 3)
    case, specs = TWO_FREE[name]
    call = attention(case, kernel)
    mapped = manual_over({"pipe"}, call, specs, (P(), P()), mesh=mesh)
    text = check(mapped, call, mesh, arrays_of(case), specs)
    assert shard_shapes(text, "forward") == {SHARDS.get(name, (2, 6, 4, 8))}


def test_varlen(kernel, mesh):
    specs = qkv(P(None, "model")) | {"cu_seqlens_q": P(), "cu_seqlens_k": P()}
    call = attention(PACKED, kernel)
    mapped = manual_over({"data"}, call, specs, (P(), P()), mesh=mesh)
    text = check(mapped, call, mesh, arrays_of(PACKED), specs)
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(16, 2, 8)}


@pytest.mark.parametrize(
    "spec", [P(None, "data", None, "model"), P("model", "data")], ids=["heads", "mapped axis"]
)
def test_vmap(kernel, mesh, spec):
    call, specs = jax.vmap(attention(GQA, kernel)), qkv(spec)
    mapped = manual_over({"data"}, call, specs, (P(None, "data"),) * 2, mesh=mesh)
    text = check(mapped, call, mesh, stack(GQA, 4), specs)
    assert not collectives(text)
    assert len(shard_shapes(text, "forward") | shard_shapes(text, "backward")) == 1


def test_rematerialised_layers_with_constraints_inside(kernel, mesh):
    """A constraint names the region's mesh, whose types differ from those outside."""

    def layers(arrays, mesh=None):
        @jax.checkpoint
        def body(query, _):
            out, lse = attention(GQA, kernel)(arrays | {"query": query})
            if mesh is not None:
                inside = NamedSharding(jax.sharding.get_abstract_mesh(), P(None, None, "model"))
                out = jax.lax.with_sharding_constraint(out, inside)
            return query + out, lse

        return jax.lax.scan(body, arrays["query"], length=3)

    specs, results = qkv(BATCH_HEADS), (BATCH_HEADS, P(None, "data", "model"))
    mapped = manual_over({"data"}, lambda arrays: layers(arrays, mesh), specs, results, mesh=mesh)
    text = check(mapped, layers, mesh, arrays_of(GQA), specs)
    assert not collectives(text)
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 6, 2, 8)}


def test_one_call_inside_and_one_outside(kernel, mesh):
    call, specs = attention(GQA, kernel), qkv(BATCH_HEADS)
    mapped = manual_over({"data"}, call, specs, mesh=mesh)

    def both(first):
        return lambda arrays: call(arrays | {"query": first(arrays)[0]})

    assert not collectives(check(both(mapped), both(call), mesh, arrays_of(GQA), specs))


@pytest.mark.parametrize("named", [True, False], ids=["set_mesh", "mesh of the outer one"])
def test_one_region_within_another(kernel, named):
    require_devices(8)
    mesh = jax.make_mesh((2, 2, 2), ("pod", "data", "model"), axis_types=(AUTO,) * 3)
    call, specs = attention(GQA, kernel), qkv(P("pod", None, "model"))

    def inner(arrays):
        return jax.shard_map(
            call, in_specs=(qkv(P("data")),), out_specs=(P("data"), P("data")), axis_names={"data"}
        )(arrays)

    def outer(arrays):
        return manual_over({"pod"}, inner, specs, (P("pod"), P("pod")), mesh=None if named else mesh)(arrays)

    with jax.set_mesh(mesh) if named else nullcontext():
        text = check(outer, call, mesh, arrays_of(GQA), specs)
    assert not collectives(text)
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(1, 6, 4, 8)}


def test_a_split_head_dim_is_gathered(kernel, mesh):
    case = MHA.replace(sq=8, sk=8)
    call, specs = attention(case, kernel), qkv(P("data", None, None, "model"))
    mapped = manual_over({"data"}, call, specs, (P("data"), P("data")), mesh=mesh)
    text = check(mapped, call, mesh, arrays_of(case), specs)
    assert "all-gather" in collectives(text)
    assert {(shape[1], shape[3]) for shape in shard_shapes(text, "forward")} == {(8, 8)}


@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (12, 6), (8, 2)], ids=str)
def test_heads_that_do_not_divide_are_right(kernel, mesh, heads):
    """6 and 3 heads over 4 devices, through a sharding constraint."""
    case = MHA.replace(hq=heads[0], hk=heads[1])
    call, specs = attention(case, kernel), qkv(P("data"))

    def constrained(arrays):
        wanted = NamedSharding(jax.sharding.get_abstract_mesh(), P(None, None, "model"))
        return call({name: jax.lax.with_sharding_constraint(x, wanted) for name, x in arrays.items()})

    mapped = manual_over({"data"}, constrained, specs, (P("data"), P("data")), mesh=mesh)
    check(mapped, call, mesh, arrays_of(case), specs)


@pytest.mark.parametrize("manual", ["data", "model"])
def test_sums_in_bfloat16(kernel, mesh, manual):
    """dk and dv of MQA are summed over "model", automatic beside a manual axis or manual beside an automatic one, where
    XLA's CPU backend aborts on sums in bfloat16."""
    case = MQA.replace(dtype="bfloat16")
    specs, call = qkv(BATCH_HEADS, P("data")), attention(case, kernel)
    run = jax.jit(with_gradients(manual_over({manual}, call, specs, mesh=mesh)))
    got = run(place(mesh, arrays_of(case), specs))
    checks.assert_right(got, case, make_inputs(case))


def test_outside_jit_too(kernel, mesh):
    call, specs = attention(GQA, kernel), qkv(BATCH_HEADS)
    out, _ = manual_over({"data"}, call, specs, mesh=mesh)(place(mesh, arrays_of(GQA), specs))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, BATCH_HEADS), 4)
    assert_same(out, call(arrays_of(GQA))[0])


def test_gradients_taken_inside(kernel, mesh):
    call, specs = attention(GQA, kernel), qkv(BATCH_HEADS)

    def gradients(arrays):
        def loss(arrays):
            out, lse = call(arrays)
            return (out**2).sum() + jnp.sin(lse).sum()

        return tuple(jax.grad(loss)(arrays).values())

    mapped = jax.jit(manual_over({"data"}, gradients, specs, specs.values(), mesh))
    got = mapped(place(mesh, arrays_of(GQA), specs))
    assert_same(got, jax.jit(gradients)(arrays_of(GQA)))


@pytest.mark.parametrize(
    ("case", "reductions"),
    [(GQA, {}), (MHA.replace(hq=12, hk=3), {"all-reduce": 1})],
    ids=["gqa", "12 query heads, 3 KV heads"],
)
def test_both_modes_at_once(kernel, mesh, case, reductions):
    """The gradient of a loss that contains a tangent runs each pass once, and only dk and dv are reduced."""
    specs, call = qkv(BATCH_HEADS, BATCH_HEADS if case is GQA else P("data")), attention(case, kernel)
    arrays = arrays_of(case)
    tangents = {name: jnp.cos(3 * x) for name, x in arrays.items()}

    def gradient_of(call):
        def loss(arrays, tangents):
            (out, lse), (tout, _) = jax.jvp(call, (arrays,), (tangents,))
            return ((out + jax.lax.stop_gradient(tout)) ** 2).sum() + lse.sum()

        return jax.jit(jax.grad(loss))

    placed = place(mesh, arrays, specs), place(mesh, tangents, specs)
    compiled = gradient_of(manual_over({"data"}, call, specs, mesh=mesh)).lower(*placed).compile()
    assert_same(compiled(*placed), gradient_of(call)(arrays, tangents))
    text = compiled.as_text()
    assert custom_calls(text) == {"forward": 1, "tangent": 1, "backward": 1}
    assert collectives(text) == reductions
    assert shard_shapes(text, "tangent") == {(2, 6, case.hq // 4, 8)}


# Exported programs contain the custom call itself, because the partitioning exists only in this process.


def exported(mapped, kernel, arguments):
    check = DisabledSafetyCheck.custom_call("jax_flash_forward")
    made = export(jax.jit(mapped), platforms=[kernel], disabled_checks=[check])(arguments)
    return deserialize(made.serialize())


def test_export_of_a_region(kernel, mesh):
    call, specs = attention(GQA, kernel), qkv(BATCH_HEADS)
    placed = place(mesh, arrays_of(GQA), specs)
    program = exported(manual_over({"data"}, call, specs, mesh=mesh), kernel, placed)
    assert program.nr_devices == 8
    assert_same(jax.jit(program.call)(placed), call(arrays_of(GQA)))


def test_export_of_a_region_for_devices_that_are_not_here(lowers_for_cuda):
    mesh = AbstractMesh((64, 4), ("data", "model"))
    specs, case = qkv(BATCH_HEADS), GQA.replace(b=64)
    placed = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, BATCH_HEADS))
        for name, x in arrays_of(case).items()
    }
    program = exported(manual_over({"data"}, attention(case), specs, mesh=mesh), "cuda", placed)
    assert program.mlir_module().count("@jax_flash_forward(") == 1


# 3-D meshes: the mapped axis over "pod", the batch over "data", heads over "model"

FULL = P("pod", "data", None, "model")
MIXES = [
    ((AUTO, AUTO, AUTO), {"pod"}),
    ((AUTO, AUTO, AUTO), {"data"}),
    ((AUTO, AUTO, AUTO), {"pod", "model"}),
    ((EXPLICIT, AUTO, AUTO), set()),
    ((EXPLICIT, AUTO, AUTO), {"pod"}),
    ((AUTO, EXPLICIT, AUTO), {"data"}),
    ((EXPLICIT, AUTO, EXPLICIT), {"pod", "model"}),
    ((EXPLICIT, EXPLICIT, AUTO), set()),
    ((EXPLICIT, EXPLICIT, EXPLICIT), set()),
    # An axis that stays explicit inside
    ((EXPLICIT, AUTO, AUTO), {"data"}),
    ((EXPLICIT, EXPLICIT, EXPLICIT), {"pod"}),
    ((EXPLICIT, EXPLICIT, EXPLICIT), {"data", "model"}),
]


def name_of(axes):
    return " ".join(t.name for t in axes) if isinstance(axes, tuple) else f"manual {sorted(axes)}"


@pytest.mark.parametrize(("types", "manual"), MIXES, ids=name_of)
def test_explicit_automatic_and_manual_axes(kernel, types, manual):
    """Every device computes its part of all three axes. Nothing is gathered, except by JAX at the region's edge.

    JAX gathers there if an axis stays explicit inside, because it drops that axis from the region's shardings (JAX 0.12
    only if other axes are automatic). Then plain JAX gathers at least as much, except for out and lse, which its
    gradient computes again.
    """
    require_devices(8)
    mesh = jax.make_mesh((2, 2, 2), ("pod", "data", "model"), axis_types=types)
    arrays, specs, results = stack(GQA, 4), qkv(FULL), (FULL, P("pod", "data", "model"))
    stays_explicit = any(
        t == EXPLICIT and manual and name not in manual for name, t in zip(mesh.axis_names, types)
    )

    def text_of(implementation):
        call = jax.vmap(attention(GQA, implementation))
        mapped = manual_over(manual, call, specs, results) if manual else call
        return check(mapped, call, mesh, arrays, specs)

    with jax.set_mesh(mesh):
        text = text_of(kernel)
        plain = collectives(text_of("xla")) if stays_explicit else {}
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 2, 6, 4, 8)}
    assert set(collectives(text)) <= {"all-gather"}
    again = 2 if plain else 0
    assert collectives(text)["all-gather"] <= plain.get("all-gather", 0) + again
