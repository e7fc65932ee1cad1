"""paged_attention and append_kv under JAX's transformations: in place, sharded by heads, mapped, exported."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, varlen
from jax.export import DisabledSafetyCheck, export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import check, check_run, place, within
from pages import FLOAT8, paged, require
from programs import collectives, custom_calls, require_devices, shard_shapes
from test_append import arguments
from test_manual_sharding import full, typed

from jax_flash import append_kv, paged_attention

CHUNK = Case("chunk", b=2, sq=2, sk=12, kv_lengths=(12, 5), causal=True)
MIXED = varlen("mixed", (1, 4, 0), k_sequences=(12, 4, 5), causal=True)
NAMES = ("query", "key", "value", "block_tables", "kv_lengths")

# In place.

N, PAGES, SIZE, HQ, HK, D, STEPS = 2, 11, 4, 16, 8, 8, 6
POOL = (PAGES, SIZE, HK, D)


def decode_loop(kind, implementation):
    """A loop over STEPS tokens: append, then attend; the output becomes the next token's key and value."""

    def step(state):
        k_pages, v_pages, lengths, x = state
        k_pages, v_pages, lengths = append_kv(
            k_pages, v_pages, x, -x, TABLES, lengths, implementation=implementation
        )
        query = jnp.stack([x] * (HQ // HK), 3).reshape(N, 1, HQ, D)
        out = paged_attention(
            query, k_pages, v_pages, TABLES, lengths, causal=True, implementation=implementation
        )
        return k_pages, v_pages, lengths, out.reshape(N, 1, HK, HQ // HK, D)[:, :, :, 0]

    def run(k_pages, v_pages, lengths, x):
        state = k_pages, v_pages, lengths, x
        if kind == "fori_loop":
            return jax.lax.fori_loop(0, STEPS, lambda _, state: step(state), state)
        return jax.lax.scan(lambda state, _: (step(state), None), state, length=STEPS)[0]

    return run


TABLES = jnp.asarray([[3, 9, 0], [1, 10, 5]], jnp.int32)


def initial():
    rng = np.random.default_rng(0)
    pools = (jnp.asarray(rng.standard_normal(POOL), jnp.float32) for _ in range(2))
    return (
        *pools,
        jnp.asarray([3, 1], jnp.int32),
        jnp.asarray(rng.standard_normal((N, 1, HK, D)), jnp.float32),
    )


def copies(program, shape):
    """Instructions of a compiled program that copy an array of that shape."""
    found = re.findall(r"^.* = (?:\w+)\[([\d,]*)\]\S* copy(?:-start)?\(.*$", program, re.M)
    return [dims for dims in found if dims == ",".join(map(str, shape))]


@pytest.mark.parametrize("kind", ["fori_loop", "scan"])
def test_a_donated_decode_loop_copies_no_pool(kernel, kind):
    require(kernel)
    run = jax.jit(decode_loop(kind, kernel), donate_argnums=(0, 1)).lower(*initial()).compile()
    program = run.as_text()
    assert custom_calls(program) == {"append": 1, "forward": 1}
    assert not copies(program, POOL)
    state = initial()
    before = [x.unsafe_buffer_pointer() for x in state[:2]]
    wanted = jax.jit(decode_loop(kind, "xla"))(*initial())
    got = run(*state)
    assert [x.unsafe_buffer_pointer() for x in got[:2]] == before
    assert all(x.is_deleted() for x in state[:2])
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_an_undonated_pool_is_copied_once(kernel):
    """Only the caller's pool, which must not change, is copied."""
    require(kernel)
    program = jax.jit(decode_loop("fori_loop", kernel)).lower(*initial()).compile().as_text()
    assert len(copies(program, POOL)) == 2  # of keys and of values


def test_a_donated_decode_loop_sharded_by_heads(kernel, axis_type):
    """Each of eight devices has a KV head: nothing is exchanged or copied."""
    require(kernel)
    require_devices(8)
    mesh = make_mesh(8, axis_type)
    by_head, whole = NamedSharding(mesh, P(None, None, "model")), NamedSharding(mesh, P())
    state = [jax.device_put(x, s) for x, s in zip(initial(), (by_head, by_head, whole, by_head), strict=True)]
    with within(mesh):
        run = jax.jit(decode_loop("fori_loop", kernel), donate_argnums=(0, 1)).lower(*state).compile()
    program = run.as_text()
    shard = (PAGES, SIZE, 1, D)
    assert not collectives(program)
    assert not copies(program, shard)
    assert shard_shapes(program, "append") == {shard}
    assert shard_shapes(program, "forward") == {(N, 1, HQ // HK, D)}
    wanted = jax.jit(decode_loop("fori_loop", "xla"))(*initial())
    for x, y in zip(run(*state), wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


# Sharding.


def make_mesh(devices, axis_type):
    require_devices(devices)
    return jax.make_mesh((devices,), ("model",), (axis_type,), devices=jax.devices()[:devices])


@pytest.mark.parametrize(("layout", "pool_dtype"), [("nhd", "float32"), ("hnd", FLOAT8[0])])
def test_attention_over_sharded_heads_needs_no_communication(kernel, axis_type, layout, pool_dtype):
    """All operands with heads are split with them: pools in both layouts, scales, sinks."""
    require(kernel)
    call = paged(CHUNK.replace(sinks=True, hq=16, hk=8), 4, layout, pool_dtype)
    pools = P(None, None, "model") if layout == "nhd" else P(None, "model")
    specs = {"query": P(None, None, "model"), "key": pools, "value": pools}
    specs |= dict.fromkeys(("sinks", "k_scale", "v_scale"), P("model"))
    program = sharded_attention(call, specs, kernel, axis_type)
    assert not collectives(program)
    assert shard_shapes(program, "forward") == {(2, 2, 2, 16)}


def sharded_attention(call, specs, implementation, axis_type, devices=8):
    """Runs a call with arrays split over "model", and compares it with plain JAX on one device; returns the program."""
    mesh = make_mesh(devices, axis_type)
    arrays = place(mesh, call.arrays, specs)
    with within(mesh):
        run = jax.jit(call.call(implementation)).lower(arrays).compile()
    for x, y in zip(run(arrays), call.call("xla")({}), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
    return run.as_text()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_fewer_kv_heads_than_devices_keep_their_own_scales(kernel, axis_type, kv_heads):
    """Query heads are split further than KV heads: each device takes the pages and the scales of its one KV head."""
    require(kernel)
    call = paged(CHUNK.replace(hq=8, hk=kv_heads), 4, pool_dtype=FLOAT8[1])
    program = sharded_attention(call, {"query": P(None, None, "model")}, kernel, axis_type)
    assert shard_shapes(program, "forward") == {(2, 2, 1, 16)}


HEADS, REQUESTS = P(None, None, "model"), P("model")
SPLITS = {
    "heads": {"query": HEADS, "key": HEADS, "value": HEADS},
    "requests": {"query": REQUESTS, "block_tables": REQUESTS, "kv_lengths": REQUESTS},
    "query alone": {"query": HEADS},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_of_sharded_queries_and_pools(implementation, split, explicit):
    """Gradients have the shardings of their arguments, and the result has that of the query."""
    require(implementation)
    mesh = make_mesh(4, AxisType.Explicit if explicit else AxisType.Auto)
    rng = np.random.default_rng(0)
    made = {"query": (4, 2, 8, 8), "key": (9, 4, 4, 8), "value": (9, 4, 4, 8)}
    arrays = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in made.items()}
    arrays["block_tables"] = jnp.asarray(rng.integers(0, 9, (4, 3)), jnp.int32)
    arrays["kv_lengths"] = jnp.asarray([12, 3, 0, 7], jnp.int32)

    def call(arrays):
        operands = [arrays[name] for name in NAMES]
        return paged_attention(*operands, causal=True, return_lse=True, implementation=implementation)

    _, got = check(call, mesh, arrays, SPLITS[split])
    if explicit:
        wanted = {name: full(4, *SPLITS[split].get(name, P())) for name in made}
        assert typed(got["gradients"]) == wanted
        assert typed(got["results"])[0] == wanted["query"]


@pytest.mark.parametrize("scale", ["static", "dynamic"])
@pytest.mark.parametrize("new", [2, (3, 0, 1)], ids=["each", "packed"])
@pytest.mark.parametrize("explicit", [False, True])
def test_append_with_sharded_requests_and_heads(implementation, explicit, new, scale):
    """Requests are split over devices and must be exchanged; pools, split over heads, stay where they are."""
    require(implementation)
    require_devices(6)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((3, 2), ("data", "model"), (kind,) * 2, devices=jax.devices()[:6])
    dynamic = scale == "dynamic"
    arrays = arguments(new=new, lengths=(1, 5, 0), positions=25, pool_dtype=FLOAT8[0] if dynamic else None)
    layout = arrays.pop("page_layout")
    options = {"interleaved": arrays.pop("interleaved"), "page_layout": layout, "scale": scale}
    heads = dict.fromkeys(("k_pages", "v_pages"), P(None, None, "model"))
    new_rows = P("data", None, "model") if new == 2 else P(None, "model")
    specs = heads | {"key": new_rows, "value": new_rows, "block_tables": P("data"), "kv_lengths": P("data")}
    if dynamic:
        arrays |= dict.fromkeys(
            ("k_scale", "v_scale"), jnp.ones((arrays["k_pages"].shape[0], 2), jnp.float32)
        )
        specs |= dict.fromkeys(("k_scale", "v_scale"), P(None, "model"))
    _, got = check_run(
        lambda arrays: append_kv(**arrays, **options, implementation=implementation), mesh, arrays, specs
    )
    if explicit:
        assert typed(got[:3]) == (full(4, None, None, "model"),) * 2 + (P("data"),)


# vmap.


@pytest.mark.parametrize("mapped", [*((name,) for name in NAMES), ("key", "value"), NAMES], ids="-".join)
def test_vmap_of_attention_over_any_argument(kernel, mapped):
    require(kernel)
    rng = np.random.default_rng(0)
    stacked = {
        "query": jnp.asarray(rng.standard_normal((3, 2, 2, 4, 16)), jnp.float32),
        "key": jnp.asarray(rng.standard_normal((3, 7, 4, 2, 16)), jnp.float32),
        "value": jnp.asarray(rng.standard_normal((3, 7, 4, 2, 16)), jnp.float32),
        "block_tables": jnp.asarray(rng.integers(0, 7, (3, 2, 3)), jnp.int32),
        "kv_lengths": jnp.asarray([[12, 5], [5, 12], [1, 0]], jnp.int32),
    }

    def call(*arrays):
        return paged_attention(*arrays, causal=True, return_lse=True, implementation=kernel)

    arrays = [stacked[n] if n in mapped else stacked[n][0] for n in NAMES]
    axes = [0 if n in mapped else None for n in NAMES]
    got = jax.vmap(call, axes)(*arrays)
    for i in range(3):
        wanted = call(*(x[i] if axis == 0 else x for x, axis in zip(arrays, axes, strict=True)))
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-5, atol=1e-5)


def test_gradients_under_vmap(kernel):
    require(kernel)
    call = paged(CHUNK, 4)

    def loss(query, key):
        return jnp.square(call.call(kernel)({"query": query, "key": key})[0]).sum()

    grads = jax.grad(loss, (0, 1))
    queries = jnp.stack([call.arrays["query"], 2 * call.arrays["query"]])
    got = jax.jit(jax.vmap(grads, (0, None)))(queries, call.arrays["key"])
    one = jax.jit(grads)
    for i in range(2):
        for x, y in zip(got, one(queries[i], call.arrays["key"]), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "mapped", [("k_pages", "v_pages"), ("key",), ("kv_lengths",), ("block_tables", "v_pages")], ids="-".join
)
def test_vmap_of_append(kernel, mapped):
    require(kernel)
    calls = [arguments(seed=seed, new=2, lengths=(seed, 3, 0), positions=9) for seed in range(3)]
    assert_vmap_is_a_loop(calls, mapped, kernel)


def assert_vmap_is_a_loop(calls, mapped, implementation):
    """append_kv mapped over these arguments of several calls gives the bits of the calls one by one."""
    fixed = {n: x for n, x in calls[0].items() if n not in mapped}

    def call(moving):
        return append_kv(**fixed, **moving, implementation=implementation)

    got = jax.vmap(call)({n: jnp.stack([c[n] for c in calls]) for n in mapped})
    for i, one in enumerate(calls):
        for x, y in zip(got, call({n: one[n] for n in mapped}), strict=True):
            assert np.asarray(x[i]).tobytes() == np.asarray(y).tobytes()


# Export.


@pytest.mark.parametrize("case", [CHUNK, MIXED], ids=lambda case: case.name)
def test_a_machine_without_a_gpu_exports_attention_for_cuda(case, lowers_for_cuda):
    call = paged(case.replace(dtype="bfloat16"), layout="hnd")
    attributes = exported(call.call(None, num_splits=3, batch_invariant=True), call.arrays, "forward")
    assert attributes["layout"] == f"{2 if case is CHUNK else 3} : i32"
    assert attributes["page_layout"] == "1 : i32"
    assert attributes["num_splits"] == "3 : i32"
    assert attributes["batch_invariant"] == "true"


@pytest.mark.parametrize("new", [1, (1, 0, 3)], ids=str)
def test_a_machine_without_a_gpu_exports_append_for_cuda(new, lowers_for_cuda):
    call = arguments(dtype="bfloat16", new=new, positions=9, interleaved=True)
    static = {name: call.pop(name) for name in ("page_layout", "interleaved")}
    attributes = exported(lambda arrays: append_kv(**arrays, **static), call, "append")
    assert attributes["page_layout"] == "0 : i32"
    assert attributes["interleaved"] == "true"


def exported(call, arrays, name):
    """The attributes of the one custom call in the program for CUDA."""
    disabled = [DisabledSafetyCheck.custom_call(f"jax_flash_{name}")]
    text = export(jax.jit(call), platforms=("cuda",), disabled_checks=disabled)(arrays).mlir_module()
    assert text.count(f"@jax_flash_{name}(") == 1
    (attributes,) = re.findall(r"spec = \{(.*?)\}", text)
    return dict(item.split(" = ") for item in attributes.split(", "))
