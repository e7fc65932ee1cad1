"""Under jit, if only the query's sequence is split, each device computes its own rows with all keys. Nothing is sent
but the sums of gradients that devices share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import GQA, MQA, arrays_of, check, check_run, forward, make_mesh, place, qkv, stack, within
from programs import assert_same, attention, collectives, require_devices, shard_shapes, with_gradients
from test_derivative_sharding import jvp_of
from test_manual_sharding import check_explicit, full, typed
from test_packed_ring import PACKED, TOKENS, packed
from test_partly_manual import manual_over
from test_ring_sharding import ALL, ALL_SPECS

from jax_flash import flash_attention, masks, zigzag_permute, zigzag_positions

CAUSAL = GQA.replace(sq=16, sk=16)
SEQUENCE = P("data", "model")
WHOLE = qkv(SEQUENCE, P("data"))
# JAX 0.10 takes shards of the sums and gathers them, where explicit axes say that gradients are whole.
SUMS = {"all-reduce"} | ({"all-gather"} if jax.__version_info__ < (0, 11) else set())


def assert_own_rows(text, shard=None):
    """Asserts that devices only sum gradients, and that calls have shards of this shape."""
    assert set(collectives(text)) <= SUMS
    if shard:
        assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {shard}


CASES = {
    "causal": CAUSAL,
    "full": CAUSAL.replace(causal=False),
    "window": CAUSAL.replace(causal=False, window=(3, 2)),
    "top left": CAUSAL.replace(align="top_left", sk=12),
    "more keys": CAUSAL.replace(sk=34),
    "fewer keys": CAUSAL.replace(sk=7),
    "softcap, sinks": CAUSAL.replace(softcap=2.0, sinks=True),
    "sinks by token": CAUSAL.replace(sinks="token"),
    "values of another width": CAUSAL.replace(dv=16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_device_has_its_own_rows(kernel, mesh, case):
    assert not collectives(forward(attention(case, kernel), mesh, arrays_of(case), WHOLE))
    text, got = check(attention(case, kernel), mesh, arrays_of(case), WHOLE)
    assert_own_rows(text)
    assert shard_shapes(text, "forward") == {(2, 4, 8, case.dv)}
    assert shard_shapes(text, "backward") == {(2, 4, 8, case.d)}
    assert got["results"][0].sharding.is_equivalent_to(NamedSharding(mesh, SEQUENCE), 4)
    assert got["gradients"]["query"].sharding.is_equivalent_to(NamedSharding(mesh, SEQUENCE), 4)


@pytest.mark.parametrize("keys", [P("model"), P("data", None, "model")], ids=str)
def test_keys_with_other_axes_are_gathered(kernel, mesh, keys):
    text, _ = check(attention(CAUSAL, kernel), mesh, arrays_of(CAUSAL), qkv(SEQUENCE, keys))
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 4, 8, 8)}


@pytest.mark.parametrize("case", [CAUSAL, MQA.replace(sq=16, sk=16)], ids=["GQA", "MQA"])
def test_batch_rows_and_heads_on_three_axes(kernel, cube, case):
    specs = qkv(P("data", "ring", "model"), P("data", None, "model" if case.hk > 1 else None))
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs)
    assert_own_rows(text, (2, 8, 4, 8))


@pytest.mark.parametrize("bias", [(4, 8, 16, 16), (1, 8, 1, 16), (4, 1, 16, 1)], ids=str)
def test_all_operands_on_three_axes(kernel, cube, bias):
    case = ALL.replace(bias=bias)
    shared = P(*(axis if size > 1 else None for axis, size in zip(("data", "model", "ring"), bias)))
    specs = qkv(P("data", "ring", "model"), P("data", None, "model")) | ALL_SPECS | {"bias": shared}
    segments = {"segment_ids": P("data")}  # one array for queries and keys
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs | segments)
    assert_own_rows(text, (2, 1, 8, 4, 8))  # each batch entry has its own diagonal


def test_dropout_drops_the_same_weights(kernel, cube):
    case = CAUSAL.replace(dropout_rate=0.5)
    specs = qkv(P("data", "ring", "model"), P("data", None, "model"))
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs)
    assert_own_rows(text)


def test_forward_mode(kernel, mesh):
    case = ALL.replace(q_lengths=None, kv_lengths=None, alibi_slopes=None, dropout_rate=0.0)
    specs = WHOLE | {"bias": P("data", None, "model"), "segment_ids": P("data")}
    text, _ = check_run(jvp_of(attention(case, kernel)), mesh, arrays_of(case), specs, tolerance=1e-4)
    assert not collectives(text)


def test_explicit_types(kernel):
    mesh = make_mesh(AxisType.Explicit, AxisType.Explicit)
    run = with_gradients(attention(CAUSAL, kernel))
    with jax.set_mesh(mesh):
        text, got = check_explicit(run, run, mesh, arrays_of(CAUSAL), WHOLE)
    assert_own_rows(text, (2, 4, 8, 8))
    assert typed(got["results"]) == (full(4, *SEQUENCE), full(3, "data", None, "model"))
    gradients = typed(got["gradients"])
    assert gradients["query"] == full(4, *SEQUENCE)
    assert gradients["key"] == gradients["value"] == full(4, "data")


@pytest.mark.parametrize("spec", [P(None, "data", "model"), P("data", None, "model")], ids=str)
def test_under_vmap(kernel, mesh, spec):
    keys = P(*spec[:2])
    text, _ = check(jax.vmap(attention(CAUSAL, kernel)), mesh, stack(CAUSAL, 2), qkv(spec, keys))
    assert_own_rows(text)


def test_an_automatic_axis_of_a_partly_manual_region(kernel, automatic):
    call = attention(CAUSAL, kernel)
    mapped = manual_over({"data"}, call, WHOLE, (SEQUENCE, P("data", None, "model")), mesh=automatic)
    placed = place(automatic, arrays_of(CAUSAL), WHOLE)
    compiled = jax.jit(with_gradients(mapped)).lower(placed).compile()
    assert_same(compiled(placed), jax.jit(with_gradients(call))(arrays_of(CAUSAL)))
    assert shard_shapes(compiled.as_text(), "forward") == {(2, 4, 8, 8)}


def test_many_devices_sum_gradients_in_float32(kernel):
    """The gradients of keys err no more than the sum of eight rounded terms must."""
    require_devices(8)
    mesh = jax.make_mesh((8,), ("rows",), (AxisType.Auto,))
    arrays = {name: x.astype(jnp.bfloat16) for name, x in arrays_of(CAUSAL.replace(b=1, sq=64, sk=8)).items()}
    call = attention(CAUSAL.replace(causal=False), kernel)
    placed = place(mesh, arrays, qkv(P(None, "rows"), P()))
    compiled = jax.jit(with_gradients(call)).lower(placed).compile()
    reduced = [line for line in compiled.as_text().splitlines() if " all-reduce(" in line]
    assert reduced
    assert not any("bf16" in line.split(" all-reduce(")[0] for line in reduced)


# mask values


def zigzag_mask(s, devices):
    where = zigzag_positions(s, devices)
    return masks.by_position(where, jnp.arange(s, dtype=jnp.int32))


MASKS = {
    "positions": lambda: zigzag_mask(16, 4),
    "prefix": lambda: masks.prefix_lm(jnp.array([3, 0, 9, 16], jnp.int32)),
    "ranges": lambda: masks.ranges(
        *jnp.sort(jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 16), np.int32)), 0)
    ),
    "window as data": lambda: masks.window(jnp.int32(5), jnp.int32(0)),
    "chunks": lambda: masks.chunked(6) & masks.causal(),
    "blocks": lambda: masks.blocks(jnp.array([[[[0, -1], [1, 0], [1, -1], [0, 1]]]], jnp.int32), (16, 16)),
    "dense": lambda: masks.dense(jnp.asarray(np.random.default_rng(1).random((1, 1, 16, 16)) < 0.5)),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_values(kernel, mesh, name):
    """XLA may move the positions of rows, which are integers."""
    case = CAUSAL.replace(causal=False, **({"sq": 64, "sk": 32} if name == "blocks" else {}))
    call = attention(case, kernel)
    run = lambda arrays: call(arrays | {"mask": MASKS[name]()})  # noqa: E731
    text, _ = check(run, mesh, arrays_of(case), WHOLE)
    assert set(collectives(text)) <= SUMS | {"collective-permute"}
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, case.sq // 4, 8, 8)}


def test_rows_in_zigzag_order_balance_a_causal_mask(kernel, mesh):
    """The recipe for balanced work: permuted queries, keys in order, and the rows' positions."""
    q, k, v = (arrays_of(CAUSAL)[name] for name in ("query", "key", "value"))
    placed = place(mesh, {"query": zigzag_permute(q, 4), "key": k, "value": v}, WHOLE)
    run = jax.jit(partial(flash_attention, mask=zigzag_mask(16, 4), implementation=kernel))
    with within(mesh):
        out = run(*placed.values())
    wanted = flash_attention(q, k, v, causal=True, implementation=kernel)
    assert_same(jax.device_get(out), zigzag_permute(wanted, 4))


# one tensor for K and V, and the largest logit


def test_keys_that_are_values(kernel, mesh):
    def call(arrays):
        return flash_attention(
            arrays["query"],
            arrays["key"],
            None,
            causal=True,
            implementation=kernel,
            return_lse=True,
            return_max=True,
        )

    arrays = {name: x for name, x in arrays_of(CAUSAL).items() if name != "value"}
    run = with_gradients(lambda arrays: call(arrays)[:2])
    text, _ = check_run(run, mesh, arrays, {"query": SEQUENCE, "key": P("data")})
    assert_own_rows(text, (2, 4, 8, 8))
    text, _ = check_run(call, mesh, arrays, {"query": SEQUENCE, "key": P("data")})
    assert set(collectives(text)) == {"all-reduce"}  # of the largest logits


# packed tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"window": (5, 0)},
        {"alibi_slopes": (8,), "softcap": 2.0, "sinks": True},
        {"align": "top_left", "kv_lengths": (4, 3, 20, 0)},
    ],
    ids=["causal", "full", "window", "scores", "lengths"],
)
def test_packed_tokens(kernel, mesh, changes):
    case = PACKED.replace(**changes)
    text, _ = check(packed(case, kernel), mesh, arrays_of(case), qkv(TOKENS, P()))
    assert_own_rows(text, (1, 8, 8, 8))


def test_packed_keys_with_offsets_of_their_own(kernel, mesh):
    case = PACKED.replace(causal=False, k_sequences=(20, 8, 3, 30))
    text, _ = check(attention(case, kernel), mesh, arrays_of(case), qkv(TOKENS, P()))
    assert_own_rows(text, (1, 8, 8, 8))
