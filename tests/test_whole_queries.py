"""Under jit, if only the sequence of key and value is split, each device multiplies all queries by its own keys.
Results and gradients of queries are summed. So a decode step reads in place a cache that is split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import MQA, arrays_of, check, check_run, make_mesh, place, qkv, stack, within
from programs import assert_same, attention, collectives, key_shapes, with_gradients
from test_derivative_sharding import jvp_of
from test_manual_sharding import check_explicit, full, typed
from test_packed_ring import PACKED, TOKENS, packed
from test_ring_sharding import ALL, ALL_SPECS
from test_whole_keys import CASES, CAUSAL, MASKS, SEQUENCE

from jax_flash import flash_attention
from jax_flash.sequence import sums

SPLIT = qkv(P("data"), SEQUENCE)


def assert_own_keys(text, *shard):
    """Asserts that calls, forward and backward, have keys of this shape."""
    assert key_shapes(text, "forward") == key_shapes(text, "backward") == {shard}


SIZES = ({"sk": 16}, {"sk": 32}, {"sq": 1, "sk": 32}, {"sq": 5, "sk": 8})
IN_TURN = [(name, SIZES[i % len(SIZES)]) for i, name in enumerate(CASES)]


@pytest.mark.parametrize(("name", "sizes"), IN_TURN + [("causal", sizes) for sizes in SIZES[1:]], ids=str)
def test_each_device_has_its_own_keys(kernel, mesh, name, sizes):
    case = CASES[name].replace(**sizes)
    text, got = check(attention(case, kernel), mesh, arrays_of(case), SPLIT)
    assert_own_keys(text, 2, case.sk // 4, 4, 8)
    for x in ("key", "value"):
        assert got["gradients"][x].sharding.is_equivalent_to(NamedSharding(mesh, SEQUENCE), 4)


@pytest.mark.parametrize("case", [CAUSAL, MQA.replace(sq=16, sk=16)], ids=["GQA", "MQA"])
def test_batch_keys_and_heads_on_three_axes(kernel, cube, case):
    heads = "model" if case.hk > 1 else None
    specs = qkv(P("data", None, "model"), P("data", "ring", heads))
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs)
    assert_own_keys(text, 2, 8, 2 if heads else 1, 8)


@pytest.mark.parametrize("bias", [(4, 8, 16, 16), (1, 8, 1, 16), (4, 1, 16, 1)], ids=str)
def test_all_operands_on_three_axes(kernel, cube, bias):
    """Each batch entry has its own lengths; on some devices it has no key."""
    case = ALL.replace(bias=bias)
    shared = P(*(axis if size > 1 else None for axis, size in zip(("data", "model"), bias)))
    specs = qkv(P("data", None, "model"), P("data", "ring", "model")) | ALL_SPECS | {"bias": shared}
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs | {"segment_ids": P("data")})
    assert_own_keys(text, 2, 1, 8, 2, 8)  # each batch entry has its own diagonal


def test_dropout_drops_the_same_weights(kernel, cube):
    case = CAUSAL.replace(dropout_rate=0.5)
    specs = qkv(P("data", None, "model"), P("data", "ring", "model"))
    text, _ = check(attention(case, kernel), cube, arrays_of(case), specs)
    assert_own_keys(text, 2, 8, 2, 8)


def test_forward_mode(kernel, mesh):
    case = ALL.replace(q_lengths=None, kv_lengths=None, alibi_slopes=None, dropout_rate=0.0)
    specs = SPLIT | {"bias": P("data"), "segment_ids": P("data")}
    text, _ = check_run(jvp_of(attention(case, kernel)), mesh, arrays_of(case), specs, tolerance=1e-4)
    assert key_shapes(text, "tangent") == {(2, 4, 4, 8)}


def test_explicit_types(kernel):
    explicit = make_mesh(AxisType.Explicit, AxisType.Explicit)
    run = with_gradients(attention(CAUSAL, kernel))
    with jax.set_mesh(explicit):
        text, got = check_explicit(run, run, explicit, arrays_of(CAUSAL), SPLIT)
    assert_own_keys(text, 2, 4, 4, 8)
    assert typed(got["results"]) == (full(4, "data"), full(3, "data"))
    gradients = typed(got["gradients"])
    assert gradients["query"] == full(4, "data")
    assert gradients["key"] == gradients["value"] == full(4, *SEQUENCE)


@pytest.mark.parametrize("spec", [P(None, "data", "model"), P("data", None, "model")], ids=str)
def test_under_vmap(kernel, mesh, spec):
    text, _ = check(jax.vmap(attention(CAUSAL, kernel)), mesh, stack(CAUSAL, 2), qkv(P(*spec[:2]), spec))
    assert {x[-3:] for x in key_shapes(text, "forward")} == {(4, 4, 8)}


@pytest.mark.parametrize("name", MASKS)
def test_mask_values(kernel, mesh, name):
    case = CAUSAL.replace(causal=False, **({"sq": 64, "sk": 32} if name == "blocks" else {}))
    call = attention(case, kernel)
    run = lambda arrays: call(arrays | {"mask": MASKS[name]()})  # noqa: E731
    text, _ = check(run, mesh, arrays_of(case), SPLIT)
    assert_own_keys(text, 2, case.sk // 4, 4, 8)


def test_keys_that_are_values(kernel, mesh):
    def call(arrays):
        options = {"causal": True, "implementation": kernel, "return_lse": True, "return_max": True}
        return flash_attention(arrays["query"], arrays["key"], None, **options)

    arrays = {name: x for name, x in arrays_of(CAUSAL).items() if name != "value"}
    specs = {"query": P("data"), "key": SEQUENCE}
    check_run(with_gradients(lambda arrays: call(arrays)[:2]), mesh, arrays, specs)
    text, _ = check_run(call, mesh, arrays, specs)
    assert key_shapes(text, "forward") == {(2, 4, 4, 8)}


@pytest.fixture(params=[True, False], ids=["gathered", "summed"])
def gathered(request, monkeypatch):
    """Whether devices gather the results of all, as small ones are, or sum them."""
    if not request.param:
        monkeypatch.setattr(sums, "GATHERED", 0)
    return request.param


def test_a_key_that_is_nan_on_one_device_reaches_all_rows(kernel, mesh, gathered):
    arrays = arrays_of(CAUSAL)
    arrays["key"] = arrays["key"].at[:, 3].set(jnp.nan)
    options = {"implementation": kernel, "return_lse": True, "return_max": True}
    placed = place(mesh, arrays, SPLIT)
    with within(mesh):
        compiled = jax.jit(lambda arrays: flash_attention(**arrays, **options)).lower(placed).compile()
    assert gathered == ("all-gather" in collectives(compiled.as_text()))
    for x in compiled(placed):
        assert np.isnan(np.asarray(x)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_step_reads_its_own_part_of_the_cache(kernel, mesh, dtype, gathered):
    """The cache has room for 64 tokens, of which each request uses its own number: none, a part of one shard, all."""
    case = CAUSAL.replace(sq=1, sk=64, kv_lengths=(0, 3, 17, 64))
    arrays = {n: x.astype(dtype) if n != "kv_lengths" else x for n, x in arrays_of(case).items()}
    used = jnp.arange(64) < arrays["kv_lengths"][:, None]
    poisoned = arrays | {n: jnp.where(used[..., None, None], arrays[n], jnp.nan) for n in ("key", "value")}
    text, got = check_run(
        attention(case, kernel),
        mesh,
        poisoned,
        SPLIT | {"kv_lengths": P("data")},
        1e-5 if dtype == "float32" else 1e-2,
    )
    assert set(collectives(text)) == {"all-gather" if gathered else "all-reduce"}
    assert key_shapes(text, "forward") == {(2, 16, 4, 8)}
    assert not np.asarray(got[0])[0].any()


@pytest.mark.parametrize(
    "changes",
    [{}, {"causal": False}, {"window": (5, 0)}, {"alibi_slopes": (8,), "softcap": 2.0, "sinks": True}],
    ids=["causal", "full", "window", "scores"],
)
def test_packed_tokens(kernel, mesh, changes):
    case = PACKED.replace(**changes)
    text, _ = check(packed(case, kernel), mesh, arrays_of(case), qkv(P(), TOKENS))
    assert_own_keys(text, 1, 8, 4, 8)


def test_an_unknown_split_is_gathered(kernel, mesh):
    """Keys and values that are not split alike."""
    call, specs = attention(CAUSAL, kernel), qkv(P("data"), SEQUENCE, P("data"))
    placed = place(mesh, arrays_of(CAUSAL), specs)
    with jax.set_mesh(mesh):
        assert_same(jax.jit(with_gradients(call))(placed), jax.jit(with_gradients(call))(arrays_of(CAUSAL)))
