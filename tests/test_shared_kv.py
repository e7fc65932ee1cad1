"""`value=None`, and `v_pages=None` without `value_dim`: V is K, so one array is read, sent and differentiated.

The cases of tests/cases.py with `shared_kv` test every option and both modes of differentiation. This file tests JAX's
transformations, devices and pages.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest
from cases import DTYPES, Case, make_inputs, varlen
from conftest import IMPLEMENTATION
from jax import export
from jax.sharding import PartitionSpec as P
from meshes import BATCH_HEADS, GQA, MQA, check, make_mesh
from programs import assert_same, attention, collectives, custom_calls, with_gradients
from test_ring import in_ring

from jax_flash import flash_attention, flops, paged_attention

CASE = Case("V is K", b=2, sq=9, sk=14, hq=4, hk=2, d=8, dv=8, causal=True, sinks=True, shared_kv=True)
PACKED = varlen("packed", (5, 0, 9), padding=(2, 2), hq=4, hk=2, d=8, dv=8, causal=True, shared_kv=True)


def arrays_of(case, seed=0):
    inputs = make_inputs(case, seed)
    return inputs.positional | inputs.keywords


def apart(arrays):
    """The same call with a copy of the keys as values."""
    return arrays | {"value": arrays["key"]}


@pytest.mark.parametrize("case", [CASE, PACKED], ids=lambda case: case.layout)
def test_it_is_the_call_with_the_keys_as_values_and_their_gradients_added(implementation, case):
    run = with_gradients(attention(case, implementation))
    arrays = arrays_of(case)
    got, wanted = run(arrays), run(apart(arrays))
    wanted["gradients"]["key"] += wanted["gradients"].pop("value")
    assert_same(got, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_gradients_are_added_before_they_are_rounded(implementation, dtype):
    """Only out, from which delta is computed, is rounded before: below 128 keys the CPU multiplies in float32."""
    if implementation == "cuda":
        pytest.skip("CUDA adds two rounded gradients")
    rng = np.random.default_rng(0)
    q, k, dout = (jnp.asarray(rng.standard_normal((1, n, 1, 64)), dtype) for n in (33, 20, 33))
    out, pullback = jax.vjp(lambda *x: flash_attention(*x, None, implementation=implementation), q, k)
    _, got = pullback(dout)
    q, k, dout, out, got = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, dout, out, got))
    p = np.exp(q @ k.T / 8)
    p /= p.sum(1, keepdims=True)
    out = p @ k if implementation == "xla" else out
    ds = p * (dout @ k.T - (dout * out).sum(1, keepdims=True))
    right = ds.T @ q / 8 + p.T @ dout
    digits = {"bfloat16": 8, "float16": 11}[dtype]  # one rounding is half a unit in the last place
    np.testing.assert_allclose(got, right, rtol=1.01 * 2.0**-digits, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=["query", "key", "both"])
def test_vmap_over_query_or_key(implementation, axes):
    first, second = arrays_of(CASE), arrays_of(CASE, 1)
    sinks = first["sinks"]
    q, k = (
        jnp.stack([first[n], second[n]]) if axis == 0 else first[n] for n, axis in zip(("query", "key"), axes)
    )

    def loss(q, k):
        return flash_attention(q, k, None, causal=True, sinks=sinks, implementation=implementation)

    def gradients(q, k):
        out, pullback = jax.vjp(loss, q, k)
        return out, pullback(jnp.cos(out))

    got = jax.jit(jax.vmap(gradients, axes))(q, k)
    rows = [gradients(*(x[i] if axis == 0 else x for x, axis in zip((q, k), axes))) for i in range(2)]
    assert_same(got, jax.tree.map(lambda *x: jnp.stack(x), *rows))


def test_one_key_is_differentiated_where_the_query_is_a_constant(implementation):
    arrays = arrays_of(CASE)

    def out(key, value):
        return flash_attention(arrays["query"], key, value, causal=True, implementation=implementation)

    key, tangent = arrays["key"], jnp.cos(arrays["key"])
    got = jax.jvp(lambda key: out(key, None), (key,), (tangent,))
    assert_same(got, jax.jvp(out, (key, key), (tangent, tangent)))
    got = jax.grad(lambda key: (out(key, None) ** 2).sum())(key)
    assert_same(got, sum(jax.grad(lambda *x: (out(*x) ** 2).sum(), (0, 1))(key, key)), tolerance=1e-4)


# Devices.


@pytest.mark.parametrize(("case", "reductions"), [(GQA, 0), (MQA, 1)], ids=["gqa", "mqa"])
def test_batch_and_heads_are_split_and_one_gradient_of_the_keys_is_summed(
    kernel, axis_type, case, reductions
):
    keys = BATCH_HEADS if case is GQA else P("data")
    case = case.replace(shared_kv=True)
    specs = {"query": BATCH_HEADS, "key": keys}
    text, _ = check(attention(case, kernel), make_mesh(axis_type, axis_type), arrays_of(case), specs)
    assert sum(collectives(text).values()) == reductions
    assert custom_calls(text) == {"forward": 1, "backward": 1}


def test_a_ring_sends_keys_once(kernel):
    case = Case("ring", b=1, sq=16, sk=16, hq=4, hk=2, d=8, dv=8, causal=True)

    def sent(case):
        call = with_gradients(in_ring(case, "contiguous", 2, implementation=kernel))
        text = jax.jit(call).lower(arrays_of(case)).as_text()
        moved = [line for line in text.splitlines() if "stablehlo.collective_permute" in line]
        return sum(int(np.prod([int(n) for n in line.rsplit("<", 1)[1].split("x")[:-1]])) for line in moved)

    assert sent(case.replace(shared_kv=True)) * 2 == sent(case) > 0


@pytest.mark.parametrize("layout", ["fixed", "varlen"])
def test_a_sequence_that_is_sharded_stays_so(kernel, layout):
    case = CASE.replace(sk=8, sq=8, sinks=False) if layout == "fixed" else PACKED
    specs = dict.fromkeys(("query", "key"), P(None, "data") if layout == "fixed" else P("data"))
    arrays = arrays_of(case)
    if layout == "varlen":
        arrays["cu_seqlens_k"] = None
    text, _ = check(attention(case, kernel), make_mesh(*[jax.sharding.AxisType.Auto] * 2), arrays, specs)
    assert "all-gather" not in collectives(text)


# Pages.


@pytest.mark.parametrize("dtype", DTYPES)
def test_pages_of_keys_are_the_values_too(dtype):
    mixed = varlen("mixed", (1, 9, 0, 2), k_sequences=(30, 20, 5, 66), causal=True, hq=4, hk=1, d=40, dv=40)
    decode = Case("decode", b=3, sq=1, sk=40, kv_lengths=(40, 0, 17), hq=8, hk=2, d=512, dv=512)
    for case in (mixed, decode):
        call = pages.latent(case.replace(dtype=dtype), 8)
        pages.check(call, IMPLEMENTATION)


@pytest.mark.parametrize("layout", ["fixed", "varlen"])
def test_gradients_through_pages(implementation, layout):
    case = Case("pages", b=3, sq=5, sk=30, kv_lengths=(30, 3, 12), hq=4, hk=2, d=24, dv=24, causal=True)
    if layout == "varlen":
        case = varlen("pages", (5, 0, 9), k_sequences=(30, 3, 12), hq=4, hk=2, d=24, dv=24, causal=True)
    pages.require(implementation, case)
    got = pages.check(pages.latent(case, 8), implementation, gradients=True)
    assert got.gradients.keys() == {"query", "key"}


def test_tangents_through_pages(kernel):
    case = Case("pages", b=2, sq=3, sk=30, kv_lengths=(30, 12), hq=4, hk=2, d=24, dv=24, causal=True)
    pages.require(kernel, case)
    call = pages.latent(case, 8)
    pool = call.arrays["key"]
    used = jnp.nan_to_num(pool)
    moved = ({"key": used},), ({"key": jnp.cos(used)},)
    assert_same(jax.jvp(call.call(kernel), *moved), jax.jvp(call.call("xla"), *moved), tolerance=1e-4)


# Errors, FLOP and lowering.


def test_flop_counts_both_products():
    x = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    for of in ("forward", "backward", "tangent"):
        assert flops(flash_attention, x, x, None, of=of) == flops(flash_attention, x, x, x, of=of)
    pool, tables = jax.ShapeDtypeStruct((9, 16, 4, 32), jnp.bfloat16), jax.ShapeDtypeStruct((2, 4), jnp.int32)
    lengths = np.asarray([50, 9], np.int32)
    count = partial(flops, paged_attention, x)
    assert count(pool, None, tables, lengths) == count(pool, pool, tables, lengths)


def test_cuda_adds_the_gradients_of_a_backward_of_keys_and_values(lowers_for_cuda):
    """The custom call has three results; JAX adds the third to the second."""
    x = jax.ShapeDtypeStruct((2, 64, 4, 24), jnp.bfloat16)

    def gradient(q, k):
        return jax.grad(lambda *x: flash_attention(*x, None).astype("float32").sum(), (0, 1))(q, k)

    text = export.export(jax.jit(gradient), platforms=["cuda"], disabled_checks=CUSTOM_CALLS)(
        x, x
    ).mlir_module()
    (call,) = [line for line in text.splitlines() if "@jax_flash_backward(" in line]
    assert call.rsplit("->", 1)[1].count("2x64x4x24xbf16") == 3
    assert "value_dim = 0" in call


CUSTOM_CALLS = [
    export.DisabledSafetyCheck.custom_call(f"jax_flash_{name}") for name in ("forward", "backward")
]
