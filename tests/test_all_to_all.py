"""`ring_attention(mode="all_to_all")` equals the call on one device, with every option.

Each device exchanges its tokens of all heads for all tokens of some heads, computes attention, and exchanges back.
"""

import checks
import jax
import jax.numpy as jnp
import pytest
from cases import BY_NAME, Case, make_inputs
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from meshes import arrays_of, place
from programs import (
    assert_same,
    attention,
    collectives,
    custom_calls,
    require_devices,
    shard_shapes,
    with_gradients,
)

import jax_flash

AXIS = "sequence"
PLAIN = Case("plain", b=2, sq=16, sk=16, hq=8, hk=8, d=8, dv=8)
CAUSAL = PLAIN.replace(name="causal", causal=True)
EVERYTHING = BY_NAME["everything"].replace(
    b=2, sq=16, sk=32, hq=8, hk=4, d=8, dv=8, mask=(2, 8, 1, 32), bias=(2, 8, 16, 32), q_lengths=(16, 9),
    kv_lengths=(30, 21), alibi_slopes=(2, 8),
)  # fmt: skip


def make_mesh(devices, *, kind=AxisType.Auto, **others):
    sizes = {**others, AXIS: devices}
    count = 1
    for size in sizes.values():
        count *= size
    require_devices(count)
    types = (kind,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=jax.devices()[:count])


def token_dims(case):
    """Maps each array that has a token dimension to that dimension, which is sharded, and permuted for zigzag."""
    sinks = ("sinks",) if case.sinks == "token" else ()
    dims = dict.fromkeys(("query", "key", "value", "segment_ids", *sinks), 1)
    return dims | {name: 2 for name in ("mask", "bias") if (getattr(case, name) or (1,) * 4)[2] > 1}


def specs_of(case, arrays):
    dims = token_dims(case)
    return {name: P(*[None] * dims[name], AXIS) if name in dims else P() for name in arrays}


def by_heads(case, mesh, implementation, order="contiguous", **options):
    """The case's call in a shard_map. It takes and returns whole arrays, whose tokens are in order."""
    devices = mesh.shape[AXIS]
    dims, zigzag = token_dims(case), order == "zigzag"

    def permute(name, x):
        if name not in dims:
            return x
        return jax.tree.map(lambda x: jax_flash.zigzag_permute(x, devices, dims[name]), x)

    def inside(arrays):
        qkv = [arrays[name] for name in ("query", "key", "value")]
        others = {name: x for name, x in arrays.items() if name not in ("query", "key", "value")}
        given = case.options | {"implementation": implementation} | options | others
        return jax_flash.ring_attention(
            *qkv, axis_name=AXIS, mode="all_to_all", order=order, return_lse=True, **given
        )

    def call(arrays):
        if zigzag:
            arrays = {name: permute(name, x) for name, x in arrays.items()}
        out_specs = P(None, AXIS), P(None, None, AXIS), *[P()] * ("return_max" in options)
        mapped = jax.shard_map(inside, mesh=mesh, in_specs=(specs_of(case, arrays),), out_specs=out_specs)
        out, lse, *largest = mapped(arrays)
        if zigzag:
            out = jax_flash.zigzag_unpermute(out, devices, 1)
            lse = jax_flash.zigzag_unpermute(lse, devices, 2)
        return out, lse, *largest

    return call


def check(case, mesh, implementation, order="contiguous", **options):
    """Compares the call and its gradients with the same call on one device; returns the compiled program's text."""
    arrays = arrays_of(case)
    run = jax.jit(with_gradients(by_heads(case, mesh, implementation, order, **options)))
    placed = place(mesh, arrays, specs_of(case, arrays))
    compiled = run.lower(placed).compile()
    whole = jax.jit(with_gradients(attention(case, implementation, **options)))
    assert_same(compiled(placed), whole(arrays), tolerance=2e-5)
    return compiled.as_text()


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("case", [PLAIN, CAUSAL], ids=lambda case: case.name)
def test_each_device_computes_its_heads_over_the_whole_sequence(kernel, case, devices):
    text = check(case, make_mesh(devices), kernel)
    heads = case.hq // devices
    assert shard_shapes(text, "forward") == shard_shapes(text, "backward") == {(2, 16, heads, 8)}
    assert custom_calls(text) == {"forward": 1, "backward": 1}
    assert set(collectives(text)) == {"all-to-all"}


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_every_option_at_once(implementation, order):
    """Rows of mask and bias, segment ids, slopes, sinks, lengths, and dropout's bits by global head."""
    check(EVERYTHING, make_mesh(4), implementation, order)


@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 32), (2, 8, 1, 32), (1, 8, 16, 1), (2, 1, 1, 1), (1, 1, 16, 1)], ids=str
)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_broadcast_bias_and_mask(kernel, shape, order):
    case = EVERYTHING.replace(bias=shape, mask=shape, sinks=False)
    check(case, make_mesh(2), kernel, order)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (5, 0)},
        {"window": (3, 2), "align": "top_left", "sk": 32},
        {"causal": True, "sk": 32},
        {"dropout_rate": 0.5, "causal": True},
        {"segments": 3, "causal": True, "sinks": "token"},
        {"dv": 16, "softcap": 3.0},
    ],
    ids=str,
)
def test_options_in_zigzag_order(kernel, options):
    check(PLAIN.replace(**options), make_mesh(4), kernel, "zigzag")


@pytest.mark.parametrize(
    ("hq", "hk", "devices", "taken"),
    [(8, 4, 2, 2), (8, 2, 4, 1), (8, 1, 8, 1), (12, 3, 2, 3), (12, 6, 4, 3), (24, 3, 4, 3), (24, 2, 8, 1)],
)
def test_fewer_kv_heads_than_devices_are_sent_to_those_that_read_them(kernel, hq, hk, devices, taken):
    """Each device receives `taken` KV heads, each for as many of its query heads; one that more read comes twice."""
    case = CAUSAL.replace(hq=hq, hk=hk, dropout_rate=0.3)
    text = check(case, make_mesh(devices), kernel)
    kv = [line for line in text.splitlines() if 'custom_call_target="jax_flash_backward"' in line]
    assert f"f32[2,16,{taken},8]" in kv[0]


def test_gradients_of_repeated_keys_are_summed_in_float32(kernel):
    case = CAUSAL.replace(hq=8, hk=1, dtype="bfloat16")
    mesh, arrays = make_mesh(8), arrays_of(case)
    run = jax.jit(with_gradients(by_heads(case, mesh, kernel)))
    checks.assert_right(run(arrays), case, make_inputs(case))
    assert (
        "f32"
        in str(jax.make_jaxpr(with_gradients(by_heads(case, mesh, kernel)))(arrays)).split("reduce_sum")[1]
    )


def test_repeated_keys_of_float64_stay_float64():
    with jax.enable_x64(True):
        case = CAUSAL.replace(hq=4, hk=1)
        arrays = jax.tree.map(lambda x: x.astype("float64") / 3, arrays_of(case))  # not floats of 32 bits
        got = by_heads(case, make_mesh(4), "xla")(arrays)
        whole = attention(case, "xla")(arrays)
        assert got[0].dtype == jnp.float64
        assert_same(got, whole, tolerance=1e-12)


def test_an_axis_of_one_device_is_the_ordinary_call(kernel):
    text = check(EVERYTHING, make_mesh(1), kernel, "zigzag")
    assert shard_shapes(text, "forward") == {(2, 16, 8, 8)}


def test_under_vmap(kernel):
    case = CAUSAL.replace(hk=4)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(arrays_of(case, seed) for seed in range(2)))
    got = jax.jit(jax.vmap(by_heads(case, make_mesh(4), kernel)))(stacked)
    assert_same(got, jax.jit(jax.vmap(attention(case, kernel)))(stacked))


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_forward_mode(kernel, order):
    arrays = arrays_of(CAUSAL)
    moved = jax.tree.map(jnp.cos, arrays)
    got, wanted = (
        jax.jit(lambda x, dx, call=call: jax.jvp(call, (x,), (dx,)))(arrays, moved)
        for call in (by_heads(CAUSAL, make_mesh(4), kernel, order), attention(CAUSAL, kernel))
    )
    assert_same(got, wanted, tolerance=2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_beside_a_batch_and_a_head_axis(kernel, kv_heads, kind):
    """A 3-D mesh, manual over the sequence alone: batch and heads stay split where there are enough KV heads."""
    case, mesh = CAUSAL.replace(hk=kv_heads), make_mesh(2, data=2, heads=2, kind=kind)
    arrays = arrays_of(case)
    spec = P("data", AXIS, "heads")

    names = ("query", "key", "value")

    def inside(arrays):
        qkv = (arrays[name] for name in names)
        options = case.options | {"implementation": kernel, "return_lse": True}
        return jax_flash.ring_attention(*qkv, axis_name=AXIS, mode="all_to_all", **options)

    inside_spec = {name: P(None, AXIS) for name in names}
    mapped = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(inside_spec,),
        out_specs=(P(None, AXIS), P(None, None, AXIS)),
        axis_names={AXIS},
    )
    wanted = jax.device_get(jax.jit(with_gradients(attention(case, kernel)))(arrays))
    with jax.set_mesh(mesh):
        placed = place(mesh, arrays, dict.fromkeys(names, spec))
        compiled = jax.jit(with_gradients(mapped)).lower(placed).compile()
        assert_same(jax.device_get(compiled(placed)), wanted)
    if kv_heads == 4:
        assert shard_shapes(compiled.as_text(), "forward") == {(1, 16, 2, 8)}
        # jax 0.10 gathers explicit axes.
        if kind is AxisType.Auto:
            assert set(collectives(compiled.as_text())) == {"collective-permute"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("options", [{"hk": 2}, {"hq": 24, "hk": 6}, {"bias": (2, 1, 16, 16)}], ids=str)
def test_what_jax_refuses_of_explicit_axes(kernel, options, kind):
    """Repeated KV heads, 24 heads as 3 · 4 · 2, and the transpose of gathered rows of a bias."""
    case, mesh = CAUSAL.replace(**options), make_mesh(4, heads=2, kind=kind)
    arrays = arrays_of(case)
    specs = specs_of(case, arrays)

    def inside(arrays):
        options = case.options | {"implementation": kernel, "return_lse": True}
        return jax_flash.ring_attention(**arrays, axis_name=AXIS, mode="all_to_all", **options)

    mapped = jax.shard_map(
        inside,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P(None, AXIS), P(None, None, AXIS)),
        axis_names={AXIS},
    )
    wanted = jax.device_get(jax.jit(with_gradients(attention(case, kernel)))(arrays))
    with jax.set_mesh(mesh):
        placed = place(mesh, arrays, specs | dict.fromkeys(("query", "key", "value"), P(None, AXIS, "heads")))
        assert_same(jax.device_get(jax.jit(with_gradients(mapped))(placed)), wanted)


def test_in_scan_over_layers_with_remat(kernel):
    """A policy that keeps attention's results runs its forward once; the all-to-alls of k and v run again."""
    mesh = make_mesh(4)
    call = by_heads(CAUSAL, mesh, kernel)
    keep = jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")

    def layers(call, policy):
        def body(query, _):
            out, lse = jax.checkpoint(
                lambda q: call({"query": q, "key": jnp.sin(q), "value": q}), policy=policy
            )(query)
            return query + out, lse

        return lambda arrays: jax.lax.scan(body, arrays["query"], length=3)

    arrays = {"query": arrays_of(CAUSAL)["query"]}
    program = jax.jit(with_gradients(layers(call, keep))).lower(arrays).compile()
    assert custom_calls(program.as_text()) == {"forward": 1, "backward": 1}
    assert_same(
        program(arrays),
        jax.jit(with_gradients(layers(attention(CAUSAL, kernel), None)))(arrays),
        tolerance=1e-4,
    )


def test_heads_that_the_axis_does_not_divide_are_refused_and_the_ring_is_named(kernel):
    case = PLAIN.replace(hq=6, hk=6)
    wanted = "4 devices along 'sequence' as many heads, and query has 6; mode=\"ring\" takes any number"
    with pytest.raises(ValueError, match=wanted):
        jax.jit(by_heads(case, make_mesh(4), kernel)).lower(arrays_of(case))
