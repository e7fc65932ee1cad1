"""JAX's strict and 64-bit modes, leak and NaN checks: every option, forward and backward, under each."""

import contextlib

import jax
import pytest
from cases import BY_NAME, make_inputs
from programs import assert_same, attention, with_gradients

CASES = [BY_NAME[name].replace(dtype="bfloat16") for name in ("everything", "packed everything")]

MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "tracer leaks checked": lambda: jax.checking_leaks(),
    "NaN checked": lambda: jax.debug_nans(True),
}


def arrays_of(case):
    inputs = make_inputs(case)
    return inputs.positional | inputs.keywords


def check(case, implementation, modes):
    """Values and dtypes are the same; both cases have rows that see nothing, whose lse is −inf and no NaN."""
    run = with_gradients(attention(case, implementation))
    wanted = jax.jit(run)(arrays_of(case))
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(MODES[mode]())
        got = jax.jit(lambda arrays: run(arrays))(arrays_of(case))
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, wanted)
    assert_same(got, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_no_result(kernel, mode, case):
    check(case, kernel, [mode])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
def test_all_modes_at_once_change_no_result_of_plain_jax(case):
    check(case, "xla", MODES)


def test_eager_calls_are_checked_for_nan_too(kernel):
    case = CASES[0]
    with jax.debug_nans(True):
        out, lse = attention(case, kernel)(arrays_of(case))
    assert bool((lse == -jax.numpy.inf).any())
    assert_same((out, lse), jax.jit(attention(case, kernel))(arrays_of(case)))
