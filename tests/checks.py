"""A case run on an implementation and held against the oracle; what is not built is skipped, and says so.

Custom calls run op by op, and so does plain JAX at the usual shape: cases then share nearly all compiled code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import DTYPES, Case, Inputs, make_inputs, operands, spec

import jax_flash
from jax_flash import reference
from jax_flash.backends import compute_capability

SMALL = 50_000  # query rows × keys that the row-by-row oracle walks in a moment


def why_not_built(
    implementation: str,
    passes: tuple[str, ...],
    dtype: str = "bfloat16",
    head_dims: tuple[int, int] = (16, 16),
) -> str | None:
    """What backends() says is missing from a library that is there; one that is absent fails its tests."""
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
    case: Case, inputs: Inputs, implementation: str, *, at_once: bool = False, **options: Any
) -> oracle.Result:
    """Out, lse and, where they are built, the gradients; `at_once` as one program, for shapes that no other has."""
    require(implementation, dtype=case.dtype, d=case.d, dv=case.dv)
    moving, _ = oracle.split(inputs.positional | inputs.keywords)
    call = function(case, inputs, implementation, **options)
    if why_no_gradients(case, implementation):
        return oracle.Result(*map(np.asarray, call(moving)))
    if at_once or (implementation == "xla" and not _usual(case)):
        return oracle.differentiate(call, moving, inputs.dout, inputs.dlse)
    return differentiate(call, moving, inputs)


def _usual(case: Case) -> bool:
    return (case.b, case.sq, case.d, case.dv) == (2, 12, 16, 16)


def differentiate(call: Any, moving: dict[str, Any], inputs: Inputs) -> oracle.Result:
    """As the oracle's, op by op."""
    (out, lse), pullback = jax.vjp(call, moving)
    gradients = pullback((inputs.dout.astype(out.dtype), inputs.dlse.astype(lse.dtype)))[0]
    return oracle.Result(*jax.tree.map(np.asarray, (out, lse, gradients)))


@lru_cache(maxsize=32)
@oracle.on_cpu
def references(case: Case, seed: int = 0) -> tuple[oracle.Result, oracle.Result]:
    """`ref` and `low` of the contract: row by row in float64 where the case is small."""
    inputs = make_inputs(case, seed)
    right = _equations(case, inputs, by_rows=_scores(inputs) <= SMALL)
    dtype = inputs.positional["query"].dtype
    moving, fixed = oracle.split(operands(inputs))
    if all(x.dtype.itemsize == 4 for x in moving.values()):
        return right, right
    if not _usual(case):
        return right, _in_given_rank(oracle.low(case, inputs), case)
    round_to = dtype if dtype.itemsize == 2 else None
    low = differentiate(
        lambda moving: reference.attention(spec(case, inputs), moving | fixed, round_to=round_to),
        moving,
        inputs,
    )
    return right, _in_given_rank(low, case)


def _scores(inputs: Inputs) -> int:
    """Query rows × keys that by_rows walks."""
    return inputs.dlse.size * inputs.positional["key"].shape[-3]


def _in_given_rank(result: oracle.Result, case: Case) -> oracle.Result:
    """The bias and its gradient have the rank of the user's array."""
    if case.bias is None:
        return result
    dbias = result.gradients["bias"].reshape(case.bias)
    return oracle.Result(result.out, result.lse, result.gradients | {"bias": dbias})


@oracle.on_cpu
def _equations(case: Case, inputs: Inputs, by_rows: bool) -> oracle.Result:
    """Row by row in float64, or all at once in float32."""
    if by_rows:
        result = oracle.by_rows(spec(case, inputs), operands(inputs), inputs.dout, inputs.dlse)
    else:
        result = oracle.ref(case, inputs)
    return _in_given_rank(result, case)


def compare(
    case: Case, implementation: str, seed: int = 0, *, may_deviate: bool = False, **options: Any
) -> str | None:
    """Out, lse and every gradient at the contract's tolerance; returns why the gradients are not built, if so.

    A float32 case is held against float64 where float32's own rounding is of the size of the limit. `may_deviate`:
    its large scores may miss it, as docs/architecture.md has it.
    """
    inputs = make_inputs(case, seed)
    got = run(case, inputs, implementation, **options)
    right, low = references(case, seed)
    reason = why_no_gradients(case, implementation)
    if reason:
        right, low = (oracle.Result(x.out, x.lse) for x in (right, low))
    try:
        oracle.assert_result(got, right, low, case)
    except AssertionError:
        if case.dtype != "float32" or _scores(inputs) > 20 * SMALL:
            raise
        by_rows = _scores(inputs) <= SMALL
        other = _equations(case, inputs, by_rows=not by_rows)
        exact, plain = (right, other) if by_rows else (other, right)
        if reason:
            exact = oracle.Result(exact.out, exact.lse)
        if may_deviate and _largest(exact.lse) >= LARGE:
            oracle.assert_near_plain(got, exact, plain)
        else:
            oracle.assert_result(got, exact, exact, case)
    return reason


LARGE = (
    10  # a score whose rounding in float32, times what dropout multiplies it by, is of the size of the limit
)


def _largest(lse: np.ndarray) -> float:
    return float(np.max(np.abs(lse), where=np.isfinite(lse), initial=0))


def check(case: Case, implementation: str, seed: int = 0, **options: Any) -> None:
    """As compare; then skips what is not built."""
    reason = compare(case, implementation, seed, **options)
    if reason:
        pytest.skip(f"forward is right; {reason}")


def in_some_dtypes(cases: tuple[Case, ...], implementation: str) -> tuple[Case, ...]:
    """Sizes made for the tiles of CUDA kernels: there in every dtype, elsewhere each in one dtype, in turn."""
    every = implementation == "cuda"
    return tuple(
        case.replace(dtype=dtype, name=f"{case.name}, {dtype}")
        for number, case in enumerate(cases)
        for dtype in (DTYPES if every else DTYPES[number % 3 :][:1])
    )


def assert_same(got: oracle.Result, wanted: oracle.Result) -> None:
    """Bit for bit."""
    for name, x, y in (("out", got.out, wanted.out), ("lse", got.lse, wanted.lse)):
        assert x.tobytes() == y.tobytes(), f"{name} differs at {np.argwhere(x != y)[:3].tolist()}"
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, x in got.gradients.items():
        y = wanted.gradients[name]
        assert x.tobytes() == y.tobytes(), f"d{name} differs at {np.argwhere(x != y)[:3].tolist()}"


def with_arrays(inputs: Inputs, **arrays: Any) -> Inputs:
    """inputs with some of their arrays replaced, dout and dlse among them."""
    cotangents = {name: jnp.asarray(arrays.pop(name, getattr(inputs, name))) for name in ("dout", "dlse")}
    positional = {name: arrays.pop(name, x) for name, x in inputs.positional.items()}
    return Inputs(positional, inputs.keywords | arrays, **cotangents)
