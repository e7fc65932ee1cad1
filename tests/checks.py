"""Runs a case on an implementation and compares it with the oracle; skips what is not built, with the reason.

At the usual shape calls run op by op, because cases then share nearly all compiled code. Other calls are one program,
which compiles sooner than their operations do one by one, except on GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, Case, Inputs, make_inputs, poisoned
from conftest import IMPLEMENTATION
from programs import attention, weights

import jax_flash
from jax_flash.backends import compute_capability

# Of tests of Hopper's kernels; other implementations have the same calls in other files.
on_hopper = pytest.mark.skipif(
    "emulated" in sys.modules or IMPLEMENTATION != "cuda", reason="Hopper's kernels are not tested"
)

# Head dims for which Hopper's kernels differ most; on CPUs 512 would only take time.
HOPPER_HEAD_DIMS = (64, 128, 256, *([512] if IMPLEMENTATION == "cuda" else []))


def why_not_built(
    implementation: str,
    passes: tuple[str, ...],
    dtype: str = "bfloat16",
    head_dims: tuple[int, int] = (16, 16),
) -> str | None:
    """Names what an installed library lacks, as backends() reports it; None for a missing one: its tests then fail."""
    built = next(b for b in jax_flash.backends() if b.implementation == implementation)
    if built.problem is not None:
        return None
    for pass_ in passes:
        if pass_ not in built.passes:
            return f'"{implementation}" has no {pass_} pass built'
    if dtype not in built.dtypes:
        return f'"{implementation}" has no {dtype} built'
    cards = [compute_capability(device) for device in built.devices if device.platform == "gpu"]
    if cards and max(cards) < 80 and dtype == "bfloat16":
        return "these cards have no bfloat16"
    if built.head_dims and not any(head_dims[0] <= d and head_dims[1] <= dv for d, dv in built.head_dims):
        return f'"{implementation}" has no head dims {head_dims} built'
    return None


def require(implementation: str, *passes: str, dtype: str = "bfloat16", d: int = 16, dv: int = 16) -> None:
    """Skips the test where one of the passes is not built."""
    reason = why_not_built(implementation, passes or ("forward",), dtype, (d, dv))
    if reason:
        pytest.skip(reason)


def runs_cuda_kernels(implementation: str) -> bool:
    """Whether the kernels are CUDA's: on a GPU, or emulated in place of the CPU's."""
    return implementation == "cuda" or (implementation == "cpu" and "emulated" in sys.modules)


def assert_same_but_for_order(got, wanted, kernel, *, deterministic=False):
    """The same bits, or on CUDA about the same gradients, because additions to dQ there have no fixed order.

    The terms are the same, so that the float32 sums differ by some 2⁻²⁰ of their largest terms, and the gradients by
    one unit of their dtype where a sum is rounded the other way.
    """
    if deterministic or not runs_cuda_kernels(kernel):
        np.testing.assert_array_equal(got, wanted)
    else:
        unit = float(jnp.finfo(wanted.dtype).eps)
        got, wanted = np.float32(got), np.float32(wanted)
        np.testing.assert_allclose(got, wanted, rtol=unit, atol=2**-16 * np.abs(wanted).max(initial=0))


def require_skipped_tiles(implementation: str) -> None:
    """Skips the test unless CUDA's kernels run, which read no tile that a mask hides from all rows."""
    if not runs_cuda_kernels(implementation):
        pytest.skip("the CPU's kernels compute some tiles that masks hide")


def why_no_case(implementation: str, case: Case) -> str | None:
    """What a case needs and the library lacks."""
    return why_not_built(implementation, ("forward",), case.dtype, (case.d, case.dv))


def require_case(implementation: str, case: Case) -> None:
    """Skips the test where a case needs what the library lacks."""
    if reason := why_no_case(implementation, case):
        pytest.skip(reason)


def usual_dtype(implementation: str) -> str:
    """For tests that are about something else: float32, or bfloat16 where only 16-bit is built."""
    return "bfloat16" if why_not_built(implementation, ("forward",), "float32") else "float32"


def function(case: Case, inputs: Inputs, implementation: str | None, **options: Any) -> Any:
    """arrays of the differentiable operands → (out, lse), through the public function of the case's layout."""
    call = jax_flash.flash_attention if case.layout == "fixed" else jax_flash.flash_attention_varlen
    _, fixed = oracle.split(inputs.positional | inputs.keywords)

    def run(moving: dict[str, Any]) -> Any:
        arrays = moving | fixed
        positional = [arrays.pop(name) for name in inputs.positional]
        return call(
            *positional, **arrays, **case.options | options, return_lse=True, implementation=implementation
        )

    return run


def why_no_gradients(case: Case, implementation: str) -> str | None:
    """Why the gradients of a case cannot be had; None where they can."""
    passes = ("backward", "bias_gradient") if case.bias is not None else ("backward",)
    return why_not_built(implementation, passes, case.dtype, (case.d, case.dv))


def run(
    case: Case, inputs: Inputs, implementation: str, *, at_once: bool | None = None, **options: Any
) -> oracle.Result:
    """Out, lse and, where they are built, the gradients. With `at_once` the call is one program."""
    require_case(implementation, case)
    moving, _ = oracle.split(inputs.positional | inputs.keywords)
    call = function(case, inputs, implementation, **options)
    if why_no_gradients(case, implementation):
        return oracle.Result(*map(np.asarray, call(moving)))
    if at_once is None:
        at_once = implementation != "cuda" and not _usual(case)
    if at_once:
        program = _program(case, implementation, tuple(options.items()))
        results = program(inputs.positional | inputs.keywords, inputs.dout, inputs.dlse)
        return oracle.Result(*jax.tree.map(np.asarray, results))
    return differentiate(call, moving, inputs)


@lru_cache(maxsize=32)
def _program(case: Case, implementation: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """(arrays, dout, dlse) → (out, lse, gradients), compiled once for whatever the arrays hold."""
    call = attention(case, implementation, **dict(options))

    def run(arrays: dict[str, Any], dout: Any, dlse: Any) -> Any:
        moving, fixed = oracle.split(arrays)
        (out, lse), pullback = jax.vjp(lambda moving: call(moving | fixed), moving)
        return out, lse, pullback((dout.astype(out.dtype), dlse))[0]

    return jax.jit(run)


def _usual(case: Case) -> bool:
    return (case.layout, case.b, case.sq, case.d, case.dv) == ("fixed", 2, 12, 16, 16) and not case.forms


def differentiate(
    call: Any, moving: dict[str, Any], inputs: Inputs, *, at_once: bool = False
) -> oracle.Result:
    """As oracle.differentiate, but op by op, or in one program."""

    def run(moving: dict[str, Any], dout: Any, dlse: Any) -> Any:
        (out, lse), pullback = jax.vjp(call, moving)
        return out, lse, pullback((dout.astype(out.dtype), dlse.astype(lse.dtype)))[0]

    results = (jax.jit(run) if at_once else run)(moving, inputs.dout, inputs.dlse)
    return oracle.Result(*jax.tree.map(np.asarray, results))


def assert_right(got: dict[str, Any], case: Case, inputs: Inputs) -> None:
    """Asserts what programs.with_gradients found for the case's call with these inputs, at the contract's tolerance."""
    out, lse = map(np.asarray, got["results"])
    weighted = with_arrays(inputs, dout=weights(jnp.asarray(out)), dlse=weights(jnp.asarray(lse)))
    right, low = (_in_given_rank(x, case) for x in oracle.references(case, weighted))
    gradients = jax.tree.map(np.asarray, got["gradients"])
    oracle.assert_result(oracle.Result(out, lse, gradients), right, low, case)


@lru_cache(maxsize=32)
def references(case: Case, seed: int = 0) -> tuple[oracle.Result, oracle.Result]:
    """`exact` and `low` of the contract."""
    right, low = oracle.references(case, make_inputs(case, seed))
    return _in_given_rank(right, case), _in_given_rank(low, case)


def _in_given_rank(result: oracle.Result, case: Case) -> oracle.Result:
    """The result with the bias' gradient in the rank of the user's array."""
    if case.bias is None:
        return result
    dbias = result.gradients["bias"].reshape(case.bias)
    return oracle.Result(result.out, result.lse, result.gradients | {"bias": dbias})


def compare(
    case: Case, implementation: str, seed: int = 0, *, may_deviate: bool = False, **options: Any
) -> str | None:
    """Asserts out, lse and every gradient at the contract's tolerance; returns why there are no gradients, if so.

    `may_deviate` allows large scores in float32 the known deviation of docs/numerics.md.
    """
    inputs = make_inputs(case, seed)
    got = run(case, inputs, implementation, **options)
    right, low = references(case, seed)
    reason = why_no_gradients(case, implementation)
    if reason:
        right, low = (oracle.Result(x.out, x.lse) for x in (right, low))
    if may_deviate and case.dtype == "float32" and _largest(right.lse) >= LARGE:
        try:
            oracle.assert_result(got, right, low, case)
        except AssertionError:
            plain = _in_given_rank(oracle.on_cpu(oracle.ref)(case, inputs), case)
            oracle.assert_near_plain(got, right, plain, case.dropout_rate)
    else:
        oracle.assert_result(got, right, low, case)
    return reason


# With scores of this size, rounding in float32, which dropout scales up, may exceed the tolerance.
LARGE = 10


def _largest(lse: np.ndarray) -> float:
    return float(np.max(np.abs(lse), where=np.isfinite(lse), initial=0))


def check(case: Case, implementation: str, seed: int = 0, **options: Any) -> None:
    """Like compare(); afterwards skips the test where gradients are not built."""
    reason = compare(case, implementation, seed, **options)
    if reason:
        pytest.skip(f"forward is right; {reason}")


def check_poisoned(
    case: Case, implementation: str, deterministic: bool | None = None, inputs: Inputs | None = None
) -> None:
    """Checks at the contract's tolerance, with NaN wherever nothing is read. Half of the cases are deterministic."""
    inputs = inputs or make_inputs(case)
    if deterministic is None:
        deterministic = sum(map(ord, case.name)) % 2 == 1
    got = run(case, poisoned(case, inputs), implementation, at_once=True, deterministic=deterministic)
    right, low = (_in_given_rank(x, case) for x in oracle.references(case, inputs))
    if why_no_gradients(case, implementation):
        right, low = (oracle.Result(x.out, x.lse) for x in (right, low))
    oracle.assert_result(got, right, low, case)


def check_poisoned_gradients(case: Case, implementation: str) -> None:
    """Like check_poisoned(); fails where gradients are not built. Half of the cases are deterministic."""
    assert why_no_gradients(case, implementation) is None
    check_poisoned(case, implementation)


def assert_gradients_repeat(shapes: Sequence[tuple[int, ...]], implementation: str, **options: Any) -> None:
    """Gradients of bfloat16 q, k, v and dout of these shapes have the same bits twice."""
    q, k, v, dout = (jax.random.normal(jax.random.key(i), x, jnp.bfloat16) for i, x in enumerate(shapes))

    def gradients() -> list[np.ndarray]:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return jax_flash.flash_attention(q, k, v, implementation=implementation, **options)

        return [np.asarray(x, np.float32) for x in jax.vjp(attend, q, k, v)[1](dout)]

    for x, y in zip(gradients(), gradients(), strict=True):
        np.testing.assert_array_equal(x, y)


def crossed(
    make: Callable[..., Case], options: Iterable[str], sizes: Iterable[tuple[int, int]]
) -> list[Case]:
    """make(option, sq, sk, d=…, dtype=…) of all options and sizes, in turn with every kind of Hopper's head dims up to
    128 and both 16-bit dtypes."""
    return [
        make(
            option,
            *size,
            d=(64, 128, 40, 80, 96, 72)[(i + j) % 6],
            dtype=("bfloat16", "float16")[(i // 2 + j) % 2],
        )
        for i, option in enumerate(options)
        for j, size in enumerate(sizes)
    ]


def in_some_dtypes(cases: tuple[Case, ...], implementation: str) -> tuple[Case, ...]:
    """Cases whose sizes were chosen for the tiles of CUDA kernels. CUDA runs each in every dtype. Other implementations
    run each in one dtype, in turn, and with two heads, because only grids depend on the number of heads."""
    every = implementation == "cuda"
    return tuple(
        (case if every else case.replace(hq=2, hk=1)).replace(dtype=dtype, name=f"{case.name}, {dtype}")
        for number, case in enumerate(cases)
        for dtype in (DTYPES if every else DTYPES[number % 3 :][:1])
    )


def assert_same(got: oracle.Result, wanted: oracle.Result) -> None:
    """Asserts that two results are the same bit for bit."""
    for name, x, y in (("out", got.out, wanted.out), ("lse", got.lse, wanted.lse)):
        assert x.tobytes() == y.tobytes(), f"{name} differs at {np.argwhere(x != y)[:3].tolist()}"
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, x in got.gradients.items():
        y = wanted.gradients[name]
        assert x.tobytes() == y.tobytes(), f"d{name} differs at {np.argwhere(x != y)[:3].tolist()}"


def with_arrays(inputs: Inputs, **arrays: Any) -> Inputs:
    """`inputs` with some arrays replaced; dout and dlse may be among them."""
    cotangents = {name: jnp.asarray(arrays.pop(name, getattr(inputs, name))) for name in ("dout", "dlse")}
    positional = {name: arrays.pop(name, x) for name, x in inputs.positional.items()}
    return Inputs(positional, inputs.keywords | arrays, **cotangents, mask=inputs.mask)
