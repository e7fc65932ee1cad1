"""shard_map with its varying-type checks, and explicit mesh axes: attention keeps and checks the types."""

import jax
import jax.numpy as jnp
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
    make_mesh,
    place,
    qkv,
    stack,
    within,
)
from programs import assert_same, attention, collectives, shard_shapes, with_gradients

OUT_LSE = (BATCH_HEADS, P("data", "model"))


@pytest.fixture
def explicit():
    mesh = make_mesh(AxisType.Explicit, AxisType.Explicit)
    with jax.set_mesh(mesh):
        yield mesh


# shard_map


@pytest.mark.parametrize("case", [MHA, GQA], ids=lambda case: case.name)
def test_in_shard_map_each_device_runs_its_shard(kernel, mesh, case):
    call = attention(case, kernel)
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(qkv(BATCH_HEADS),), out_specs=OUT_LSE, check_vma=True)
    text, _ = check_against(mapped, call, mesh, arrays_of(case), qkv(BATCH_HEADS))
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(2, 6, 2, 8)}


def check_against(mapped, call, mesh, arrays, specs):
    """The mapped function's results and gradients on sharded arrays are those of call on one device."""
    run = jax.jit(with_gradients(mapped))
    placed = place(mesh, arrays, specs)
    with within(mesh):
        compiled = run.lower(placed).compile()
        got = compiled(placed)
    assert_same(jax.device_get(got), jax.device_get(jax.jit(with_gradients(call))(arrays)))
    return compiled.as_text(), got


def test_gradients_taken_inside_shard_map(kernel, mesh):
    call = attention(GQA, kernel)

    def loss(arrays):
        out, lse = call(arrays)
        return (out**2).sum() + jnp.sin(lse).sum()

    specs = qkv(BATCH_HEADS)
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=True)
    arrays = arrays_of(GQA)
    with within(mesh):
        got = jax.jit(mapped)(place(mesh, arrays, specs))
    assert_same(jax.device_get(got), jax.device_get(jax.jit(jax.grad(loss))(arrays)))


def test_keys_that_do_not_vary_get_the_sum_of_their_gradients(kernel, mesh):
    """MQA in shard_map: key and value are the same over "model"; their cotangents are summed over it."""
    specs = qkv(BATCH_HEADS, P("data"))
    call = attention(MQA, kernel)
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=OUT_LSE, check_vma=True)
    with within(mesh):
        program = jax.jit(mapped).lower(place(mesh, arrays_of(MQA), specs)).compile().as_text()
    assert not collectives(program)
    text, _ = check_against(mapped, call, mesh, arrays_of(MQA), specs)
    assert set(collectives(text)) == {"all-reduce"}
    assert collectives(text)["all-reduce"] <= 2


def test_results_that_do_not_vary_are_typed_so(kernel, mesh):
    """Everything is the same over "model", and so are the results, without a cast."""
    specs, call = qkv(P("data")), attention(GQA, kernel)
    mapped = jax.shard_map(
        call, mesh=mesh, in_specs=(specs,), out_specs=(P("data"), P("data")), check_vma=True
    )
    text, _ = check_against(mapped, call, mesh, arrays_of(GQA), specs)
    assert not collectives(text)


def test_all_operands_in_shard_map(kernel, mesh):
    """Dropout is left out, because its bits depend on positions that only the caller of shard_map knows."""
    case = EVERYTHING.replace(dropout_rate=0.0)
    arrays, call = arrays_of(case), attention(case, kernel)
    specs = qkv(BATCH_HEADS) | OPTIONS
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=OUT_LSE, check_vma=True)
    text, _ = check_against(mapped, call, mesh, arrays, specs)
    assert set(collectives(text)) == {"all-reduce"}  # of sinks


def test_closed_over_operands_in_shard_map(kernel, mesh):
    """Lengths are made inside, so they are the same on every device, while other operands vary."""
    case = MHA.replace(kv_lengths=(6, 6, 6, 6))
    call = attention(case, kernel)

    def inside(arrays):
        return call(arrays | {"kv_lengths": jnp.full(arrays["query"].shape[0], 4, jnp.int32)})

    specs = qkv(BATCH_HEADS)
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=(specs,), out_specs=OUT_LSE, check_vma=True)
    check_against(mapped, inside, mesh, arrays_of(MHA), specs)


def test_vmap_and_scan_in_shard_map(kernel, mesh):
    def layers(arrays):
        def body(query, _):
            out, lse = jax.vmap(attention(GQA, kernel))(arrays | {"query": query})
            return query + out, lse

        return jax.lax.scan(body, arrays["query"], length=2)

    specs = qkv(P(None, "data", None, "model"))
    out_specs = (specs["query"], P(None, None, "data", "model"))
    mapped = jax.shard_map(layers, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=True)
    text, _ = check_against(mapped, layers, mesh, stack(GQA, 2), specs)
    assert not collectives(text)


def test_varlen_in_shard_map(kernel, mesh):
    specs = qkv(P(None, "model")) | {"cu_seqlens_q": P(), "cu_seqlens_k": P()}
    call = attention(PACKED, kernel)
    out_specs = (P(None, "model"), P("model"))
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=True)
    text, _ = check_against(mapped, call, mesh, arrays_of(PACKED), specs)
    assert not collectives(text)


# explicit axes


def typed(tree):
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def full(rank, *entries):
    return P(*entries, *[None] * (rank - len(entries)))


@pytest.mark.parametrize(
    ("case", "specs"),
    [(MHA, qkv(BATCH_HEADS)), (GQA, qkv(BATCH_HEADS)), (MQA, qkv(BATCH_HEADS, P("data")))],
    ids=lambda x: getattr(x, "name", ""),
)
def test_explicit_types_of_results_and_gradients(kernel, explicit, case, specs):
    """While tracing, results are typed like query, gradients like their arguments; the program has these shardings."""
    types = {}

    def run(arrays):
        results = with_gradients(attention(case, kernel))(arrays)
        types.update(typed(results))
        return results

    text, got = check_explicit(run, with_gradients(attention(case, kernel)), explicit, arrays_of(case), specs)
    assert types["results"] == (full(4, *BATCH_HEADS), full(3, "data", "model"))
    assert types["gradients"] == {name: full(4, *specs[name]) for name in specs}
    assert typed(got) == types
    assert collectives(text) == ({"all-reduce": 1} if case is MQA else {})
    assert shard_shapes(text, "forward") == {(2, 6, 2, 8)}


def check_explicit(run, one_device, mesh, arrays, specs):
    """run's compiled text and results on typed arrays, after comparing them with one device's."""
    placed = place(mesh, arrays, specs)
    compiled = jax.jit(run).lower(placed).compile()
    got = compiled(placed)
    one = jax.make_mesh((1,), ("one",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    with jax.set_mesh(one):
        assert_same(jax.device_get(got), jax.device_get(jax.jit(one_device)(jax.device_get(arrays))))
    return compiled.as_text(), got


def test_explicit_types_of_all_operands(kernel, explicit):
    arrays, specs = arrays_of(EVERYTHING), qkv(BATCH_HEADS) | OPTIONS
    run = with_gradients(attention(EVERYTHING, kernel))
    text, got = check_explicit(run, run, explicit, arrays, specs)
    assert collectives(text) == {"all-reduce": 1}  # of sinks
    for name, x in got["gradients"].items():
        assert jax.typeof(x).sharding.spec == full(x.ndim, *specs[name]), name


@pytest.mark.parametrize(
    "case", [EVERYTHING, EVERYTHING.replace(bias=(1, 1, 6, 10))], ids=["bias", "one bias"]
)
def test_explicit_types_of_gradients_are_those_of_operands_left_whole(kernel, explicit, case):
    """Query is split; bias and sinks are not, so their gradients are whole, as their types demand."""
    run = with_gradients(attention(case, kernel))
    _, got = check_explicit(run, run, explicit, arrays_of(case), qkv(BATCH_HEADS))
    assert typed(got["gradients"])["bias"] == P(None, None, None, None)
    assert typed(got["gradients"])["sinks"] == P(None)


CONFLICTS = {
    "keys alone": qkv(P(), BATCH_HEADS),
    "batch of query, heads of keys": qkv(P("data"), P(None, None, "model")),
    "one axis for both": qkv(P("data"), P(None, None, "data")),
    "another axis": qkv(P("data"), P("model")),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_explicit_types_that_differ_keep_each_its_own(kernel, explicit, name):
    """Query decides where the call runs; results are typed like it, gradients like their arguments."""
    specs = CONFLICTS[name]
    run = with_gradients(attention(GQA, kernel))
    _, got = check_explicit(run, run, explicit, arrays_of(GQA), specs)
    assert typed(got["results"])[0] == full(4, *specs["query"])
    assert typed(got["gradients"]) == {name: full(4, *spec) for name, spec in specs.items()}


def test_one_explicit_and_one_automatic_axis(kernel):
    mesh = make_mesh(AxisType.Explicit, AxisType.Auto)
    run = with_gradients(attention(GQA, kernel))
    with jax.set_mesh(mesh):
        text, _ = check_explicit(run, run, mesh, arrays_of(GQA), qkv(BATCH_HEADS))
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(2, 6, 2, 8)}


def test_shard_map_over_explicit_axes(kernel, explicit):
    call = attention(GQA, kernel)
    mapped = jax.shard_map(call, in_specs=(qkv(BATCH_HEADS),), out_specs=OUT_LSE)
    run = with_gradients(mapped)
    text, got = check_explicit(run, with_gradients(call), explicit, arrays_of(GQA), qkv(BATCH_HEADS))
    assert not collectives(text)
    assert typed(got["gradients"])["query"] == full(4, *BATCH_HEADS)


@pytest.mark.parametrize("spec", [P("data", None, None, "model"), P(None, "data", None, "model")], ids=str)
def test_explicit_types_under_vmap(kernel, explicit, spec):
    run = with_gradients(jax.vmap(attention(GQA, kernel)))
    text, got = check_explicit(run, run, explicit, stack(GQA, 4), qkv(spec))
    assert not collectives(text)
    assert typed(got["results"])[0] == full(5, *spec)
    assert set(typed(got["gradients"]).values()) == {full(5, *spec)}


def test_explicit_types_under_scan(kernel, explicit):
    def layers(arrays):
        def body(query, _):
            out, lse = attention(GQA, kernel)(arrays | {"query": query})
            return query + out, lse

        return jax.lax.scan(body, arrays["query"], length=3)

    run = with_gradients(layers)
    text, _ = check_explicit(run, run, explicit, arrays_of(GQA), qkv(BATCH_HEADS))
    assert not collectives(text)


def test_explicit_types_of_varlen(kernel, explicit):
    run = with_gradients(attention(PACKED, kernel))
    text, got = check_explicit(run, run, explicit, arrays_of(PACKED), qkv(P(None, "model")))
    assert not collectives(text)
    assert typed(got["results"]) == (full(3, None, "model"), full(2, "model"))


@pytest.mark.parametrize(
    "specs",
    [qkv(P("data"), P("data", "model")), qkv(P("data", None, None, "model"))],
    ids=["sequence of keys", "head dim"],
)
def test_explicit_sequences_of_keys_and_head_dims_are_gathered_and_right(kernel, explicit, specs):
    case = MHA.replace(sq=8, sk=8)
    run = with_gradients(attention(case, kernel))
    text, got = check_explicit(run, run, explicit, arrays_of(case), specs)
    assert typed(got["gradients"]) == {name: full(4, *specs[name]) for name in specs}
    assert {shape[1:] for shape in shard_shapes(text, "forward")} == {(8, 8, 8)}


# the equations in plain JAX


@pytest.mark.parametrize(
    ("case", "specs"),
    [
        (EVERYTHING, qkv(BATCH_HEADS) | OPTIONS),
        (MHA.replace(sq=8, sk=8), qkv(P("data", "model"))),
        (FEW, qkv(BATCH_HEADS, P("data"))),
        (PACKED, qkv(P(None, "model"))),
        (PACKED, qkv(P("model"))),
    ],
    ids=["fixed", "sequence", "few KV heads", "varlen", "tokens"],
)
def test_plain_jax_takes_explicit_types_too(explicit, case, specs):
    run = with_gradients(attention(case, "xla"))
    _, got = check_explicit(run, run, explicit, arrays_of(case), specs)
    assert typed(got["results"])[0] == full(got["results"][0].ndim, *specs["query"])


def test_plain_jax_in_shard_map(mesh):
    case = EVERYTHING.replace(dropout_rate=0.0)
    call, specs = attention(case, "xla"), qkv(BATCH_HEADS) | OPTIONS
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=OUT_LSE, check_vma=True)
    check_against(mapped, call, mesh, arrays_of(case), specs)
