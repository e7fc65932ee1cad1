"""Hidden keys never reach a row, whatever K and V hold: NaN and infinities in them change no bit of the row's results.
NaN and infinities in visible keys do reach it.

Each case runs twice, with zeros and with poison in a few keys. Every row sees some, all or none of these keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import checks
import equations
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pages
import pytest
from cases import Case, Inputs, make_inputs, operands, spec, varlen
from programs import attention

POISONED = (3, 11, 29)  # keys of each batch entry, or of all packed tokens
POISONS = {"NaN": np.nan, "inf": np.inf}

CASES = (
    Case("causal", causal=True, sq=33, sk=33),
    Case("causal top left", causal=True, align="top_left", sq=40, sk=33, sinks=True),
    Case("window", window=(4, 2), sq=33, sk=33),
    Case("window of few rows", window=(2, 0), sq=2, sk=33),
    Case("mask", mask=(2, 4, 20, 33), sq=20, sk=33),
    Case("mask of keys", mask=(2, 1, 1, 33), sk=33),
    Case("bias", bias=(2, 4, 20, 33), sq=20, sk=33),
    Case("bias of keys", bias=(1, 1, 1, 33), sk=33),
    Case("segments", segments=6, sq=20, sk=33),
    Case("lengths", kv_lengths=(12, 29), q_lengths=(20, 5), sq=20, sk=33),
    Case("alibi", alibi_slopes=(4,), causal=True, sq=33, sk=33),
    Case("softcap", softcap=2.0, causal=True, sq=33, sk=33),
    Case("softcap and mask", softcap=2.0, mask=(1, 1, 20, 33), sq=20, sk=33),
    Case("dropout", dropout_rate=0.3, causal=True, sq=33, sk=33),
    Case("dropout and mask", dropout_rate=0.3, mask=(2, 4, 20, 33), sq=20, sk=33),
    varlen("packed", (9, 5, 0, 14), k_sequences=(12, 12, 2, 7)),
    varlen("packed causal", (12, 19), k_sequences=(12, 21), causal=True),
)
# With as many keys as the CPU's products of bfloat16 pairs take, and in several tiles.
HALF = tuple(
    Case(f"{name}, 16-bit", b=1, hq=2, hk=1, sq=600, sk=600, dtype="bfloat16", **options)  # type: ignore[arg-type]
    for name, options in (
        ("causal", {"causal": True}),
        ("window", {"window": (40, 3)}),
        ("mask", {"mask": (1, 2, 600, 600)}),
        ("bias", {"bias": (1, 2, 600, 600), "bias_dtype": "bfloat16", "d": 64, "dv": 64}),
        ("bias, d 128", {"bias": (1, 1, 600, 600), "bias_dtype": "bfloat16", "d": 128, "dv": 128}),
        ("float32 bias", {"bias": (1, 2, 600, 600), "d": 64, "dv": 64}),
        ("float32 bias of keys, d 128", {"bias": (1, 1, 1, 600), "d": 128, "dv": 128}),
        ("segments", {"segments": 9}),
    )
)


def hiding(case: Case) -> Inputs:
    """The inputs of a case, with −inf in a third of a bias. A bias or mask of one row hides all poisoned keys."""
    inputs = make_inputs(case)
    keywords = dict(inputs.keywords)
    for name in {"mask", "bias"} & set(keywords):
        x = keywords[name]
        hidden = x < -0.4 if name == "bias" else ~x
        if x.shape[-2] == 1:
            hidden = hidden.at[..., np.array(POISONED)].set(True)
        keywords[name] = jnp.where(hidden, jnp.asarray(-np.inf if name == "bias" else False, x.dtype), x)
    return dataclasses.replace(inputs, keywords=keywords)


def poisoned(inputs: Inputs, name: str, value: float) -> Inputs:
    """The inputs with this value in the poisoned keys of this operand."""
    x = inputs.positional[name].at[..., np.array(POISONED), :, :].set(value)
    return checks.with_arrays(inputs, **{name: x})


@dataclass(frozen=True)
class Reached:
    """What poison may reach: rows that see a poisoned key, and keys that such a row sees. `unseen`: keys of no row."""

    rows: np.ndarray  # [b, sq, hq], or packed [tq, hq]
    keys: np.ndarray  # [b, sk, hk], or packed [tk, hk]
    unseen: np.ndarray  # same shape as keys


def reached(case: Case, inputs: Inputs) -> Reached:
    x = {name: np.asarray(array) for name, array in operands(inputs).items()}
    rows = np.zeros((*x["query"].shape[:-1], 1), bool)
    keys = np.zeros((*x["key"].shape[:-1], 1), bool)
    unseen, odd = np.ones_like(keys), np.zeros_like(keys)
    odd[..., list(POISONED), :, :] = True
    static = spec(case, inputs)
    for group in equations.groups(static, x):
        seen = equations.visible(static, x, group)
        hit = (seen & group.of_keys(odd)[:, 0]).any(1)
        group.set_queries(rows, hit[:, None])
        group.of_keys(keys)[:, 0] = (seen & hit[:, None]).any(0)
        group.of_keys(unseen)[:, 0] = ~seen.any(0)
    return Reached(rows[..., 0], keys[..., 0], unseen[..., 0])


def by_row(case: Case, lse: np.ndarray) -> np.ndarray:
    return np.swapaxes(lse, -1, -2)


def assert_untouched(got: oracle.Result, clean: oracle.Result, may_reach: Reached, case: Case) -> None:
    """Everything that no poisoned key may reach has the same bits, and keys that no row sees have zero gradients."""
    rows, keys = ~may_reach.rows, ~may_reach.keys
    places = {
        "out": (got.out, clean.out, rows),
        "lse": (by_row(case, got.lse), by_row(case, clean.lse), rows),
    }
    for name, where in (("query", rows), ("key", keys), ("value", keys)):
        if name in got.gradients:
            places["d" + name] = (got.gradients[name], clean.gradients[name], where)
    for name, (x, y, where) in places.items():
        other = np.argwhere(where & (x != y).reshape(*where.shape, -1).any(-1))
        assert not len(other), f"{name} is reached at {other[:4].tolist()} and {max(0, len(other) - 4)} more"
    for name in {"key", "value"} & set(got.gradients):
        assert (got.gradients[name][may_reach.unseen] == 0).all(), f"d{name} of a hidden key is not 0"


def check(case: Case, implementation: str, name: str, poison: float) -> None:
    skip_what_shares_a_tile(implementation, name)
    inputs = hiding(case)
    clean = checks.run(case, poisoned(inputs, name, 0), implementation)
    got = checks.run(case, poisoned(inputs, name, poison), implementation)
    if implementation == "cuda":
        got.gradients.clear()
    may_reach = reached(case, inputs)
    assert_untouched(got, clean, may_reach, case)
    assert not may_reach.rows.all()
    if name == "value" or np.isnan(poison):  # an infinite key may have a score of −inf
        assert not np.isfinite(got.out[may_reach.rows].astype(np.float32)).any(), (
            "a visible key's NaN is lost"
        )


def skip_what_shares_a_tile(implementation: str, name: str = "value") -> None:
    """CUDA kernels multiply hidden values of a tile by zeros, so those must be finite (docs/numerics.md)."""
    if implementation == "cuda" and name == "value":
        pytest.skip("values that share a tile with what a row sees have to be finite")


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["value", "key"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hidden_key_reaches_no_row(case, name, poison, implementation):
    check(case.replace(dtype=checks.usual_dtype(implementation)), implementation, name, POISONS[poison])


@pytest.mark.parametrize("name", ["value", "key"])
@pytest.mark.parametrize("case", HALF, ids=lambda case: case.name)
def test_a_hidden_key_reaches_no_row_in_16_bit(case, name, implementation):
    check(case, implementation, name, np.nan)


# In forward mode.


@cache
def tangent_program(case: Case, implementation: str) -> Any:
    """(primals, tangents, all arrays) → the results and their tangents, compiled once for whatever the arrays hold."""
    call = attention(case, implementation)
    return jax.jit(
        lambda primals, tangents, arrays: jax.jvp(lambda x: call(arrays | x), (primals,), (tangents,))
    )


@pytest.mark.parametrize("name", ["value", "key"])
@pytest.mark.parametrize("case", [*CASES, HALF[0], HALF[2]], ids=lambda case: case.name)
def test_a_hidden_key_reaches_no_tangent(case, name, implementation):
    skip_what_shares_a_tile(implementation)
    inputs = hiding(case)
    moving, _ = oracle.split(inputs.positional)
    rng = np.random.default_rng(7)
    tangents = {n: jnp.asarray(rng.standard_normal(x.shape), x.dtype) for n, x in moving.items()}

    def run(value: float) -> Any:
        """Plain JAX needs finite tangents of hidden values, because P·tV is linear in them."""
        of_tangent = 0.0 if (implementation, name) == ("xla", "value") else value
        given, moved = (
            {
                n: poisoned(
                    dataclasses.replace(inputs, positional=inputs.positional | x), name, y
                ).positional[n]
                for n in moving
            }
            for x, y in ((moving, value), (tangents, of_tangent))
        )
        return tangent_program(case, implementation)(given, moved, inputs.positional | inputs.keywords)

    (_, clean), (_, got) = run(0.0), run(np.nan)
    assert_untouched(
        oracle.Result(*map(np.asarray, got)),
        oracle.Result(*map(np.asarray, clean)),
        reached(case, inputs),
        case,
    )


# Over pages: prefill, a few new tokens, and one token in a window.


@dataclass(frozen=True)
class OverPages:
    case: Case
    pool: str | None = None
    by_page: bool = False
    latent: bool = False


PAGED = (
    OverPages(varlen("causal prefill", (33, 9), k_sequences=(33, 31), causal=True)),
    OverPages(
        varlen("causal prefill, 16-bit", (333, 9), k_sequences=(333, 31), causal=True, dtype="bfloat16")
    ),
    OverPages(Case("new tokens", sq=30, sk=33, causal=True, hq=4)),
    OverPages(Case("new tokens, decode", sq=6, sk=33, causal=True, window=(18, 0))),
    OverPages(Case("new tokens, decode in 16-bit", sq=6, sk=200, window=(170, 0), dtype="bfloat16")),
    OverPages(Case("decode in a window", sq=1, sk=33, window=(10, 0), b=3, kv_lengths=(33, 29, 12))),
    OverPages(Case("draft mask", sq=24, sk=33, draft_mask=(2, 24, 24))),
    OverPages(Case("draft mask, decode", sq=5, sk=30, draft_mask=(2, 5, 5), hq=2)),
    OverPages(Case("alibi", sq=33, sk=33, alibi_slopes=(4,), causal=True)),
    OverPages(Case("float8", sq=6, sk=33, causal=True, window=(18, 0), dtype="bfloat16"), "float8_e4m3fn"),
    OverPages(Case("float8, page scales", sq=6, sk=33, causal=True, window=(18, 0)), "float8_e4m3fn", True),
    OverPages(Case("float8, prefill", sq=30, sk=33, causal=True, hq=4), "float8_e4m3fn", True),
    OverPages(Case("latent", sq=3, sk=33, hq=4, hk=1, d=64, dv=32, causal=True, window=(19, 0)), latent=True),
)


def paged_call(over: OverPages, size: int = 8) -> pages.Paged:
    if over.latent:
        return pages.latent(over.case, size)
    return pages.paged(over.case, size, pool_dtype=over.pool, by_page=over.by_page)


@pytest.mark.parametrize("name", ["value", "key"])
@pytest.mark.parametrize("over", PAGED, ids=lambda over: over.case.name)
def test_a_hidden_key_on_a_page_reaches_no_row(over, name, implementation):
    if over.latent and name == "value":
        pytest.skip("V is within K")
    # The kernel for a single token copies nothing outside its window.
    if over.case.sq > 1 or over.case.layout == "varlen":
        skip_what_shares_a_tile(implementation, "value" if over.latent else name)
    call = paged_call(over)
    pages.require(implementation, over.case)
    lengths, size = call.pages.lengths, call.pages.size
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    fixed = over.case.layout == "fixed"
    pool = np.array(call.arrays[name].astype(jnp.float32))
    pool = np.nan_to_num(pool)
    dirty = pool.copy()
    for z, length in enumerate(lengths):
        for j in range(length):
            if (j if fixed else starts[z] + j) in POISONED:
                pool[call.pages.tables[z, j // size], j % size] = 0
                dirty[call.pages.tables[z, j // size], j % size] = np.nan
    run = call.call(implementation)
    clean, got = (
        oracle.Result(*map(np.asarray, run({name: jnp.asarray(x, call.arrays[name].dtype)})))
        for x in (pool, dirty)
    )
    may_reach = reached(over.case, call.inputs)
    assert_untouched(got, clean, may_reach, over.case)
    assert np.isnan(got.out[may_reach.rows].astype(np.float32)).all()


def test_a_hidden_pages_scale_reaches_no_row(implementation):
    """NaN is the scale of the last page, which has one key; only the last of six new tokens sees it."""
    skip_what_shares_a_tile(implementation)
    case = Case("scales", sq=6, sk=33, causal=True, dtype="bfloat16", d=64, dv=64)
    call = pages.paged(case, 8, pool_dtype="float8_e4m3fn", by_page=True)
    last = call.pages.tables[:, 4]
    scales = {name: call.arrays[name] for name in ("k_scale", "v_scale")}
    (clean, _), (got, _) = (
        call.call(implementation)({name: x.at[last].set(value) for name, x in scales.items()})
        for value in (1.0, np.nan)
    )
    np.testing.assert_array_equal(got[:, :-1], clean[:, :-1])
    assert np.isnan(got[:, -1].astype(np.float32)).all()


# What holds on CUDA too.


FAR = (
    Case("causal", causal=True, b=1, sq=1100, sk=1100, dtype="bfloat16", d=64, dv=64),
    Case("window", window=(100, 0), b=1, sq=1100, sk=1100, dtype="bfloat16", d=64, dv=64),
)


@pytest.mark.parametrize("name", ["value", "key"])
@pytest.mark.parametrize("case", FAR, ids=lambda case: case.name)
def test_a_key_outside_every_tile_that_a_row_is_in_reaches_it_nowhere(case, name, kernel):
    """Rows lie 512 and more before the poisoned keys, or so far behind that these are outside the window."""
    checks.require(kernel, dtype=case.dtype, d=case.d, dv=case.dv)
    inputs = make_inputs(case)
    clean, got = (
        checks.run(
            case,
            checks.with_arrays(inputs, **{name: inputs.positional[name].at[:, 530:536].set(value)}),
            kernel,
            deterministic=True,
        )
        for value in (0, np.nan)
    )
    row = np.arange(case.sq)
    far = (row < 256) | (row > 1080) & (case.window is not None)
    for x, y in ((clean.out, got.out), (clean.gradients["query"], got.gradients["query"])):
        np.testing.assert_array_equal(x[:, far], y[:, far])


@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("d", [64, 128])
def test_a_hidden_keys_nan_reaches_no_gradient_of_the_bias(d, bias_dtype, implementation):
    case = Case("bias", b=2, hq=2, hk=1, sq=130, sk=264, d=d, dv=d, bias=(1, 2, 130, 264), dtype="bfloat16")
    case = case.replace(bias_dtype=bias_dtype)
    inputs = hiding(case)
    bias = inputs.keywords["bias"].at[..., np.array(POISONED)].set(-np.inf)
    inputs = dataclasses.replace(inputs, keywords={**inputs.keywords, "bias": bias})
    clean, got = (
        checks.run(case, poisoned(inputs, "key", value), implementation).gradients["bias"]
        for value in (0, np.nan)
    )
    assert np.array_equal(got, clean)
