"""Eight devices: batch and heads are split without communication, all else is gathered, results are the same."""

import checks
import jax
import jax.numpy as jnp
import pytest
from cases import make_inputs
from jax.sharding import NamedSharding
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
    check,
    forward,
    place,
    qkv,
    within,
)
from programs import (
    assert_same,
    attention,
    collectives,
    custom_calls,
    shard_shapes,
    with_gradients,
)

from jax_flash import flash_attention

# jit and NamedSharding: no collective for batch × heads


@pytest.mark.parametrize(
    ("spec", "shard"),
    [
        (P("data"), (2, 6, 8, 8)),
        (P(None, None, "model"), (4, 6, 2, 8)),
        (BATCH_HEADS, (2, 6, 2, 8)),
        (P("model", None, "data"), (1, 6, 4, 8)),
        (P(("data", "model")), None),
    ],
    ids=["batch", "heads", "batch × heads", "axes exchanged", "two batch axes"],
)
@pytest.mark.parametrize("case", [MHA, GQA], ids=lambda case: case.name)
def test_batch_and_heads_need_no_collective_forward_and_backward(kernel, mesh, case, spec, shard):
    if shard is None:
        case, shard = case.replace(b=8), (1, 6, 8, 8)
    text, got = check(attention(case, kernel), mesh, arrays_of(case), qkv(spec))
    assert not collectives(text)
    assert custom_calls(text) == {"forward": 1, "backward": 1}
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {shard}
    for x in (got["results"][0], *got["gradients"].values()):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


def test_heads_over_two_axes(kernel, mesh):
    text, _ = check(attention(MHA, kernel), mesh, arrays_of(MHA), qkv(P(None, None, ("data", "model"))))
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(4, 6, 1, 8)}


def test_lowered_where_jit_is_disabled_too(kernel, mesh):
    run, arrays = with_gradients(attention(GQA, kernel)), place(mesh, arrays_of(GQA), qkv(BATCH_HEADS))
    with within(mesh), jax.disable_jit():
        text = jax.jit(run).lower(arrays).compile().as_text()
    assert not collectives(text)
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 6, 2, 8)}


def test_outside_jit_too(kernel, mesh):
    arrays = place(mesh, arrays_of(GQA), qkv(BATCH_HEADS))
    out, _ = attention(GQA, kernel)(arrays)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, BATCH_HEADS), 4)
    assert_same(out, attention(GQA, kernel)(arrays_of(GQA))[0])


@pytest.mark.parametrize("case", [MQA, FEW], ids=lambda case: case.name)
def test_fewer_kv_heads_than_devices_cost_one_reduction_of_their_gradients(kernel, mesh, case):
    """KV heads are replicated over the axis; dk and dv are summed over it."""
    specs = qkv(BATCH_HEADS, P("data"))
    text = forward(attention(case, kernel), mesh, arrays_of(case), specs)
    assert not collectives(text)
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), specs)
    assert collectives(text) == {"all-reduce": 1}
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 6, 2, 8)}


def test_kv_heads_are_split_as_far_as_they_go(kernel, mesh):
    """8 query heads are split over 2 × 4 devices, and 2 KV heads over the axis of 2."""
    specs = qkv(P(None, None, ("data", "model")), P(None, None, "data"))
    specs["bias"] = P(None, ("data", "model"))
    case = FEW.replace(bias=(4, 8, 6, 6), dropout_rate=0.3)
    text, got = check(attention(case, kernel), mesh, arrays_of(case), specs)
    assert collectives(text) == {"all-reduce": 1}
    assert shard_shapes(text, "forward") == {(4, 6, 1, 8)}
    assert got["gradients"]["key"].sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "data")), 4)


@pytest.mark.parametrize(("hq", "spec"), [(71, P("data")), (5, P()), (9, P("data", "model"))], ids=str)
def test_one_kv_head_where_no_axis_divides_the_query_heads(kernel, mesh, hq, spec):
    """Falcon-7B has 71 heads, which no axis divides; batch and sequence are split all the same."""
    case = MHA.replace(sq=8, sk=8, hq=hq, hk=1)
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), qkv(spec))
    assert "all-gather" not in collectives(text)
    assert shard_shapes(text, "forward") == {(4 if spec == P() else 2, 2 if len(spec) > 1 else 8, hq, 8)}


UNEVEN = {
    "12 query heads, 3 KV heads": (MHA.replace(hq=12, hk=3), P(None, None, "model"), (4, 6, 3, 8)),
    "12 query heads, 6 KV heads": (MHA.replace(hq=12, hk=6), P(None, None, "model"), (4, 6, 3, 8)),
    "24 query heads, 3 KV heads": (MHA.replace(hq=24, hk=3), P(None, None, "model"), (4, 6, 6, 8)),
    "24 query heads, 3 KV heads, all axes": (
        MHA.replace(hq=24, hk=3),
        P(None, None, ("data", "model")),
        (4, 6, 3, 8),
    ),
    "24 query heads, 6 KV heads, all axes": (
        MHA.replace(hq=24, hk=6),
        P(None, None, ("data", "model")),
        (4, 6, 3, 8),
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_shards_whose_groups_are_of_different_sizes_gather_no_query(kernel, mesh, name):
    """Each shard takes the KV heads that its query heads attend to; one that serves parts of two groups comes twice."""
    case, spec, shard = UNEVEN[name]
    case = case.replace(dropout_rate=0.3, bias=(1, case.hq, 6, 6), sinks=True)
    split_kv = P(None, None, "data" if case.hk == 6 and isinstance(spec[2], tuple) else None)
    specs = qkv(spec, split_kv) | {"bias": P(None, spec[2]), "sinks": P(spec[2])}
    assert not collectives(forward(attention(case, kernel), mesh, arrays_of(case), specs))
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), specs)
    assert collectives(text) == {"all-reduce": 1}
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {shard}


def test_the_gradients_of_keys_used_by_two_groups_of_a_shard_are_right_in_16_bit(kernel, mesh):
    case = MHA.replace(hq=12, hk=3, dtype="bfloat16")
    run = jax.jit(with_gradients(attention(case, kernel)))
    placed = place(mesh, arrays_of(case), qkv(BATCH_HEADS, P("data")))
    checks.assert_right(run(placed), case, make_inputs(case))


def test_the_gradients_of_keys_used_by_two_groups_of_a_shard_are_summed_in_float32(kernel, mesh):
    """The terms are 256 + 1 + 1 on the first shard and 1 on the second. In bfloat16 256 + 1 is 256, losing terms."""
    query, key = jnp.zeros((2, 1, 12, 8), jnp.bfloat16), jnp.zeros((2, 1, 3, 8), jnp.bfloat16)
    dout = query.at[:, :, :4].set(jnp.asarray([256, 1, 1, 1], jnp.bfloat16)[:, None])

    @jax.jit
    def dvalue(query, key, dout):  # the gradient of one key, whose weight is 1
        return jax.vjp(lambda value: flash_attention(query, key, value, implementation=kernel), key)[1](dout)[
            0
        ]

    arrays = {"query": query, "key": key, "dout": dout}
    placed = place(mesh, arrays, {"query": BATCH_HEADS, "key": P("data"), "dout": BATCH_HEADS})
    assert (dvalue(**arrays)[:, 0, 0] == 260).all()
    assert (dvalue(**placed)[:, 0, 0] == 260).all()


def test_a_shard_of_query_heads_that_ends_within_an_axis_of_the_keys(kernel, mesh):
    """8 heads over 2 × 4 devices. Shardy splits 4 KV heads over half of an axis, which no PartitionSpec can express."""
    text, _ = check(attention(GQA, kernel), mesh, arrays_of(GQA), qkv(P(None, None, ("data", "model")), P()))
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(4, 6, 1, 8)}


# every other operand is split along


def test_all_operands_are_split_along_and_only_sink_gradients_are_summed(kernel, mesh):
    arrays, specs = arrays_of(EVERYTHING), qkv(BATCH_HEADS) | OPTIONS
    text = forward(attention(EVERYTHING, kernel), mesh, arrays, specs)
    assert not collectives(text)
    text, got = check(attention(EVERYTHING, kernel), mesh, arrays, specs)
    assert collectives(text) == {"all-reduce": 1}
    assert custom_calls(text) == {"forward": 1, "backward": 1, "bias_gradient": 1}
    assert shard_shapes(text, "bias_gradient") == {(2, 2, 6, 10)}
    assert got["gradients"]["bias"].sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 4)


def test_sinks_by_token_are_split_with_their_tokens_and_nothing_is_summed(kernel, mesh):
    case = MHA.replace(sinks="token", q_lengths=(6, 2, 5, 0))
    specs = qkv(BATCH_HEADS) | OPTIONS | {"sinks": BATCH_HEADS}
    text, got = check(attention(case, kernel), mesh, arrays_of(case), specs)
    assert not collectives(text)
    assert got["gradients"]["sinks"].sharding.is_equivalent_to(NamedSharding(mesh, BATCH_HEADS), 3)


@pytest.mark.parametrize("bias", [(4, 1, 6, 10), (1, 8, 1, 10), (1, 1, 6, 1)], ids=str)
def test_the_gradient_of_a_broadcast_bias_is_summed_over_the_shards_that_share_it(kernel, mesh, bias):
    case = EVERYTHING.replace(bias=bias, mask=bias, sinks=False, alibi_slopes=(8,))
    shared = P("data" if bias[0] > 1 else None, "model" if bias[1] > 1 else None)
    specs = qkv(BATCH_HEADS) | OPTIONS | {"bias": shared, "mask": shared, "alibi_slopes": P("model")}
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), specs)
    # The gradient of a bias without a key dimension is a plain sum, which XLA computes one mesh axis after the other.
    assert collectives(text) == {"all-reduce": 2 if bias[-1] == 1 else 1}


def test_one_batch_entry_and_one_head_on_each_device(kernel, mesh):
    """Sizes of 1 that result from splitting must not be taken for broadcasting: only sinks are summed."""
    case = EVERYTHING.replace(b=2, hq=4, hk=4, mask=(2, 4, 1, 10), bias=(2, 4, 6, 10), alibi_slopes=(2, 4))
    case = case.replace(q_lengths=(6, 2), kv_lengths=(7, 9))
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), qkv(BATCH_HEADS) | OPTIONS)
    assert collectives(text) == {"all-reduce": 1}
    assert shard_shapes(text, "bias_gradient") == {(1, 1, 6, 10)}


@pytest.mark.parametrize("hk", [1, 2])
def test_all_operands_with_fewer_kv_heads_than_devices(kernel, mesh, hk):
    case = EVERYTHING.replace(hk=hk)
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), qkv(BATCH_HEADS, P("data")) | OPTIONS)
    assert collectives(text) == {"all-reduce": 2}  # dk and dv over "model", sinks over "data"
    assert shard_shapes(text, "bias_gradient") == {(2, 2, 6, 10)}


@pytest.mark.parametrize(
    "spec", [BATCH_HEADS, P("model", None, "data"), P(None, None, ("data", "model")), P()], ids=str
)
def test_dropout_drops_the_same_weights_for_any_sharding(kernel, mesh, spec):
    case = MHA.replace(dropout_rate=0.5)
    check(attention(case, kernel), mesh, arrays_of(case), qkv(spec))


def test_operands_left_whole_are_split_where_query_is(kernel, mesh):
    """Only query is sharded. The other operands are split like it without communication; their gradients are whole."""
    arrays = arrays_of(EVERYTHING)
    text = forward(attention(EVERYTHING, kernel), mesh, arrays, {"query": BATCH_HEADS})
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(2, 6, 2, 8)}
    check(attention(EVERYTHING, kernel), mesh, arrays, {"query": BATCH_HEADS})


def test_the_old_partitioner_raises_and_names_the_flag(kernel, mesh):
    placed = place(mesh, arrays_of(MHA), qkv(BATCH_HEADS))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        with pytest.raises(NotImplementedError, match="jax_use_shardy_partitioner=True"):
            jax.jit(lambda arrays: attention(MHA, kernel)(arrays)).lower(placed)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


# everything else is gathered


GATHERED = {
    "sequence of keys": qkv(P("data"), P("data", "model")),
    "head dim": qkv(P("data", None, None, "model")),
    "value's head dim": qkv(P("data"), P("data"), P("data", None, None, "model")),
    "different axes": qkv(P("data"), P(None, None, "data"), P(None, "data")),
    "batch of keys alone": qkv(P(), P("data")),
}


@pytest.mark.parametrize("name", GATHERED)
def test_other_shardings_are_gathered_and_right(kernel, mesh, name):
    case = MHA.replace(sq=8, sk=8)
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), GATHERED[name])
    if name != "batch of keys alone":
        assert collectives(text)
    for shape in shard_shapes(text, "forward") | shard_shapes(text, "backward"):
        assert shape[1] == shape[3] == 8  # sequence and head dim are whole


@pytest.mark.parametrize(
    "case",
    [MHA.replace(sq=0), MHA.replace(sk=0), MHA.replace(b=0)],
    ids=["no queries", "no keys", "no batch"],
)
def test_empty_arrays_are_split_too(kernel, mesh, case):
    check(attention(case, kernel), mesh, arrays_of(case), qkv(P(None, None, "model")))


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        (MHA.replace(hq=12, hk=3), qkv(BATCH_HEADS, P("data"))),
        (MHA.replace(hq=6, hk=6), qkv(P("data"))),
        (MHA.replace(b=3), qkv(P(None, None, "model"))),
        (MHA.replace(hq=12, hk=6), qkv(BATCH_HEADS, P("data"))),
    ],
    ids=["12 heads, 3 KV heads", "6 heads", "batch of 3", "12 heads, 6 KV heads"],
)
def test_heads_and_batches_that_do_not_divide_are_right(kernel, automatic, case, spec):
    """Over 2 × 4 devices, through a sharding constraint, because arguments themselves must divide."""
    call = attention(case, kernel)

    def constrained(arrays):
        wanted = NamedSharding(automatic, P("data", None, "model"))
        qkv = {name: jax.lax.with_sharding_constraint(x, wanted) for name, x in arrays.items()}
        return call(qkv)

    placed = place(automatic, arrays_of(case), spec)
    assert_same(jax.jit(with_gradients(constrained))(placed), jax.jit(with_gradients(call))(arrays_of(case)))
    check(call, automatic, arrays_of(case), spec)


# scan


def test_under_scan(kernel, mesh):
    """Query carried, keys closed over: no collective in the loops of forward and backward."""
    call = attention(GQA, kernel)

    def layers(arrays):
        def body(query, _):
            out, lse = call(arrays | {"query": query})
            return query + out, lse

        return jax.lax.scan(body, arrays["query"], length=3)

    text, _ = check(layers, mesh, arrays_of(GQA), qkv(BATCH_HEADS))
    assert not collectives(text)
    assert shard_shapes(text, "forward") == {(2, 6, 2, 8)}


# varlen


def test_varlen_is_split_over_heads(kernel, mesh):
    case = PACKED.replace(dropout_rate=0.3, sinks=True, alibi_slopes=(8,))
    specs = qkv(P(None, "model")) | {"sinks": P("model"), "alibi_slopes": P("model")}
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), specs)
    assert not collectives(text)
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(16, 2, 8)}


def test_packed_tokens_are_gathered(kernel, mesh):
    text, _ = check(attention(PACKED, kernel), mesh, arrays_of(PACKED), qkv(P("data", "model")))
    assert "all-gather" in collectives(text)
    assert {shape[0] for shape in shard_shapes(text, "forward")} == {16}
