"""Ring attention inside shard_map: a sequence split over devices gives what one device gives, both ways."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BY_NAME, Case, make_inputs
from checks import references
from conftest import IMPLEMENTATIONS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import arrays_of, place, qkv, stack
from programs import (
    assert_same,
    attention,
    collectives,
    custom_calls,
    require_devices,
    shard_shapes,
    weights,
    with_gradients,
)

from jax_flash import flash_attention, masks, ring_attention
from jax_flash.sequence import schedule, shard
from jax_flash.spec import ORDERS

PLAIN = Case("plain", sq=16, sk=16, d=8, dv=8)
CAUSAL = PLAIN.replace(name="causal", causal=True)
CASES = (
    PLAIN,
    CAUSAL,
    CAUSAL.replace(name="causal, more keys", sk=32),
    CAUSAL.replace(name="causal, more queries", sq=32),
    CAUSAL.replace(name="causal top left, more keys", sk=32, align="top_left"),
    # One key to the right, which the next device has.
    PLAIN.replace(name="window", sq=32, sk=32, window=(5, 1)),
    CAUSAL.replace(name="causal window", sq=32, sk=32, window=(6, None)),
    PLAIN.replace(name="window that misses", sq=32, window=(2, 0), align="top_left", sinks=True),
    CAUSAL.replace(name="segments", segments=3),
    CAUSAL.replace(name="lengths", q_lengths=(13, 5), kv_lengths=(7, 11), alibi_slopes=(4,)),
    PLAIN.replace(name="lengths, full", q_lengths=(16, 3), kv_lengths=(0, 9), sinks="token"),
    PLAIN.replace(name="mask and bias", mask=(2, 1, 1, 16), bias=(1, 4, 16, 16)),
    PLAIN.replace(name="bias of keys", bias=(2, 1, 1, 16), hk=1),
    PLAIN.replace(name="bias first", bias=(1, 4, 16, 16), bias_first=True, softcap=1.5),
    CAUSAL.replace(name="bias of rows, first", bias=(2, 1, 16, 1), bias_first=True, softcap=1.5),
    CAUSAL.replace(name="alibi", alibi_slopes=(2, 4), sk=32),
    CAUSAL.replace(name="dropout", dropout_rate=0.3),
    CAUSAL.replace(name="V is K", shared_kv=True, sk=32, hk=1),
    BY_NAME["everything"].replace(
        sq=16,
        sk=32,
        d=8,
        dv=16,
        mask=(1, 4, 1, 32),
        bias=(2, 1, 16, 32),
        q_lengths=(16, 14),
        kv_lengths=(20, 32),
    ),
)


def mesh_of(devices: int) -> jax.sharding.Mesh:
    require_devices(devices)
    return jax.make_mesh((devices,), ("ring",), (AxisType.Auto,), devices=jax.devices()[:devices])


def order_of(order: str, tokens: int, devices: int) -> np.ndarray:
    """The position in the sequence of each token of the array that is split."""
    if order == "contiguous":
        return np.arange(tokens)
    parts = np.arange(tokens).reshape(2 * devices, -1)
    return np.concatenate([parts[[i, -1 - i]].reshape(-1) for i in range(devices)])


def in_ring(case: Case, order: str, devices: int, **options: Any) -> Any:
    """(query, key, value, keywords) of a whole sequence → (out, lse[, max]), computed by a ring of devices."""
    mesh = mesh_of(devices)
    rows, columns = (order_of(order, size, devices) for size in (case.sq, case.sk))

    def run(arrays: dict[str, Any]) -> Any:
        placed, specs = dict(arrays), {name: P() for name in arrays}
        by_token = ["query", "key", "value", *(["sinks"] if case.sinks == "token" else [])]
        for name in by_token:
            if placed[name] is None:
                continue
            placed[name] = placed[name][:, columns if name in ("key", "value") else rows]
            specs[name] = P(None, "ring")
        if "segment_ids" in arrays:
            ids = arrays["segment_ids"]
            placed["segment_ids"] = ids[0][:, rows], ids[1][:, columns]
            specs["segment_ids"] = (P(None, "ring"),) * 2
        for name in ("mask", "bias"):
            if name in arrays and arrays[name].shape[2] > 1:
                placed[name] = placed[name][:, :, rows]
                specs[name] = P(None, None, "ring")
        call = partial(
            ring_attention, axis_name="ring", order=order, return_lse=True, **case.options | options
        )
        mapped = jax.shard_map(
            lambda x: call(**x),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(P(None, "ring"), P(None, None, "ring"), *[P()] * ("return_max" in options)),
        )
        out, lse, *largest = mapped(placed)
        back = np.argsort(rows)
        return out[:, back], lse[:, :, back], *largest

    return run


def check(case: Case, order: str, devices: int, implementation: str) -> None:
    inputs = make_inputs(case)
    moving, fixed = oracle.split(inputs.positional | inputs.keywords)
    run = in_ring(case, order, devices, implementation=implementation)
    got = oracle.differentiate(lambda moving: run(moving | fixed), moving, inputs.dout, inputs.dlse)
    oracle.assert_result(got, *references(case), case)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_ring_of_four_is_the_whole(kernel, case, order):
    check(case, order, 4, kernel)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name",
    ["plain", "causal", "causal, more keys", "segments", "alibi", "dropout", "mask and bias", "V is K"],
)
def test_long_shards(kernel, name, order, monkeypatch):
    """A device's own keys take two calls, so K and V arrive during either; a backward begins and ends with them."""
    monkeypatch.setattr(schedule, "HALVED", 2)
    monkeypatch.setattr(shard, "COPIED", 0)
    check(next(case for case in CASES if case.name == name), order, 2, kernel)


@pytest.mark.parametrize(("name", "devices"), [("everything", 2), ("causal", 2), ("causal", 8)])
def test_rings_of_two_and_eight(kernel, name, devices):
    check(next(case for case in CASES if case.name == name), "zigzag", devices, kernel)


@pytest.mark.parametrize("name", ["lengths", "everything"])
def test_plain_jax_runs_the_same_ring(name):
    check(next(case for case in CASES if case.name == name), "zigzag", 2, "xla")


@pytest.mark.parametrize(("dtype", "order"), [("bfloat16", "contiguous"), ("float16", "zigzag")])
def test_sixteen_bits_keep_the_tolerance(kernel, dtype, order):
    """Results of parts are rounded to 16 bits; sums over the parts are in float32."""
    check(CAUSAL.replace(dtype=dtype, sq=128, sk=128, d=16, dv=16), order, 8, kernel)
    check(PLAIN.replace(dtype=dtype, sq=128, sk=128, d=16, dv=16), order, 8, kernel)


@pytest.mark.parametrize("order", ORDERS)
def test_forward_mode(kernel, order):
    case = CAUSAL.replace(sinks="token", bias=(1, 4, 16, 16), segments=2)
    inputs = make_inputs(case)
    moving, fixed = oracle.split(inputs.positional | inputs.keywords)
    tangents = jax.tree.map(weights, moving)
    got, wanted = (
        jax.jit(lambda moving, call=call: jax.jvp(lambda x: call(x | fixed), (moving,), (tangents,)))(moving)
        for call in (in_ring(case, order, 4, implementation=kernel), attention(case, kernel))
    )
    assert_same(got, wanted)


def test_under_vmap_and_in_a_scan_that_saves_out_and_lse(kernel):
    """The mapped axis is one more leading dimension; remat runs no forward twice."""
    call = in_ring(CAUSAL, "zigzag", 4, implementation=kernel)
    policy = jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")

    def layers(call: Any, arrays: dict[str, Any]) -> Any:
        @partial(jax.checkpoint, policy=policy)
        def body(query: Any, _: None) -> Any:
            out, lse = jax.vmap(call)(arrays | {"query": query})
            return query + out, lse

        return jax.lax.scan(body, arrays["query"], length=2)

    arrays = jax.tree.map(lambda *x: jnp.stack(x), *(make_inputs(CAUSAL, seed).positional for seed in (0, 1)))
    run = jax.jit(with_gradients(partial(layers, call)))
    compiled = run.lower(arrays).compile()
    assert_same(compiled(arrays), jax.jit(with_gradients(partial(layers, attention(CAUSAL, kernel))))(arrays))
    calls = 1 + 3 * 2  # one call on the device's own keys, and two on pairs of chunks at each of 3 distances
    assert custom_calls(compiled.as_text()) == {"forward": calls, "backward": calls}


def split_over(mesh: Any, call: Any, spec: P, **options: Any) -> Any:
    """call of local arrays, in a shard_map that splits query, key and value."""
    specs = dict.fromkeys(("query", "key", "value"), spec)
    return jax.shard_map(
        lambda x: call(**x, axis_name="ring"), mesh=mesh, in_specs=(specs,), out_specs=spec, **options
    )


def test_without_checks_of_varying_types_and_outside_jit(kernel):
    call = partial(ring_attention, causal=True, implementation=kernel)
    mapped = split_over(mesh_of(4), call, P(None, "ring"), check_vma=False)
    arrays = make_inputs(CAUSAL).positional
    wanted = attention(CAUSAL, kernel, return_lse=False)
    assert_same(mapped(arrays), wanted(arrays))
    assert_same(jax.jit(with_gradients(mapped))(arrays), jax.jit(with_gradients(wanted))(arrays))


@pytest.mark.parametrize(("mode", "order"), [("ring", "zigzag"), ("all_to_all", "contiguous")])
def test_two_conditions_on_segments_hold_for_all_devices(kernel, mode, order):
    """Beside `segment_ids` or as `&` of two masks, made where only the ids of one device's tokens are known."""
    q, k, v = make_inputs(CAUSAL).positional.values()
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, 2, 16), dtype=np.int32))
    tokens = order_of(order, 16, 4)

    def run(call, q, k, v, a, b):
        beside = call(q, k, v, segment_ids=a, mask=masks.segments(b))
        return beside, call(q, k, v, mask=masks.segments(a) & masks.segments(b))

    call = partial(ring_attention, axis_name="ring", mode=mode, order=order, implementation=kernel)
    spec = P(None, "ring")
    mapped = jax.shard_map(partial(run, call), mesh=mesh_of(4), in_specs=(spec,) * 5, out_specs=spec)
    got = jax.jit(mapped)(*(x[:, tokens] for x in (q, k, v, *ids)))
    wanted = flash_attention(q, k, v, segment_ids=4 * ids[0] + ids[1], implementation=kernel)
    for x in got:
        assert_same(x[:, np.argsort(tokens)], wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_over_an_explicit_axis(kernel, order):
    require_devices(4)
    mesh = jax.make_mesh((4,), ("ring",), (AxisType.Explicit,), devices=jax.devices()[:4])
    mapped = split_over(mesh, partial(ring_attention, order=order, implementation=kernel), P(None, "ring"))
    arrays = make_inputs(PLAIN).positional
    placed = jax.device_put(arrays, NamedSharding(mesh, P(None, "ring")))
    with jax.set_mesh(mesh):
        got = jax.jit(with_gradients(mapped))(placed)
    wanted = jax.jit(with_gradients(attention(PLAIN, kernel, return_lse=False)))(arrays)
    assert_same(jax.device_get(got), jax.device_get(wanted))


BATCH, HEADS = qkv(P("other", "ring")), qkv(P(None, "ring", "other"))
MAPPED = qkv(P("other", None, "ring")) | {"kv_lengths": P("other")}
LENGTHS = CAUSAL.replace(kv_lengths=(7, 11))
UNLIKE = {
    "whole lengths": (LENGTHS, BATCH),
    "lengths beside heads": (LENGTHS, HEADS | {"kv_lengths": P("other")}),
    "bias": (PLAIN.replace(bias=(2, 1, 1, 16)), BATCH | {"bias": P("other")}),
    "heads of a bias": (PLAIN.replace(bias=(1, 4, 1, 16)), BATCH | {"bias": P(None, "other")}),
    "whole keys": (PLAIN, HEADS | {"key": P(None, "ring")}),
    "heads of keys, batch of values": (PLAIN, HEADS | {"value": P("other", "ring")}),
    "mapped": (LENGTHS, MAPPED),
}


def tangents_of_queries(call: Any) -> Any:
    """Results and tangents, if only queries move."""

    def run(arrays: dict[str, Any]) -> Any:
        query = arrays["query"]
        return jax.jvp(lambda x: call(arrays | {"query": x}), (query,), (weights(query),))

    return run


def beside_an_explicit_axis(case: Case, specs: dict[str, P], implementation: str, derivative: Any) -> str:
    """Runs a ring of two beside an explicit axis of two and compares with one device; returns the program's text."""
    require_devices(4)
    kinds = AxisType.Explicit, AxisType.Explicit
    mesh = jax.make_mesh((2, 2), ("ring", "other"), kinds, devices=jax.devices()[:4])
    options = {"axis_name": "ring", "return_lse": True, "implementation": implementation} | case.options
    ring, whole = (lambda arrays: ring_attention(**arrays, **options)), attention(case, implementation)
    arrays, results = arrays_of(case), (P(None, "ring"), P(None, None, "ring"))
    if specs == MAPPED:
        ring, whole, arrays = jax.vmap(ring), jax.vmap(whole), stack(case, 2)
        results = tuple(P(None, *spec) for spec in results)
    manual = {x: P(*(axis if axis == "ring" else None for axis in specs.get(x, ()))) for x in arrays}
    mapped = jax.shard_map(ring, mesh=mesh, in_specs=(manual,), out_specs=results, axis_names={"ring"})
    with jax.set_mesh(mesh):
        placed = place(mesh, arrays, specs)
        compiled = jax.jit(derivative(mapped)).lower(placed).compile()
        got = jax.device_get(compiled(placed))
    assert_same(got, jax.device_get(jax.jit(derivative(whole))(arrays)))
    text: str = compiled.as_text()
    if implementation != "xla":
        shapes, heads = shard_shapes(text, "forward"), 2 if "other" in specs["query"][2:] else 4
        assert {(np.prod(shape), shape[-2]) for shape in shapes} == {(arrays["query"].size // 4, heads)}
    return text


@pytest.mark.parametrize("derivative", [with_gradients, tangents_of_queries])
@pytest.mark.parametrize("name", UNLIKE)
def test_operands_that_an_explicit_axis_splits_in_different_ways(kernel, name, derivative):
    """A device computes one part of what the axis splits in queries, whatever it splits in other operands."""
    beside_an_explicit_axis(*UNLIKE[name], kernel, derivative)


@pytest.mark.parametrize("name", ["whole lengths", "heads of a bias", "whole keys", "mapped"])
def test_plain_jax_takes_such_operands_too(name):
    beside_an_explicit_axis(*UNLIKE[name], "xla", with_gradients)


def test_whole_lengths_need_no_collective_beside_an_explicit_axis(kernel):
    with_lengths, without = (
        collectives(beside_an_explicit_axis(case, BATCH, kernel, with_gradients))
        for case in (LENGTHS, CAUSAL)
    )
    assert with_lengths == without  # jax 0.10 gathers at the edges of the region


@pytest.mark.parametrize("heads", [None, "heads"], ids=["one axis", "heads on an automatic axis"])
def test_only_what_is_needed_travels(kernel, heads):
    """A window of 3 keys needs one neighbour: K and V come from it, dK and dV return, and nothing is gathered."""
    require_devices(8)
    mesh = jax.make_mesh((4, 2), ("ring", "heads"), (AxisType.Auto,) * 2)
    call = partial(ring_attention, causal=True, window=(3, None), implementation=kernel)
    mapped = split_over(mesh, call, P(None, "ring"), axis_names={"ring"})
    placed = NamedSharding(mesh, P(None, "ring", heads))
    arrays = jax.tree.map(lambda x: jax.device_put(x, placed), make_inputs(CAUSAL).positional)
    text = jax.jit(with_gradients(mapped)).lower(arrays).compile().as_text()
    forward = jax.jit(mapped).lower(arrays).compile().as_text()
    assert collectives(forward) == {"collective-permute": 1}
    assert set(collectives(text)) == {"collective-permute"}
    assert custom_calls(text) == {"forward": 2, "backward": 2}
    heads_here = 2 if heads else 4  # shards of 4 rows, of which 3 see keys of the neighbour
    assert shard_shapes(text, "forward") == {(2, 4, heads_here, 8), (2, 3, heads_here, 8)}
    pairs = re.findall(r"source_target_pairs=\{(.*?\})\}", text)
    assert len(pairs) == collectives(text)["collective-permute"]
    assert not any("{0,6}" in x or "{6,0}" in x for x in pairs)  # the first device sees nothing of the last


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", ["b", "s"])
@pytest.mark.parametrize(
    ("mode", "order"), [("ring", "contiguous"), ("ring", "zigzag"), ("all_to_all", "contiguous")]
)
def test_an_empty_batch_or_sequence_in_and_outside_jit(implementation, empty, mode, order):
    x = jnp.zeros((0, 8, 4, 8) if empty == "b" else (2, 0, 4, 8), jnp.float32)
    call = partial(ring_attention, causal=True, mode=mode, order=order, implementation=implementation)
    mapped = split_over(mesh_of(4), call, P(None, "ring"))
    arrays = dict.fromkeys(("query", "key", "value"), x)
    whole = jax.jit(with_gradients(mapped))
    for run in (mapped, whole) if order == "contiguous" else (jax.grad(lambda x: mapped(x).sum()), whole):
        assert {leaf.shape for leaf in jax.tree.leaves(run(arrays)) if leaf.ndim} == {x.shape}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
def test_no_queries_or_no_keys_beside_what_is_gathered(implementation, mode):
    """XLA refuses to gather along a dimension without elements, and a maximum of a shard without any."""
    makes = {
        "segments": lambda q, k: masks.segments(q, k) & masks.segments(q, k),
        "positions": masks.by_position,
        "spans": lambda q, k: masks.bidirectional_spans(q),
    }
    split, by_row = P(None, "ring"), P(None, None, "ring")
    for sq, sk in ((0, 4), (4, 0), (0, 0)):
        q, k = jnp.ones((1, sq, 4, 8)), jnp.ones((1, sk, 4, 8))
        ids = [jnp.zeros((1, size), jnp.int32) for size in (sq, sk)]
        for make in makes.values():

            def local(q, k, q_ids, k_ids, make=make):
                options = {"mode": mode, "implementation": implementation, "segment_ids": (q_ids, k_ids)}
                options |= {"mask": make(q_ids, k_ids), "return_lse": True, "return_max": True}
                return ring_attention(q, k, k, axis_name="ring", **options)

            mapped = jax.shard_map(
                local, mesh=mesh_of(2), in_specs=(split,) * 4, out_specs=(split, by_row, P())
            )
            out, lse, largest = jax.jit(mapped)(q, k, *ids)
            assert out.shape == q.shape
            assert not out.any()
            assert np.isneginf(lse).all()
            assert np.isneginf(largest).all()


def test_outside_shard_map_is_refused():
    with pytest.raises(ValueError, match="axis_name must name axes"):
        ring_attention(*make_inputs(PLAIN).positional.values(), axis_name="ring")
