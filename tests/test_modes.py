"""JAX's strict and 64-bit modes, leak and NaN checks: every option, forward and backward, under each."""

import contextlib
import functools
import gc

import jax
import jax.numpy as jnp
import pytest
from cases import BY_NAME, make_inputs
from programs import assert_same, attention, with_gradients

import jax_flash

CASES = [BY_NAME[name].replace(dtype="bfloat16") for name in ("everything", "packed everything")]


def leaks_checked():
    """The check collects garbage at each trace; objects of earlier tests are frozen, so that it does not visit them."""
    gc.collect()
    gc.freeze()
    return jax.checking_leaks()


MODES = {
    "x64": lambda: jax.enable_x64(True),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "tracer leaks checked": leaks_checked,
    "NaN checked": lambda: jax.debug_nans(True),
}


def arrays_of(case):
    inputs = make_inputs(case)
    return inputs.positional | inputs.keywords


def check(case, implementation, modes):
    """Values and dtypes must not change. Both cases have rows that see nothing, whose lse is −inf and not NaN."""
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.layout)
def test_eager_calls_are_checked_for_nan_too(case, implementation):
    run = with_gradients(attention(case, implementation))
    with jax.debug_nans(True):
        got = run(arrays_of(case))
    assert bool((got["results"][1] == -jnp.inf).any())
    # Outside jit XLA rounds each intermediate result to 16 bits; a compiled program keeps some in float32.
    rounds = implementation == "xla" and case.dtype != "float32"
    assert_same(got, jax.jit(run)(arrays_of(case)), tolerance=2.0**-7 if rounds else 1e-5)


def test_eager_calls_over_pages_are_checked_for_nan_too(implementation):
    q, pool, tables = jnp.ones((2, 3, 4, 8)), jnp.ones((4, 2, 2, 8)), [[0, 1], [-1, 3]]

    def run(q, pool, tables=tables, lengths=(4, 0)):
        call = functools.partial(jax_flash.paged_attention, causal=True, implementation=implementation)
        return call(q, pool, pool, tables, lengths)

    with jax.debug_nans(True):
        out, gradients = jax.vjp(run, q, pool)
        gradients(jnp.ones_like(out))
        with pytest.raises(FloatingPointError):  # row 1 needs a page outside the pool
            run(q, pool, lengths=(4, 3))


def test_gradients_of_sinks_that_are_off_are_checked_for_nan_too(implementation):
    x, off = jnp.ones((2, 3, 4, 8)), jnp.full(4, -jnp.inf)

    def run(sinks):  # entry 0 has no key, so that its lse is −inf as its sinks are
        return jax_flash.flash_attention(
            x, x, x, sinks=sinks, kv_lengths=[0, 2], implementation=implementation
        ).sum()

    with jax.debug_nans(True):
        assert not jax.grad(run)(off).any()
