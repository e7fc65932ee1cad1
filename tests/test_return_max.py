"""return_max: the largest visible score of each sequence and head, in every layout, and nothing else changes."""

from __future__ import annotations

from functools import cache
from typing import Any

import checks
import equations
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import oracle
import pages
import pytest
from cases import CASES, Case, Inputs, make_inputs, operands, poisoned, spec, varlen
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_same, attention, collectives, custom_calls, with_gradients
from test_all_to_all import by_heads
from test_all_to_all import make_mesh as all_to_all_mesh
from test_ring import CASES as RINGS
from test_ring import in_ring
from test_transforms import FIXED, VARLEN, entries, row, stack

from jax_flash import flash_attention, flash_attention_varlen, paged_attention

TWO_LENGTHS = Case("many keys", b=2, sq=40, sk=700, causal=True, kv_lengths=(700, 130))
SOFTCAP = TWO_LENGTHS.replace(name="softcap, bfloat16", d=128, dv=128, dtype="bfloat16", softcap=20.0)
MORE = (
    TWO_LENGTHS,
    TWO_LENGTHS.replace(name="many keys, bfloat16", dtype="bfloat16"),
    TWO_LENGTHS.replace(name="a negative scale", scale=-0.4),
    TWO_LENGTHS.replace(name="a scale of zero", scale=0.0, sinks=True),
    TWO_LENGTHS.replace(name="far scores", scale=900.0),
    TWO_LENGTHS.replace(name="few rows", sq=2, hq=8, hk=1, d=64, dv=64),
    SOFTCAP,
    SOFTCAP.replace(name="softcap of large scores, bfloat16", causal=False, softcap=50.0, scale=2.5),
    varlen("long and short", (300, 1, 0, 127, 128, 2), hq=2, hk=1, padding=(9, 4), causal=True),
    varlen("one by one", (1,) * 40, k_sequences=tuple(range(40)), hq=2, hk=1),
)


def without_and_with(call: Any) -> Any:
    """arrays → the results of `call(arrays, **options)` without return_max, and with it, from one program, which
    compiles sooner than the operations do one by one."""
    return jax.jit(lambda arrays: (call(arrays), call(arrays, return_max=True)))


def assert_right(run: Any, arrays: Any, wanted: np.ndarray, implementation: str) -> None:
    """Out and lse are the same without and with return_max, and the maxima are right."""
    (out, lse), (*same, largest) = run(arrays)
    if implementation == "xla":  # XLA fuses the two calls differently, which changes roundings on a GPU
        assert_same(same, [out, lse], tolerance=max(1e-5, float(jnp.finfo(out.dtype).eps)))
    else:
        assert [np.asarray(x).tobytes() for x in same] == [np.asarray(x).tobytes() for x in (out, lse)]
    oracle.assert_max(np.asarray(largest), wanted)


def largest_of(case: Case, inputs: Inputs) -> np.ndarray:
    return equations.largest(spec(case, inputs), operands(inputs))


@cache
def program(case: Case, implementation: str) -> Any:
    return without_and_with(lambda arrays, **options: attention(case, implementation, **options)(arrays))


def check(case: Case, implementation: str, inputs: Inputs | None = None) -> None:
    checks.require_case(implementation, case)
    wanted = largest_of(case, make_inputs(case))
    inputs = inputs or make_inputs(case)
    assert_right(program(case, implementation), inputs.positional | inputs.keywords, wanted, implementation)


@pytest.mark.parametrize("case", CASES + MORE, ids=lambda case: case.name)
def test_it_is_the_largest_visible_score(case, kernel):
    check(case, kernel)


@pytest.mark.parametrize("case", CASES[::8] + MORE[1::3], ids=lambda case: case.name)
def test_it_is_the_largest_visible_score_in_plain_jax(case):
    check(case, "xla")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.q_lengths or case.padding != (0, 0)], ids=lambda case: case.name
)
def test_what_is_never_read_does_not_count(case, implementation):
    check(case, implementation, poisoned(case, make_inputs(case)))


def test_sinks_and_dropout_leave_it_alone(implementation):
    q, k, v = (jnp.ones((1, 4, 2, 8)) * x for x in (1.0, 0.5, 2.0))
    options = dict(return_max=True, scale=1.0, implementation=implementation)
    for others in (
        {},
        {"sinks": jnp.array([90.0, 0])},
        {"dropout_rate": 0.9, "dropout_key": jax.random.key(0)},
    ):
        out, largest = flash_attention(q, k, v, **options, **others)
        assert out.shape == q.shape
        np.testing.assert_allclose(largest, [[4.0, 4.0]], rtol=1e-6)


@pytest.mark.parametrize("scale", [None, 0.0])
def test_a_sequence_that_sees_nothing_has_minus_infinity(scale, implementation):
    q = jnp.ones((3, 5, 2, 8))
    lengths = jnp.array([5, 0, -3], jnp.int32)
    options = {"scale": scale, "return_max": True, "implementation": implementation}
    _, largest = flash_attention(q, q, q, kv_lengths=lengths, **options)
    assert np.isneginf(largest[1:]).all()
    assert np.isfinite(largest[0]).all()
    for shape in ((0, 5, 2, 8), (2, 0, 2, 8)):
        x = jnp.ones(shape)
        _, largest = flash_attention(x, x, x, return_max=True, implementation=implementation)
        assert largest.shape == (shape[0], shape[2])
        assert np.isneginf(largest).all()


def test_visible_nan_and_infinity_are_not_lost_and_hidden_ones_do_not_count(implementation):
    x = np.random.default_rng(0).standard_normal((1, 40, 2, 16)).astype(np.float32)
    x = x.astype(jnp.bfloat16)  # in float32, CUDA's three TF32 products turn an infinity into NaN
    for value, expected in ((np.nan, np.nan), (np.inf, np.inf)):
        key = x.copy()
        key[0, 39, 0, 0] = value
        query = abs(x)
        options = {"return_max": True, "implementation": implementation}
        _, seen = flash_attention(query, key, x, **options)
        hides = {"window": (0, 0), "q_lengths": jnp.array([39]), "align": "top_left"}
        _, hidden = flash_attention(query, key, x, **hides, **options)
        assert np.array_equal(seen[0, 0], expected, equal_nan=True)
        assert np.isfinite(seen[0, 1])
        assert np.isfinite(hidden).all()


@pytest.mark.parametrize("sizes", [(1, 130, 2), (2, 40, 16)], ids=str)
def test_nan_is_not_lost_in_longer_rows(sizes, implementation):
    """Max reductions of XLA's CPU backend drop NaN, depending on the shape."""
    b, s, h = sizes
    x = jnp.asarray(np.random.default_rng(0).standard_normal((b, s, h, 8)), jnp.float32)
    key = x.at[0, 3].set(jnp.nan)
    _, fixed = flash_attention(x, key, x, return_max=True, implementation=implementation)
    packed = [y.reshape(b * s, h, 8) for y in (x, key, x)]
    offsets = jnp.arange(b + 1, dtype=jnp.int32) * s
    _, by_sequence = flash_attention_varlen(*packed, offsets, return_max=True, implementation=implementation)
    for found in (fixed, by_sequence):
        assert np.isnan(found[0]).all()
        assert np.isfinite(found[1:]).all()


# Pages.

PAGED = (
    Case("decode", b=3, sq=1, sk=300, hq=8, hk=2, kv_lengths=(300, 7, 64)),
    Case("a few rows", b=2, sq=5, sk=90, causal=True, kv_lengths=(90, 41), sinks=True, softcap=4.0),
    Case("prefill", b=2, sq=70, sk=90, causal=True, kv_lengths=(90, 75), alibi_slopes=(4,)),
    varlen("a mix", (1, 60, 0, 3), k_sequences=(40, 75, 9, 3), causal=True),
)


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.name)
def test_over_pages(case, splits, implementation):
    if splits and implementation == "xla":
        pytest.skip("plain JAX has no splits")
    pages.require(implementation, case)
    assert_paged(pages.paged(case), implementation, num_splits=splits)


def assert_paged(paged: pages.Paged, implementation: str, **given: Any) -> None:
    def call(arrays: Any, **options: Any) -> Any:
        return paged.call(implementation, **given, **options)(arrays)

    assert_right(without_and_with(call), paged.arrays, largest_of(paged.case, paged.inputs), implementation)


LATENT = {"b": 2, "sq": 1, "sk": 130, "hk": 1, "kv_lengths": (130, 17)}


@pytest.mark.parametrize(
    "case",
    [
        Case("latent", hq=4, d=48, dv=32, **LATENT),
        Case("few heads", hq=4, d=576, dv=512, dtype="bfloat16", **LATENT),
        Case("many heads", hq=70, d=576, dv=512, dtype="bfloat16", **LATENT),
    ],
    ids=lambda case: case.name,
)
def test_over_a_latent_pool(case, implementation):
    pages.require(implementation, case)
    assert_paged(pages.latent(case), implementation)


def test_a_float8_pool_counts_with_its_scale(implementation):
    case = Case("float8", b=2, sq=1, sk=130, kv_lengths=(130, 17), dtype="bfloat16")
    assert_paged(pages.paged(case, pool_dtype="float8_e4m3fn"), implementation)


def test_a_page_outside_the_pool_makes_its_sequence_nan(implementation):
    q, pool = jnp.ones((2, 3, 2, 8)), jnp.ones((4, 4, 2, 8))
    tables, lengths = jnp.array([[0, 99], [1, 2]], jnp.int32), jnp.array([8, 8], jnp.int32)
    _, largest = paged_attention(
        q, pool, pool, tables, lengths, return_max=True, implementation=implementation
    )
    assert np.isnan(largest[0]).all()
    assert np.isfinite(largest[1]).all()


# JAX.


def with_max(case: Case, implementation: str | None = None, **options: Any) -> Any:
    return attention(case, implementation, return_max=True, **options)


@pytest.mark.parametrize("case", [FIXED, VARLEN], ids=lambda case: case.layout)
def test_it_has_no_gradient_and_those_of_the_others_are_the_same(case, implementation):
    arrays = entries(case)[0]
    plain, asked = (
        jax.jit(with_gradients(f(case, implementation)))(arrays) for f in (attention, with_max)
    )  # fmt: skip
    if implementation == "xla":  # XLA fuses the two programs differently, which changes roundings
        assert_same(asked["gradients"], plain["gradients"])
    for name, x in plain["gradients"].items() if implementation != "xla" else ():
        assert np.asarray(x).tobytes() == np.asarray(asked["gradients"][name]).tobytes(), name
    moving, fixed = oracle.split(arrays)
    gradient = jax.grad(lambda x: with_max(case, implementation)(x | fixed)[2].sum())(moving)
    assert all((np.asarray(x) == 0).all() for x in gradient.values())
    _, tangents = jax.jvp(
        lambda x: with_max(case, implementation)(x | fixed), (moving,), (jax.tree.map(jnp.ones_like, moving),)
    )
    assert (np.asarray(tangents[2]) == 0).all()
    assert (np.asarray(tangents[0]) != 0).any()


@pytest.mark.parametrize("case", [FIXED, VARLEN], ids=lambda case: case.layout)
def test_vmap_is_a_loop(case, kernel):
    arrays = stack(entries(case))
    got = jax.jit(jax.vmap(with_max(case, kernel)))(arrays)
    one = jax.jit(with_max(case, kernel))
    assert_same(got, stack([one(row(arrays, i)) for i in range(3)]))


def test_it_costs_no_other_custom_call_and_nothing_where_it_is_not_asked_for(kernel):
    arrays = entries(FIXED)[0]
    text = [
        jax.jit(f(FIXED, kernel)).lower(arrays).compile().as_text() for f in (attention, with_max)
    ]  # fmt: skip
    assert [custom_calls(x) for x in text] == [{"forward": 1}] * 2
    lines = [next(line for line in x.splitlines() if '"jax_flash_forward"' in line) for x in text]
    count = f"f32[{FIXED.b},{FIXED.hq},{FIXED.sq}]"
    assert [line.split("custom-call(")[0].count(count) for line in lines] == [1, 2]


def test_it_is_exported(kernel):
    query = jnp.ones((2, 9, 4, 16))
    call = jax.jit(lambda q: flash_attention(q, q, q, causal=True, return_max=True, implementation=kernel))
    checks_ = [jax.export.DisabledSafetyCheck.custom_call("jax_flash_forward")]
    b, s = jax.export.symbolic_shape("b, s")
    shape = jax.ShapeDtypeStruct((b, s, 4, 16), query.dtype)
    program = jax.export.export(call, platforms=[kernel], disabled_checks=checks_)(shape)
    assert_same(jax.export.deserialize(program.serialize()).call(query), call(query))


@pytest.mark.parametrize("case", [meshes.GQA, meshes.EVERYTHING], ids=lambda case: case.name)
def test_batch_and_heads_need_no_collective(kernel, mesh, case):
    specs = meshes.qkv(meshes.BATCH_HEADS) | (meshes.OPTIONS if case is meshes.EVERYTHING else {})
    text, got = meshes.check_run(with_max(case, kernel), mesh, meshes.arrays_of(case), specs)
    assert not collectives(text)
    assert got[2].sharding.is_equivalent_to(NamedSharding(mesh, P("data", "model")), 2)


def test_heads_of_packed_sequences_need_no_collective(kernel, mesh):
    specs = meshes.qkv(P(None, "model"))
    arrays = meshes.arrays_of(meshes.PACKED)
    text, got = meshes.check_run(with_max(meshes.PACKED, kernel), mesh, arrays, specs)
    assert not collectives(text)
    assert got[2].sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)


@pytest.mark.parametrize(
    "case", [meshes.GQA.replace(sq=8, sk=8), meshes.PACKED.replace(causal=False)], ids=lambda case: case.name
)
def test_a_split_sequence_is_one(kernel, mesh, case):
    """XLA's own reduction joins the devices' parts, and the keys still travel in a ring."""
    spec_of = P(None, "model") if case.layout == "fixed" else P("model")
    arrays = meshes.arrays_of(case)
    text, _ = meshes.check_run(with_max(case, kernel), mesh, arrays, meshes.qkv(spec_of))
    assert "collective-permute" in collectives(text)


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("case", RINGS[::3], ids=lambda case: case.name)
def test_in_a_ring_it_is_that_of_all_devices(kernel, case, order):
    inputs = make_inputs(case)
    arrays = inputs.positional | inputs.keywords
    out, lse = jax.jit(in_ring(case, order, 4, implementation=kernel))(arrays)
    same_out, same_lse, largest = jax.jit(
        in_ring(case, order, 4, implementation=kernel, return_max=True)
    )(arrays)  # fmt: skip
    assert_same((same_out, same_lse), (out, lse))
    oracle.assert_max(np.asarray(largest), largest_of(case, inputs))


def test_plain_jax_runs_the_same_ring():
    inputs = make_inputs(case := RINGS[-1])
    run = jax.jit(in_ring(case, "zigzag", 2, implementation="xla", return_max=True))
    *_, largest = run(inputs.positional | inputs.keywords)
    oracle.assert_max(np.asarray(largest), largest_of(case, inputs))


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_all_to_all_has_that_of_all_heads(kernel, order):
    case = Case("gqa", b=2, sq=16, sk=16, hq=8, hk=4, d=8, dv=8, causal=True)
    inputs = make_inputs(case)
    run = jax.jit(by_heads(case, all_to_all_mesh(4), kernel, order, return_max=True))
    *_, largest = run(meshes.arrays_of(case))
    oracle.assert_max(np.asarray(largest), largest_of(case, inputs))


@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
def test_a_split_sequence_does_not_lose_nan(kernel, mode):
    """lax.pmax drops NaN on the CPU."""
    case = Case("gqa", b=2, sq=16, sk=16, hq=8, hk=4, d=8, dv=8, causal=True)
    arrays = meshes.arrays_of(case)
    arrays["query"] = arrays["query"].at[0, 13, 5].set(jnp.nan)
    if mode == "ring":
        run = in_ring(case, "contiguous", 4, implementation=kernel, return_max=True)
    else:
        run = by_heads(case, all_to_all_mesh(4), kernel, "contiguous", return_max=True)
    *_, largest = jax.jit(run)(arrays)
    assert np.argwhere(np.isnan(np.asarray(largest))).tolist() == [[0, 5]]


# The requested results.


def test_results_come_in_the_order_out_lse_max(implementation):
    q = jnp.ones((2, 5, 4, 16))
    call = lambda **options: flash_attention(q, q, q, implementation=implementation, **options)  # noqa: E731
    shapes = lambda x: [y.shape for y in jax.tree.leaves(x)]  # noqa: E731
    assert shapes(call()) == [q.shape]
    assert shapes(call(return_max=True)) == [q.shape, (2, 4)]
    assert shapes(call(return_lse=True, return_max=True)) == [q.shape, (2, 4, 5), (2, 4)]
    packed = jnp.ones((7, 4, 16))
    _, largest = flash_attention_varlen(
        packed, packed, packed, [0, 3, 3, 6], return_max=True, implementation=implementation
    )
    assert largest.shape == (3, 4)
    assert np.isneginf(largest[1]).all()


@pytest.mark.parametrize(
    "function", [flash_attention, flash_attention_varlen, paged_attention], ids=lambda f: f.__name__
)
def test_only_a_boolean_asks_for_it(function):
    x = jnp.ones((4, 4, 2, 8)) if function is not flash_attention_varlen else jnp.ones((4, 2, 8))
    others = {
        flash_attention: (), flash_attention_varlen: ([0, 4],), paged_attention: (jnp.zeros((4, 1), jnp.int32), 3)
    }[function]  # fmt: skip
    with pytest.raises(TypeError, match=f"{function.__name__}: return_max must be True or False, got 1"):
        function(x, x, x, *others, return_max=1)
