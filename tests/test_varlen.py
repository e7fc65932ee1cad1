"""flash_attention_varlen: every option, dtype and pass against the oracle, and against fixed attention."""

import checks
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, VARLEN, VARLEN_TILES, Case, cu_seqlens, make_inputs, varlen
from conftest import IMPLEMENTATION
from pairwise import pairwise
from test_attention import by_name, dtypes

import jax_flash


@dtypes
@by_name(VARLEN)
def test_each_option_forward_and_backward(case, dtype):
    if case.sinks and not case.alibi_slopes:
        case = case.replace(hq=16)  # see test_attention.py
    checks.check(case.replace(dtype=dtype), IMPLEMENTATION)


@by_name(VARLEN[::3])
def test_each_option_in_plain_jax(case):
    checks.check(case.replace(dtype="bfloat16"), "xla")


@by_name(checks.in_some_dtypes(VARLEN_TILES, IMPLEMENTATION))
def test_sizes_that_choose_each_tile(case):
    checks.check(case, IMPLEMENTATION)


# All options together, two by two.

OPTIONS = {
    "sequences": [
        dict(q_sequences=(5, 9, 0, 6)),
        dict(q_sequences=(5, 9, 0, 6), k_sequences=(12, 3, 4, 0), padding=(2, 3)),
        dict(q_sequences=(40, 3, 1, 2), k_sequences=(9, 30, 1, 2), padding=(0, 5)),
        dict(q_sequences=(3, 1, 1, 11), k_sequences=(70, 1, 0, 33)),
    ],
    "heads": [dict(hq=8, hk=2), dict(hq=6, hk=1), dict(hq=6, hk=6)],
    "head_dims": [dict(d=16, dv=16), dict(d=40, dv=20), dict(d=7, dv=100)],
    "dtype": list(DTYPES),
    "causal": [False, True],
    "window": [None, (3, 2), (5, None), (None, 4)],
    "align": ["bottom_right", "top_left"],
    "scale": [None, -0.4],
    "softcap": [None, 3.0],
    "kv_lengths": [None, (0, 4, 2, 99), (7, -5, 1, 20)],
    "alibi_slopes": [None, "hq", "n hq"],
    "sinks": [False, True],
    "dropout_rate": [0.0, 0.4],
}


def combination(number, row):
    row = dict(row)
    shapes = row.pop("sequences") | row.pop("heads") | row.pop("head_dims")
    slopes = {None: None, "hq": (shapes["hq"],), "n hq": (4, shapes["hq"])}[row.pop("alibi_slopes")]
    return varlen(f"combination {number}", **shapes, **row, alibi_slopes=slopes)


COMBINATIONS = [combination(*row) for row in enumerate(pairwise(OPTIONS))]


@by_name(COMBINATIONS)
def test_options_two_by_two(case):
    checks.check(case, IMPLEMENTATION)


@by_name(COMBINATIONS[::6])
def test_options_two_by_two_in_plain_jax(case):
    checks.check(case, "xla")


# What packing means.


def near(dtype):
    """The tolerance within which two orders of the same sums agree in a dtype."""
    return dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=2e-2, atol=2e-2)


def wide(x):
    return np.asarray(x, np.float32)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_each_sequence_is_attended_alone(align, implementation):
    case = varlen("alone", (5, 0, 9, 3), k_sequences=(7, 4, 9, 0), causal=True, window=(4, 0), align=align)
    case = case.replace(dtype=checks.usual_dtype(implementation))
    inputs = make_inputs(case)
    together = checks.run(case, inputs, implementation)
    q, k, v = (inputs.positional[name] for name in ("query", "key", "value"))
    row = column = 0
    for nq, nk in zip(case.q_sequences, case.k_sequences, strict=True):
        out, lse = jax_flash.flash_attention(
            q[None, row : row + nq], k[None, column : column + nk], v[None, column : column + nk],
            **case.options, implementation=implementation, return_lse=True,
        )  # fmt: skip
        np.testing.assert_allclose(wide(together.out[row : row + nq]), wide(out[0]), **near(case.dtype))
        np.testing.assert_allclose(together.lse[:, row : row + nq], lse[0], rtol=1e-5, atol=1e-5)
        row, column = row + nq, column + nk


def test_one_sequence_is_a_batch_of_one(implementation):
    options = dict(causal=True, softcap=3.0, alibi_slopes=(4,), sinks=True, dropout_rate=0.3)
    case = varlen("one", (37,), k_sequences=(70,), dtype=checks.usual_dtype(implementation), **options)
    got = checks.run(case, make_inputs(case), implementation)
    fixed = Case("one", b=1, sq=37, sk=70, dtype=case.dtype, **options)
    wanted = checks.run(fixed, make_inputs(fixed), implementation)
    np.testing.assert_allclose(wide(got.out), wide(wanted.out[0]), **near(case.dtype))
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in got.gradients.items():
        same = wanted.gradients[name][0] if name != "sinks" else wanted.gradients[name]
        np.testing.assert_allclose(wide(gradient), wide(same), **near(case.dtype))


def test_cu_seqlens_k_defaults_to_cu_seqlens_q(implementation):
    checks.require(implementation, dtype="bfloat16")
    arrays = make_inputs(varlen("same", (4, 8), dtype="bfloat16")).positional
    both = jax_flash.flash_attention_varlen(**arrays, causal=True, implementation=implementation)
    arrays.pop("cu_seqlens_k")
    one = jax_flash.flash_attention_varlen(**arrays, causal=True, implementation=implementation)
    np.testing.assert_array_equal(both, one)


def test_lengths_are_known_only_when_the_call_runs(implementation):
    """One compiled program serves every way to cut the same tokens."""
    checks.require(implementation, dtype="float16")
    case = varlen("cuts", (12,), causal=True, dtype="float16")
    inputs = make_inputs(case)
    q, k, v = (inputs.positional[name] for name in ("query", "key", "value"))
    traces = []

    @jax.jit
    def run(cu):
        traces.append(cu.shape)
        return jax_flash.flash_attention_varlen(q, k, v, cu, causal=True, implementation=implementation)

    for cut in [(12, 0, 0), (5, 5, 2), (0, 1, 1), (4, 4, 4)]:
        cu = cu_seqlens(cut)
        given = checks.with_arrays(inputs, cu_seqlens_q=cu, cu_seqlens_k=cu)
        right, low = oracle.references(case, given, gradients=False)
        oracle.assert_out(np.asarray(run(cu)), right.out, low.out)
    assert traces == [(4,)]


# Zero sizes, many sequences, long ones.

ZERO = [
    varlen("no sequence", ()),
    varlen("no sequence, only padding", (), padding=(5, 3)),
    varlen("only empty sequences", (0, 0, 0)),
    varlen("no query", (0, 0), k_sequences=(3, 4)),
    varlen("no key", (3, 4), k_sequences=(0, 0)),
    varlen("no key, but padding", (3, 4), k_sequences=(0, 0), padding=(0, 2)),
]


@by_name(ZERO)
def test_zero_sizes(case, implementation):
    case = case.replace(causal=True, sinks=True, alibi_slopes=(4,), dropout_rate=0.1)
    checks.check(case.replace(dtype=checks.usual_dtype(implementation)), implementation)


LONG = [
    varlen("many short ones", (1, 2, 3) * 40, k_sequences=(3, 0, 5) * 40, causal=True),
    varlen("across tiles", (130, 1, 64, 200), k_sequences=(64, 129, 1, 300), window=(64, 0)),
    varlen(
        "across tiles, top left", (130, 65, 200), causal=True, align="top_left", sinks=True, dropout_rate=0.2
    ),
    varlen("kv_lengths across tiles", (70, 130, 100), kv_lengths=(64, 0, 65), padding=(20, 7), softcap=4.0),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@by_name(LONG)
def test_lengths_that_cross_tiles(case, dtype):
    checks.check(case.replace(hq=2, hk=1, d=24, dv=40, dtype=dtype), IMPLEMENTATION)


def test_a_call_repeated_gives_the_same_bits(kernel):
    case = varlen("repeat", (130, 1, 64), k_sequences=(64, 129, 1), causal=True, dropout_rate=0.1)
    case = case.replace(dtype=checks.usual_dtype(kernel))
    inputs = make_inputs(case)
    first = checks.run(case, inputs, kernel, deterministic=True)
    for _ in range(3):
        checks.assert_same(checks.run(case, inputs, kernel, deterministic=True), first)


def test_gradients_of_long_documents_have_the_same_bits_whatever_memory_held(kernel):
    """Many tiles add to each dQ. Freed memory holds other numbers between the calls, which a counter must not read."""
    long, repeats = ((100, 4000, 300, 1500), 60) if kernel == "cuda" else ((20, 150, 70), 2)
    case = varlen("long documents", long, hq=8, hk=8, d=128, dv=128, causal=True, dtype="bfloat16")
    checks.require_case(kernel, case)
    inputs = make_inputs(case)
    moving, _ = oracle.split(inputs.positional | inputs.keywords)
    out, pullback = jax.vjp(checks.function(case, inputs, kernel, deterministic=True), moving)
    run = jax.jit(lambda pullback, out: pullback(jax.tree.map(jnp.cos, out)))
    first = run(pullback, out)
    for n in range(repeats):
        jax.block_until_ready(jnp.full((64 + n, 1 << 18), n, jnp.int32))
        same = jax.tree.map(lambda x, y: bool((x == y).all()), run(pullback, out), first)
        assert all(jax.tree.leaves(same)), (n, same)
