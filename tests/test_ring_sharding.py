"""Under jit, if query, key and value have the same split of the sequence, it runs as a ring: permutes and no gather."""

from functools import partial

import jax
import pytest
from cases import varlen
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import EVERYTHING, GQA, arrays_of, check, check_run, forward, make_mesh, place, qkv, stack
from programs import (
    assert_same,
    attention,
    collectives,
    custom_calls,
    require_devices,
    shard_shapes,
    with_gradients,
)
from test_derivative_sharding import jvp_of
from test_manual_sharding import check_explicit, full, typed
from test_partly_manual import manual_over

from jax_flash import flash_attention, ring_attention

SEQUENCE = P("data", "model")
CAUSAL = GQA.replace(sq=16, sk=16)
FULL = CAUSAL.replace(causal=False)


def assert_ring(text, visits, backward=None):
    """Asserts the number of visits in forward and backward. All but the first permute K with V, and dK with dV."""
    permutes = visits - 1 + (0 if backward is None else 2 * (backward - 1))
    assert collectives(text) == {"collective-permute": permutes}
    assert custom_calls(text)["forward"] == visits
    assert backward is None or custom_calls(text)["backward"] == backward


# one axis for the sequence


@pytest.mark.parametrize(
    ("case", "visits"),
    [(CAUSAL, 4), (FULL, 4), (FULL.replace(window=(3, 2)), 3), (CAUSAL.replace(window=(4, None)), 2)],
    ids=["causal", "full", "window", "causal window"],
)
def test_a_sequence_split_alike_runs_in_a_ring(kernel, mesh, case, visits):
    """The program has no shards that lie beyond the window."""
    specs = qkv(SEQUENCE)
    text = forward(attention(case, kernel), mesh, arrays_of(case), specs)
    assert_ring(text, visits)
    assert "dynamic-slice(" not in text  # calls read shards, and parts of them, in place
    text, got = check(attention(case, kernel), mesh, arrays_of(case), specs)
    assert_ring(text, visits, visits)
    if not case.window:  # with a window, the neighbour's keys are multiplied by the rows that see them only
        assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 4, 8, 8)}
    for x in (got["results"][0], *got["gradients"].values()):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SEQUENCE), 4)


@pytest.mark.parametrize(("sq", "sk", "visits"), [(16, 32, 4), (32, 16, 4), (24, 16, 4), (4, 64, 4)], ids=str)
def test_queries_and_keys_of_different_lengths(kernel, mesh, sq, sk, visits):
    """Bottom right: the last query sees every key, so shards of keys that are longer lie further ahead."""
    case = FULL.replace(sq=sq, sk=sk)
    text, got = check(attention(case, kernel), mesh, arrays_of(case), qkv(SEQUENCE))
    assert_ring(text, visits, visits)
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, sq // 4, 8, 8)}
    for x in (got["results"][0], *got["gradients"].values()):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, SEQUENCE), 4)
    text, _ = check(attention(case.replace(causal=True), kernel), mesh, arrays_of(case), qkv(SEQUENCE))
    assert set(collectives(text)) == {"collective-permute"}


@pytest.mark.parametrize(
    ("spec", "shard"),
    [(P(None, ("data", "model")), (4, 2, 8, 8)), (P(None, "data", "model"), (4, 8, 2, 8))],
    ids=["two axes", "sequence and heads"],
)
def test_other_axes(kernel, mesh, spec, shard):
    text, _ = check(attention(CAUSAL, kernel), mesh, arrays_of(CAUSAL), qkv(spec))
    assert set(collectives(text)) == {"collective-permute"}
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {shard}


@pytest.mark.parametrize("case", [CAUSAL, CAUSAL.replace(hk=1)], ids=["GQA", "MQA"])
def test_batch_sequence_and_heads_on_three_axes(kernel, cube, case):
    specs = qkv(P("data", "ring", "model"), P("data", "ring", "model" if case.hk > 1 else None))
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs)
    reduced = {} if case.hk > 1 else {"all-reduce": collectives(text)["all-reduce"]}
    assert collectives(text) == {"collective-permute": 3} | reduced
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 8, 4, 8)}


ALL = EVERYTHING.replace(
    sq=16, sk=16, mask=(4, 8, 1, 16), bias=(4, 8, 16, 16), q_lengths=(16, 12, 5, 0), kv_lengths=(16, 9, 3, 8)
)
ALL_SPECS = {
    "q_lengths": P("data"),
    "kv_lengths": P("data"),
    "segment_ids": P("data", "ring"),
    "mask": P("data", "model"),
    "bias": P("data", "model", "ring"),
    "alibi_slopes": P("data", "model"),
    "sinks": P("model"),
}


@pytest.mark.parametrize("bias", [(4, 8, 16, 16), (1, 8, 1, 16), (4, 1, 16, 1)], ids=str)
def test_all_operands_on_three_axes(kernel, cube, bias):
    """Only gradients of operands that devices share are summed. Each batch entry has its own lengths, and so its own
    diagonal; it becomes one entry of a leading dimension."""
    case = ALL.replace(bias=bias)
    shared = P(*(axis if size > 1 else None for axis, size in zip(("data", "model", "ring"), bias)))
    specs = qkv(P("data", "ring", "model")) | ALL_SPECS | {"bias": shared}
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs)
    assert set(collectives(text)) == {"collective-permute", "all-reduce"}
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 1, 8, 4, 8)}


def test_dropout_drops_the_same_weights(kernel, cube):
    case = CAUSAL.replace(dropout_rate=0.5)
    check(attention(case, kernel), cube, arrays_of(case), qkv(P("data", "ring", "model")))


def test_forward_mode(kernel, mesh):
    case = ALL.replace(q_lengths=None, kv_lengths=None, alibi_slopes=None, dropout_rate=0.0)
    specs = qkv(SEQUENCE) | {"bias": P("data", None, "model"), "segment_ids": P("data", "model")}
    run = jvp_of(attention(case, kernel))
    text, _ = check_run(run, mesh, arrays_of(case), specs, tolerance=1e-4)
    assert set(collectives(text)) == {"collective-permute"}


def test_explicit_types(kernel):
    mesh = make_mesh(AxisType.Explicit, AxisType.Explicit)
    run = with_gradients(attention(CAUSAL, kernel))
    with jax.set_mesh(mesh):
        text, got = check_explicit(run, run, mesh, arrays_of(CAUSAL), qkv(SEQUENCE))
    assert_ring(text, 4, 4)
    assert typed(got["results"]) == (full(4, *SEQUENCE), full(3, "data", None, "model"))
    assert set(typed(got["gradients"]).values()) == {full(4, *SEQUENCE)}


@pytest.mark.parametrize("spec", [P(None, "data", "model"), P("data", None, "model")], ids=str)
def test_under_vmap(kernel, mesh, spec):
    text, _ = check(jax.vmap(attention(CAUSAL, kernel)), mesh, stack(CAUSAL, 2), qkv(spec))
    assert_ring(text, 4, 4)


def test_scan_over_layers_with_saved_residuals(kernel, mesh):
    """Keys are closed over. The policy keeps out and lse, so no forward runs twice."""
    call = attention(CAUSAL, kernel)
    policy = jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")

    def layers(arrays):
        @partial(jax.checkpoint, policy=policy)
        def body(query, _):
            out, lse = call(arrays | {"query": query})
            return query + out, lse

        return jax.lax.scan(body, arrays["query"], length=2)

    text, _ = check(layers, mesh, arrays_of(CAUSAL), qkv(SEQUENCE))
    assert_ring(text, 4, 4)


def test_an_automatic_axis_of_a_partly_manual_region(kernel, automatic):
    call, specs = attention(CAUSAL, kernel), qkv(SEQUENCE)
    results = (SEQUENCE, P("data", None, "model"))
    mapped = manual_over({"data"}, call, specs, results, mesh=automatic)
    placed = place(automatic, arrays_of(CAUSAL), specs)
    compiled = jax.jit(with_gradients(mapped)).lower(placed).compile()
    assert_same(compiled(placed), jax.jit(with_gradients(call))(arrays_of(CAUSAL)))
    assert_ring(compiled.as_text(), 4, 4)


# what is gathered


OTHERS = {
    "queries alone": (CAUSAL, qkv(SEQUENCE, P("data"))),
    "keys alone": (CAUSAL, qkv(P("data"), SEQUENCE)),
    "different axes": (CAUSAL, qkv(P(None, "model"), P(None, "data"))),
    "lengths without a common factor": (CAUSAL.replace(sq=16, sk=15), qkv(SEQUENCE, P("data"))),
    "head dim": (CAUSAL, qkv(P("data", None, None, "model"))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shardings_are_right(kernel, mesh, name):
    case, specs = OTHERS[name]
    check(attention(case, kernel), mesh, arrays_of(case), specs)


# The order in which axes are given is that of the shards, whatever the mesh's is.


@pytest.mark.parametrize("axes", [("model", "data"), ("model", "ring", "data")], ids=str)
def test_axes_in_another_order_than_the_meshs(kernel, cube, axes):
    check(attention(CAUSAL, kernel), cube, arrays_of(CAUSAL), qkv(P(None, axes)))
    case = varlen("packed", (10, 6, 16), hq=8, hk=4, d=8, dv=8, causal=True)
    check(attention(case, kernel), cube, arrays_of(case), qkv(P(axes)))


@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
@pytest.mark.parametrize("free", [False, True], ids=["manual", "partly manual"])
def test_a_ring_over_axes_in_another_order_than_the_meshs(kernel, mode, free):
    require_devices(8)
    axes, arrays = ("model", "data"), arrays_of(CAUSAL)
    mesh = jax.make_mesh((2, 2, 2), ("data", "ring", "model"), (AxisType.Auto,) * 3)
    q, k, v = (arrays[name] for name in ("query", "key", "value"))

    def loss(attend, *qkv):
        return (attend(*qkv) ** 2).sum()

    options = dict(causal=True, implementation=kernel)
    split = jax.shard_map(
        partial(ring_attention, axis_name=axes, mode=mode, **options),
        mesh=mesh, in_specs=P(None, axes), out_specs=P(None, axes), axis_names={*axes} if free else {*mesh.axis_names},
    )  # fmt: skip
    got = jax.jit(jax.value_and_grad(partial(loss, split), (0, 1, 2)))(q, k, v)
    assert_same(
        got, jax.value_and_grad(partial(loss, partial(flash_attention, **options)), (0, 1, 2))(q, k, v)
    )


@pytest.mark.parametrize(("sq", "sk"), [(18, 18), (16, 18), (18, 16)], ids=str)
def test_lengths_that_the_axis_does_not_divide_are_gathered(kernel, automatic, sq, sk):
    """Asked of XLA by a constraint, because arguments must divide. To keep them split, pad them and pass kv_lengths."""
    case = CAUSAL.replace(sq=sq, sk=sk)
    call = attention(case, kernel)

    def constrained(arrays):
        wanted = NamedSharding(automatic, P("data", "model"))
        return call({name: jax.lax.with_sharding_constraint(x, wanted) for name, x in arrays.items()})

    placed = place(automatic, arrays_of(case), qkv(P("data")))
    assert_same(jax.jit(with_gradients(constrained))(placed), jax.jit(with_gradients(call))(arrays_of(case)))
