"""The CPU tangent pass, called directly: (tout, tlse) compared with the equations in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import equations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, FIXED, VARLEN, Case, Inputs, make_inputs, operands, poisoned, spec, used, varlen
from conftest import IMPLEMENTATION
from programs import assert_same_bits_on_one_thread_and_on_all
from test_forward_mode import assert_near, rounded_tangents

from jax_flash.operands import FORWARD, OPTIONAL, TANGENT
from jax_flash.primitives import bind

pytestmark = pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="promises of the CPU kernels")

MOVING = ("query", "key", "value", "bias")
Arrays = dict[str, Any]

# Several tiles of 64 queries and 256 keys, and bfloat16's own products, which take 128 keys at least.
LARGE = (
    Case("several tiles", b=1, sq=150, sk=700, d=40, dv=24),
    Case("several tiles, causal", b=1, sq=300, sk=300, causal=True, d=64, dv=64),
    Case("causal, keys first", b=1, sq=200, sk=530, causal=True, align="top_left", d=33, dv=65),
    Case("window", b=1, sq=300, sk=610, window=(70, 9), d=20, dv=20),
    Case("large head dims", b=1, sq=70, sk=270, d=256, dv=256, hq=2, hk=1),
    Case("many query heads of a KV head", b=1, sq=9, sk=200, hq=80, hk=1),
    Case("one query", b=2, sq=1, sk=300, hq=8, hk=2, causal=True),
    Case("more tiles than a run has", b=1, sq=1700, sk=140, hq=1, hk=1, d=8, dv=8, causal=True),
    Case(
        "odd everything",
        b=2,
        sq=67,
        sk=259,
        hq=6,
        hk=2,
        d=37,
        dv=19,
        q_lengths=(67, 30),
        kv_lengths=(131, 259),
    ),
    Case(
        "all options",
        b=1,
        sq=140,
        sk=330,
        causal=True,
        softcap=4.0,
        scale=-0.4,
        mask=(1, 4, 140, 330),
        bias=(1, 1, 140, 330),
        segments=2,
        alibi_slopes=(1, 4),
        sinks=True,
        dropout_rate=0.2,
    ),
    Case("softcap", b=1, sq=130, sk=260, softcap=2.0),
    Case("bias per key", b=2, sq=66, sk=290, bias=(1, 2, 1, 290), bias_dtype="float16", hq=2),
    Case("bias per row", b=2, sq=66, sk=290, bias=(2, 1, 66, 1)),
    Case("dropout", b=1, sq=130, sk=270, dropout_rate=0.5),
    Case("scale of 0", b=1, sq=20, sk=130, scale=0.0),
    varlen("packed", (200, 3, 0, 90), k_sequences=(310, 0, 5, 140), causal=True, padding=(5, 9), d=48, dv=32),
    varlen(
        "packed dropout", (150, 70), k_sequences=(310, 140), dropout_rate=0.3, sinks=True, kv_lengths=(300, 9)
    ),
)
NOTHING = (
    Case("no keys", sk=0),
    Case("no keys but sinks", sk=0, sinks=True),
    Case("no queries", sq=0),
    Case("no batch", b=0),
    varlen("no tokens", (0, 0)),
)


def tangents(case: Case, inputs: Inputs, seed: int = 1) -> Arrays:
    """Random tangents of the operands that may move, by the operands' names."""
    rng = np.random.default_rng(seed)
    made = operands(inputs)
    return {n: jnp.asarray(rng.standard_normal(made[n].shape), made[n].dtype) for n in MOVING if n in made}


def tangent(case: Case, arrays: Arrays, moving: Arrays, static: Any) -> list[jax.Array]:
    """tout and tlse of the custom call."""
    static = dataclasses.replace(static, implementation="cpu")
    out, lse = bind(FORWARD, static, arrays)
    arrays = arrays | {"out": out, "lse": lse} | {"t" + name: x for name, x in moving.items()}
    static = dataclasses.replace(static, operands=tuple(n for n in OPTIONAL if n in arrays))
    return bind(TANGENT, static, arrays)


def check(case: Case) -> None:
    inputs = make_inputs(case)
    moving, arrays, static = tangents(case, inputs), operands(inputs), spec(case, inputs)
    got, right = tangent(case, arrays, moving, static), equations.tangents(static, arrays, moving)
    assert_near(case, got, right, rounded_tangents(case, arrays, inputs, moving))


@pytest.mark.parametrize("case", FIXED + VARLEN, ids=lambda case: case.name)
def test_every_option(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_several_tiles(case: Case, dtype: str) -> None:
    check(case.replace(dtype=dtype))


@pytest.mark.parametrize("case", NOTHING, ids=lambda case: case.name)
def test_nothing_to_see(case: Case) -> None:
    inputs = make_inputs(case)
    for x in tangent(case, operands(inputs), tangents(case, inputs), spec(case, inputs)):
        assert not np.asarray(x).any()


POISONED = (
    Case(
        "lengths", b=3, sq=70, sk=300, q_lengths=(70, 0, 33), kv_lengths=(270, 300, 0), bias=(3, 1, 70, 300)
    ),
    Case("causal lengths", sq=70, sk=90, causal=True, q_lengths=(60, 33), kv_lengths=(41, 90), sinks=True),
    varlen("packed", (70, 0, 33), k_sequences=(150, 9, 60), padding=(7, 5), kv_lengths=(131, 3, 50)),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_nothing_past_a_length_is_read(case: Case, dtype: str) -> None:
    case = case.replace(dtype=dtype)
    inputs = make_inputs(case)
    moving, dirty = tangents(case, inputs), poisoned(case, inputs)
    poisoned_as = dataclasses.replace(inputs, positional=inputs.positional | moving)
    if "bias" in moving:
        poisoned_as = dataclasses.replace(poisoned_as, keywords=inputs.keywords | {"bias": moving["bias"]})
    spoiled = operands(poisoned(case, poisoned_as))
    static = spec(case, inputs)
    got = tangent(case, operands(dirty), {name: spoiled[name] for name in moving}, static)
    wanted = tangent(case, operands(inputs), moving, static)
    rows = used(case)[0]
    assert np.isnan(np.asarray(spoiled["query"], np.float32)).any() or rows.all()
    for x, y in zip(got, wanted):
        assert x.tobytes() == y.tobytes()
    assert not np.asarray(got[0])[~rows].any()
    assert not np.swapaxes(np.asarray(got[1]), -1, -2)[~rows].any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mask", "bias", "segments", "causal", "window"])
def test_a_hidden_key_contributes_nothing_whatever_it_and_its_tangent_are(
    how: str, dtype: str, bad: float
) -> None:
    b, sq, sk = 1, 70, 200
    hidden = np.zeros(sk, bool)
    hidden[[3, 64, 199]] = True
    case = Case("hidden keys", b=b, sq=sq, sk=sk, dtype=dtype, softcap=3.0 if how == "mask" else None)
    keywords: Arrays = {}
    if how == "mask":
        keywords["mask"] = jnp.asarray(~hidden)[None, None, None]
    elif how == "bias":
        keywords["bias"] = jnp.where(hidden, -jnp.inf, 0.5)[None, None, None].astype(jnp.float32)
    elif how == "segments":
        keywords["segment_ids"] = (jnp.zeros((b, sq), jnp.int32), jnp.asarray(hidden[None], jnp.int32))
    elif how == "causal":
        case, hidden = case.replace(causal=True, align="top_left"), np.arange(sk) >= sq
    else:
        case, hidden = case.replace(window=(3, 60)), np.arange(sk) < sk - sq - 3
    inputs = make_inputs(case)
    inputs = dataclasses.replace(inputs, keywords=inputs.keywords | keywords)
    static, arrays, moving = spec(case, inputs), operands(inputs), tangents(case, inputs)
    at = hidden[:, None, None]
    wanted = tangent(case, arrays, moving, static)
    dirty = arrays | {"key": jnp.where(at, bad, arrays["key"]).astype(dtype)}
    spoiled = moving | {"key": jnp.where(at, bad, moving["key"]).astype(dtype)}
    if how == "bias":
        spoiled["bias"] = jnp.where(hidden, bad, moving["bias"])
    for primal, tangents_ in ((dirty, moving), (arrays, spoiled), (dirty, spoiled)):
        for x, y in zip(tangent(case, primal, tangents_, static), wanted):
            assert np.asarray(y, np.float32).any()
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_see_nothing_are_not_read(dtype: str) -> None:
    case = Case("hidden rows", sq=150, sk=140, mask=(150, 1), dtype=dtype)
    inputs = make_inputs(case)
    hidden = ~np.asarray(inputs.keywords["mask"])[:, 0]
    static, arrays, moving = spec(case, inputs), operands(inputs), tangents(case, inputs)
    wanted = tangent(case, arrays, moving, static)
    spoil = lambda x: jnp.where(hidden[:, None, None], jnp.nan, x).astype(dtype)  # noqa: E731
    got = tangent(
        case, arrays | {"query": spoil(arrays["query"])}, moving | {"query": spoil(moving["query"])}, static
    )
    for x, y in zip(got, wanted):
        assert x.tobytes() == y.tobytes()
    assert not np.asarray(got[0])[:, hidden].any()


def test_leading_dimensions_go_by_strides() -> None:
    """Some operands are mapped and others not, and many tangents share one primal, as in jacfwd."""
    case = Case("mapped", sq=20, sk=150, bias=(2, 1, 20, 150), causal=True)
    inputs = make_inputs(case)
    static, arrays = spec(case, inputs), operands(inputs)
    many = [tangents(case, inputs, seed) for seed in range(3)]
    stacked = {name: jnp.stack([x[name] for x in many]) for name in many[0]}
    wanted = [tangent(case, arrays, moving, static) for moving in many]
    got = jax.vmap(lambda moving: tangent(case, arrays, moving, static))(stacked)
    for i, x in enumerate(wanted):
        for one, all_ in zip(x, got):
            assert np.asarray(all_)[i].tobytes() == one.tobytes()
    query = jnp.stack([arrays["query"], 2 * arrays["query"]])
    both = jax.vmap(
        jax.vmap(lambda q, moving: tangent(case, arrays | {"query": q}, moving, static), (None, 0)), (0, None)
    )(query, stacked)
    last = tangent(case, arrays | {"query": query[1]}, many[2], static)
    for one, all_ in zip(last, both):
        assert np.asarray(all_)[1, 2].tobytes() == one.tobytes()


def test_a_tangent_of_the_bias_needs_the_tangent_pass_and_a_bias() -> None:
    case = Case("bias", bias=(2, 4, 12, 12))
    inputs = make_inputs(case)
    arrays = operands(inputs) | {"tbias": operands(inputs)["bias"]}
    static = dataclasses.replace(spec(case, inputs), operands=("bias", "tbias"), implementation="cpu")
    with pytest.raises(jax.errors.JaxRuntimeError, match="tbias is for the tangent pass, beside bias"):
        jax.block_until_ready(bind(FORWARD, static, arrays))


PROGRAM = """
from jax_flash.operands import FORWARD, TANGENT
from jax_flash.primitives import bind
from jax_flash.spec import AttentionSpec
keys = jax.random.split(jax.random.key(0), 6)
for heads, kv_heads in ((1, 1), (6, 2)):
    for dtype in ("float32", "bfloat16"):
        sizes = [(1, 700, heads if i < 2 else kv_heads, 40) for i in range(6)]
        q, tq, k, v, tk, tv = (jax.random.normal(*each, jnp.dtype(dtype)) for each in zip(keys, sizes))
        for options in ({}, {"right": 0}, {"left": 100, "right": 30}):
            spec = AttentionSpec("fixed", scale=0.2, implementation="cpu", **options)
            arrays = {"query": q, "key": k, "value": v, "tquery": tq, "tkey": tk, "tvalue": tv}
            arrays["out"], arrays["lse"] = bind(FORWARD, spec, arrays)
            tout, tlse = bind(TANGENT, spec, arrays)
            case = f"{heads} heads, {kv_heads} KV heads, {dtype}, {', '.join(options) or 'plain'}"
            keep(case, tout=tout, tlse=tlse)
"""


def test_tangents_are_the_same_bits_on_one_thread_and_on_all() -> None:
    assert_same_bits_on_one_thread_and_on_all(PROGRAM)
