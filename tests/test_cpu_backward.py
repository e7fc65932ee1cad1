"""The CPU backward: the same bits for any number of threads, and no memory that grows with the square of s."""

from __future__ import annotations

import os

import checks
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, make_inputs
from conftest import IMPLEMENTATION
from programs import assert_same_bits_on_one_thread_and_on_all, report, start_python

pytestmark = pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="promises of the CPU kernels")

GRADIENTS = """
b, s, d = 1, 700, 40
for h, hk in ((1, 1), (2, 1), (3, 3)):
    for dtype in ("float32", "bfloat16"):
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(b, s, h, d), (b, s, hk, d), (b, s, hk, d), (b, s, h, d)]
        q, k, v, dout = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes))
        for options in ({}, {"causal": True}, {"window": (100, 30)}):
            _, vjp = jax.vjp(lambda *x: jax_flash.flash_attention(*x, implementation="cpu", **options), q, k, v)
            case = f"{h} heads, {hk} KV heads, {dtype}, {', '.join(options) or 'plain'}"
            keep(case, **dict(zip(("dquery", "dkey", "dvalue"), vjp(dout))))
"""
MEMORY = """
import resource, jax, jax.numpy as jnp
import jax_flash
def step(q, k, v, dout):
    attend = lambda *x: jax_flash.flash_attention(*x, implementation="cpu", causal=True, window=(4096, 0))
    return jax.vjp(attend, q, k, v)[1](dout)
inputs = [jax.block_until_ready(jnp.full((1, 32768, 1, 64), x, dtype)) for x in (0.1, 0.2, 0.3, 0.4)]
step = jax.jit(step).lower(*inputs).compile()
def resident():
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
before = resident()
results = jax.block_until_ready(step(*inputs))
print(resident() - before - sum(x.nbytes for x in results))
"""


def test_gradients_are_the_same_bits_on_one_thread_and_on_all() -> None:
    assert_same_bits_on_one_thread_and_on_all(GRADIENTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_see_nothing_are_not_read(dtype: str) -> None:
    """A mask hides every key from a row whose query and cotangents are NaN. The contract does not ask for this."""
    case = Case("hidden rows", sq=150, sk=140, mask=(150, 1), dtype=dtype)
    inputs = make_inputs(case)
    hidden = ~np.asarray(inputs.keywords["mask"])[:, 0]
    assert 0 < hidden.sum() < 150
    query, dout = (
        jnp.where(hidden[:, None, None], jnp.nan, x) for x in (inputs.positional["query"], inputs.dout)
    )
    dirty = checks.with_arrays(inputs, query=query.astype(dtype), dout=dout)
    wanted, got = (checks.run(case, x, "cpu") for x in (inputs, dirty))
    checks.assert_same(got, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_enormous_scores_leave_finite_gradients(dtype: str) -> None:
    """Scores of 4e9 are 256 apart in float32, and S is not rounded the way lse was; still P must not exceed 1."""
    case = Case("enormous", b=1, sq=70, sk=90, scale=0.3, dtype=dtype)
    inputs = make_inputs(case)
    large = {name: (30_000 * jnp.sign(inputs.positional[name])).astype(dtype) for name in ("query", "key")}
    got = checks.run(case, checks.with_arrays(inputs, **large), "cpu")
    assert np.isfinite(got.out.astype(np.float32)).all()
    assert np.isfinite(got.gradients["value"].astype(np.float32)).all()
    assert (np.abs(got.gradients["value"].astype(np.float32)) < 1e4).all()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to read the memory from")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_32768_tokens_needs_less_than_64_megabytes_besides_its_results(dtype: str) -> None:
    eight = set(sorted(os.sched_getaffinity(0))[:8])  # each thread has scratch of its own
    program = f"import os\nos.sched_setaffinity(0, {eight})\ndtype = {dtype!r}\n{MEMORY}"
    assert report(start_python(program)) < 64 << 20
