"""Forward mode: the tangents of out and lse, against float64 row by row, on every implementation."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import checks
import equations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pages
import pytest
from cases import BY_NAME, Case, Inputs, make_inputs, operands, poisoned, spec, varlen
from conftest import IMPLEMENTATION, IMPLEMENTATIONS
from pages import FLOAT8, paged
from test_paged import CHUNK, MIXED

from jax_flash import flash_attention

Arrays = dict[str, Any]

NAMES = (
    "one KV head",
    "dv differs",
    "odd head dims",
    "V is K, every option",
    "head dims 320 and 507",
    "ragged tiles",
    "causal, more queries",
    "causal window top left",
    "window that misses",
    "boolean mask",
    "segments",
    "causal lengths",
    "lengths out of range",
    "softcap",
    "bias of keys",
    "bias per head",
    "bias first",
    "bias of rows, first",
    "everything, bias first",
    "alibi",
    "sinks and lengths",
    "sinks by token",
    "dropout, causal",
    "everything",
    "packed, empty sequences",
    "packed, padding",
    "packed, head dim 512",
    "packed, V is K",
    "packed causal, other keys",
    "packed kv_lengths",
    "packed sinks",
    "packed sinks by token",
    "packed dropout",
    "packed everything",
)
IN_PLAIN_JAX = (
    "one KV head",
    "window that misses",
    "softcap",
    "everything",
    "everything, bias first",
    "packed everything",
    "bias of rows and sinks",
    "no keys",
)
CASES = (
    *(BY_NAME[name] for name in NAMES),
    BY_NAME["bias per head"].replace(name="bias of rows and sinks", sinks=True, causal=True),
    Case("no keys", sk=0, sinks=True),
    Case("no queries", sq=0),
    Case("several tiles", b=1, sq=150, sk=170, d=64, dv=64, causal=True, softcap=3.0),
    Case("wide heads", b=1, sq=20, sk=40, d=264, dv=512, causal=True),
    varlen("packed, several tiles", (70, 90), k_sequences=(100, 80), causal=True, d=32, dv=64),
)
HALF = tuple(
    BY_NAME[name].replace(name=f"{name}, {dtype}", dtype=dtype)
    for name, dtype in (
        ("ragged tiles", "bfloat16"),
        ("ragged tiles", "float16"),
        ("everything", "bfloat16"),
        ("packed everything", "float16"),
    )
)


def by_name(cases: tuple[Case, ...]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def tangents_of(arrays: Arrays, seed: int = 1) -> Arrays:
    """Random tangents of the moving operands."""
    rng = np.random.default_rng(seed)
    moving, _ = oracle.split(arrays)
    return {name: jnp.asarray(rng.standard_normal(x.shape), x.dtype) for name, x in moving.items()}


def check(
    case: Case, implementation: str, given: Inputs | None = None, tangents: Arrays | None = None
) -> None:
    """jax.jvp of the public call at the contract's tolerance for gradients."""
    checks.require(implementation, "forward", "tangent", dtype=case.dtype, d=case.d, dv=case.dv)
    inputs = make_inputs(case)
    arrays = operands(inputs)
    clean = tangents_of(arrays)
    if case.shared_kv:
        clean["value"] = clean["key"]
    call = checks.function(case, given or inputs, implementation)
    moving, _ = oracle.split((given or inputs).positional | (given or inputs).keywords)
    tangents = {n: (tangents or clean)[n].reshape(x.shape) for n, x in moving.items()}
    both = jax.jit(lambda *x: jax.jvp(call, x[:1], x[1:]))
    results, got = (both if implementation == "xla" else both.__wrapped__)(moving, tangents)
    right = equations.tangents(spec(case, inputs), arrays, clean)
    assert_near(case, got, right, rounded_tangents(case, arrays, inputs, clean))
    if implementation == IMPLEMENTATION:
        for x, y in zip(results, call(moving)):
            np.testing.assert_array_equal(x, y)


def rounded_tangents(case: Case, arrays: Arrays, inputs: Inputs, moved: Arrays) -> Any:
    """The tangents with S and P, and thus their tangents, rounded to 16 bits; None for float32."""
    if case.dtype == "float32":
        return None
    dtype = jnp.dtype(case.dtype)
    tout, tlse = equations.tangents(spec(case, inputs), arrays, moved, dtype=np.float32, round_to=dtype)
    return tout.astype(dtype), tlse


def assert_near(case: Case, got: Any, right: Any, low: Any) -> None:
    for name, x, y, z in zip(("out", "lse"), got, right, low or right):
        half = case.dtype != "float32"
        oracle.assert_gradient(name, np.asarray(x), np.asarray(y), np.asarray(z), half=half)


@by_name(CASES)
def test_tangents_of_every_option(case):
    check(case, IMPLEMENTATION)


@by_name(tuple(case for case in CASES if case.name in IN_PLAIN_JAX))
def test_tangents_in_plain_jax(case):
    check(case, "xla")


@by_name(HALF)
def test_tangents_in_16_bit(case):
    check(case, IMPLEMENTATION)


@by_name(tuple(BY_NAME[name] for name in ("everything", "packed everything", "causal lengths")))
def test_nan_in_what_is_never_read_reaches_no_tangent(case, implementation):
    inputs = make_inputs(case)
    clean = tangents_of(operands(inputs))
    names = ("query", "key", "value", "bias")
    as_inputs = Inputs(
        inputs.positional | {n: clean[n] for n in names[:3]},
        inputs.keywords | {n: clean[n] for n in names[3:] if n in clean},
        inputs.dout,
        inputs.dlse,
    )
    dirty = poisoned(case, as_inputs)
    tangents = clean | {n: (dirty.positional | dirty.keywords)[n] for n in names if n in clean}
    check(case, implementation, poisoned(case, inputs), tangents)


@pytest.mark.parametrize("hidden", ["mask", "bias"])
def test_a_hidden_key_adds_nothing_whatever_it_and_its_tangent_hold(hidden, kernel):
    """A key that one head hides may be infinite or NaN there, although another head reads its finite neighbours."""
    checks.require(kernel, "tangent")
    case = Case("hidden", b=1, sq=5, sk=7, hq=2, hk=2, **{hidden: (1, 1, 5, 7)})
    inputs = make_inputs(case)
    seen = np.arange(7) % 3 != 1
    array = jnp.asarray(np.broadcast_to(seen, (1, 1, 5, 7)))
    array = array if hidden == "mask" else jnp.where(array, inputs.keywords["bias"], -jnp.inf)
    moving, _ = oracle.split(inputs.positional)
    tangents = tangents_of(moving)

    def run(arrays: Arrays, tangents: Arrays) -> Any:
        given = dataclasses.replace(inputs, keywords={hidden: array})
        call = checks.function(case, given, kernel)
        fixed = {} if hidden == "mask" else {"bias": array}
        return jax.jvp(lambda moving: call(moving | fixed), (arrays,), (tangents,))[1]

    def spoil(x: Arrays, value: float) -> Arrays:
        return x | {"key": jnp.where(seen[:, None, None], x["key"], value)}

    wanted = run(moving, tangents)
    for value in (np.nan, np.inf):
        got = run(spoil(moving, 1e30), spoil(tangents, value))
        for x, y in zip(got, wanted):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bias_of_minus_infinity_for_a_whole_row_has_no_tangent_beside_sinks(value, implementation):
    """A bias of one column hides whole rows. Only the sink is left in their softmax, so lse stays equal to the sink."""
    case = Case("hidden rows", b=2, sq=5, sk=7, hq=2, hk=1, bias=(2, 2, 5, 1), sinks=True)
    checks.require(implementation, "tangent")
    inputs = make_inputs(case)
    hidden = np.random.default_rng(0).random((2, 2, 5, 1)) < 0.4
    inputs.keywords["bias"] = jnp.where(hidden, -jnp.inf, inputs.keywords["bias"])
    clean = tangents_of(operands(inputs))
    clean["bias"] = jnp.where(hidden, 0, clean["bias"])
    spoilt = clean | {"bias": jnp.where(hidden, value, clean["bias"])}
    call = checks.function(case, inputs, implementation)
    moving, _ = oracle.split(inputs.positional | inputs.keywords)

    def run(tangents: Arrays) -> Any:
        return jax.jvp(call, (moving,), ({n: tangents[n].reshape(x.shape) for n, x in moving.items()},))[1]

    right = equations.tangents(spec(case, inputs), operands(inputs), clean)
    assert_near(case, run(clean), right, None)
    assert_near(case, run(spoilt), right, None)


# Pages.


PAGED = (
    (CHUNK.replace(causal=True, sinks=True, hq=16, hk=2), "nhd"),
    (MIXED.replace(causal=True, softcap=2.0, sinks="token"), "hnd"),
    (MIXED.replace(name="window", window=(3, 2), alibi_slopes=(5, 4)), "nhd"),
    (MIXED.replace(causal=True, dtype="bfloat16"), "hnd"),
)


def paged_tangents(call: pages.Paged, implementation: str, names: tuple[str, ...]) -> tuple[Any, Arrays]:
    """The call's tangents, and those of the dense case, for random tangents of some operands."""
    case = call.case
    dense = tangents_of(call.inputs.positional | call.inputs.keywords)
    dense = {name: x if name in names else jnp.zeros_like(x) for name, x in dense.items()}
    moved = {n: dense[n] for n in names if n in ("query", "sinks")}
    for name in set(names) & {"key", "value"}:
        rows = pages.rows_of(case, np.asarray(dense[name], np.float32))
        moved[name] = call.pages.pool(rows, call.arrays[name].dtype)
    at = {name: call.arrays[name] for name in moved}
    both = jax.jit(lambda *x: jax.jvp(call.call(implementation), x[:1], x[1:]))
    return both(at, moved)[1], dense


@pytest.mark.parametrize(("case", "layout"), PAGED, ids=lambda x: x.name if isinstance(x, Case) else x)
def test_tangents_through_pages(case, layout, implementation):
    pages.require(implementation, case)
    call = paged(case, 5, layout)
    names = tuple(n for n in oracle.DIFFERENTIABLE if n in call.arrays)
    got, dense = paged_tangents(call, implementation, names)
    arrays = operands(call.inputs)
    right = equations.tangents(spec(case, call.inputs), arrays, dense)
    assert_near(case, got, right, rounded_tangents(case, arrays, call.inputs, dense))


@pytest.mark.parametrize("float8", FLOAT8)
def test_float8_pools_are_constants_and_the_query_has_a_tangent(implementation, float8):
    case = CHUNK.replace(causal=True)
    pages.require(implementation, case)
    call = paged(case, 4, "nhd", float8)
    got, dense = paged_tangents(call, implementation, ("query",))
    right = equations.tangents(spec(case, call.inputs), operands(call.inputs), dense)
    assert_near(case, got, right, None)


def test_rows_that_miss_a_page_have_nan_tangents_and_others_their_own(implementation):
    call = paged(Case("missing", b=2, sq=2, sk=8, kv_lengths=(8, 6), sinks=True), 4)
    pages.require(implementation)
    bad = dataclasses.replace(
        call, arrays=call.arrays | {"block_tables": call.arrays["block_tables"].at[0, 1].set(-5)}
    )
    names = ("query", "key", "value", "sinks")
    got, wanted = (paged_tangents(c, implementation, names)[0] for c in (bad, call))
    for x, y in zip(got, wanted):
        assert np.isnan(x[0]).all()
        np.testing.assert_allclose(x[1], y[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", ["b", "s"])
def test_a_mapped_call_without_queries(implementation: str, empty: str) -> None:
    """JAX 0.12 maps the product of no elements, a custom_jvp, to a wrong shape."""
    query = jnp.zeros((3, 0, 1, 2, 8) if empty == "b" else (3, 1, 0, 2, 8))
    key = jnp.zeros((3, 0 if empty == "b" else 1, 4, 2, 8))
    call = jax.vmap(partial(flash_attention, implementation=implementation))
    out, tangent = jax.jvp(call, (query, key, key), (query, key, key))
    assert out.shape == tangent.shape == query.shape
