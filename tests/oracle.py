"""The right results, and the contract's tolerance around them.

`exact` and `low` are the equations of tests/equations.py, so that reference.py is itself tested against something and
nothing has to be compiled; `ref` is plain JAX.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import equations
import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, Inputs, operands, spec
from equations import DIFFERENTIABLE, Result

from jax_flash import reference
from jax_flash.spec import AttentionSpec

ROUNDED = ("query", "key", "value", "bias")


def on_cpu(function: Any) -> Any:
    """Runs `function` on the CPU: a GPU's compiler removes the conversions that round S and P to 16 bits."""

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        with jax.default_device(jax.devices("cpu")[0]):
            return function(*arguments, **keywords)

    return run


def differentiate(function: Any, arrays: dict[str, jax.Array], dout: jax.Array, dlse: jax.Array) -> Result:
    """The result of `function(arrays) -> (out, lse)`, and its gradients for the given cotangents."""

    @jax.jit
    def run(arrays: Any, dout: Any, dlse: Any) -> Any:
        (out, lse), pullback = jax.vjp(function, arrays)
        return out, lse, pullback((dout.astype(out.dtype), dlse.astype(lse.dtype)))[0]

    return Result(*jax.tree.map(np.asarray, run(arrays, dout, dlse)))


def split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that have gradients, and the others."""
    moving = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE and x is not None}
    return moving, {name: x for name, x in arrays.items() if name not in moving}


def plain(case: Case, inputs: Inputs, arrays: dict[str, jax.Array], round_to: Any = None) -> Result:
    """Results and gradients of reference.py for `arrays`, the operands of the case."""
    static = spec(case, inputs)
    moving, fixed = split(arrays | {"value": None} if static.shared_kv else arrays)
    fixed |= {name: arrays[name] for name in fixed}

    def run(moving: dict[str, jax.Array]) -> Any:
        return reference.attention(static, moving | fixed, round_to=round_to)

    return _of_given_sinks(differentiate(run, moving, inputs.dout, inputs.dlse), inputs)


def ref(case: Case, inputs: Inputs) -> Result:
    """The equations in plain JAX in float32, from the same inputs."""
    arrays = operands(inputs)
    return plain(case, inputs, arrays | {n: arrays[n].astype(jnp.float32) for n in ROUNDED if n in arrays})


def exact(case: Case, inputs: Inputs, **options: Any) -> Result:
    """The equations in float64, from the same inputs."""
    found = equations.attention(spec(case, inputs), operands(inputs), inputs.dout, inputs.dlse, **options)
    if case.shared_kv and found.gradients:
        found.gradients["key"] = found.gradients["key"] + found.gradients.pop("value")
    return _of_given_sinks(found, inputs)


def _of_given_sinks(found: Result, inputs: Inputs) -> Result:
    """The gradient of sinks in the shape of the public argument."""
    if "sinks" in found.gradients:
        found.gradients["sinks"] = found.gradients["sinks"].reshape(inputs.keywords["sinks"].shape)
    return found


def low(case: Case, inputs: Inputs, **options: Any) -> Result:
    """The same equations with S and P rounded to the input dtype, products accumulated in float32."""
    arrays = operands(inputs)
    dtype = np.dtype(arrays["query"].dtype)
    round_to = dtype if dtype.itemsize == 2 else None
    got = exact(case, inputs, dtype=np.float32, round_to=round_to, **options)
    gradients = {name: x.astype(arrays[name].dtype) for name, x in got.gradients.items()}
    return Result(got.out.astype(dtype), got.lse, gradients)


def references(case: Case, inputs: Inputs, **options: Any) -> tuple[Result, Result]:
    """`exact` and `low`, which are the same where nothing is 16-bit."""
    right = exact(case, inputs, **options)
    moving, _ = split(operands(inputs))
    half = any(x.dtype.itemsize == 2 for x in moving.values())
    return right, low(case, inputs, **options) if half else right


@on_cpu
def plain_outs(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """out of the keys that rows see, `seen [b, sq, sk]`: in float32, and with S and P rounded to query's dtype."""
    static = AttentionSpec("fixed", scale=query.shape[3] ** -0.5, operands=("mask",))
    there = jax.device_put({"query": query, "key": key, "value": value}, jax.devices("cpu")[0])
    mask, wide = (
        {"mask": jnp.asarray(seen)[:, None]},
        {name: x.astype(jnp.float32) for name, x in there.items()},
    )
    exact = reference.attention(static, wide | mask)
    low = reference.attention(static, there | mask, round_to=query.dtype)
    return np.asarray(exact[0]), np.asarray(low[0])


# The tolerance of the contract.


def assert_result(got: Result, ref: Result, low: Result, case: Case) -> None:
    assert_out(got.out, ref.out, low.out, softcap=bool(case.softcap))
    assert_lse(got.lse, ref.lse)
    assert set(got.gradients) == set(ref.gradients)
    half = got.out.dtype.itemsize == 2
    for name in ref.gradients:
        assert_gradient(name, got.gradients[name], ref.gradients[name], low.gradients[name], half=half)


def assert_out(out: np.ndarray, ref: np.ndarray, low: np.ndarray, *, softcap: bool = False) -> None:
    """16-bit: max|out − ref| ≤ 2·max|low − ref| + 1e-5, 3· with softcap. float32: 1e-5 + 1e-5·|ref|."""
    if out.dtype.itemsize == 2:
        _assert_within("out", out, ref, (3 if softcap else 2) * _distance(low, ref) + 1e-5)
    else:
        _assert_within("out", out, ref, _limit(1e-5, ref))


def assert_lse(lse: np.ndarray, ref: np.ndarray) -> None:
    """1e-4 + 1e-5·|ref| for every dtype; −inf where and only where ref is."""
    nothing, got_nothing = np.isneginf(ref), np.isneginf(lse)
    assert np.array_equal(got_nothing, nothing), (
        f"lse is −inf at {_where(got_nothing & ~nothing)} and is not at {_where(~got_nothing & nothing)}"
    )
    ref = np.where(nothing, 0, ref)
    _assert_within("lse", np.where(nothing, 0, lse), ref, 1e-4 + 1e-5 * np.abs(_wide(ref)))


def assert_max(largest: np.ndarray, ref: np.ndarray) -> None:
    """At the tolerance of lse, since both come from the same scores."""
    assert largest.dtype == np.float32
    assert_lse(largest, ref)


def assert_gradient(
    name: str, gradient: np.ndarray, ref: np.ndarray, low: np.ndarray, *, half: bool | None = None
) -> None:
    """16-bit: 3·max|low − ref| + 1e-5·max|ref|; float32: 1e-4 + 1e-4·|ref|.

    `half` says that the inputs are 16-bit although this operand's gradient is not (bias, sinks).
    """
    if half or gradient.dtype.itemsize == 2:
        limit = 3 * _distance(low, ref) + 1e-5 * np.max(np.abs(_wide(ref)), initial=0)
    else:
        limit = _limit(1e-4, ref)
    _assert_within("d" + name, gradient, ref, limit)


def assert_near_plain(got: Result, exact: Result, plain: Result, dropout_rate: float) -> None:
    """A known deviation from the contract (docs/numerics.md): large float32 scores round by as much as its limits.

    As for 16 bits, the limit is widened by 2 times the error of plain float32 (3 times for gradients). A dropout rate
    of 0.9 scales the terms of a gradient by 10, which cancel: there the page allows 8 times the limit.
    """
    times = 8 if dropout_rate >= 0.9 else 1
    assert_lse(got.lse, exact.lse)
    _assert_within("out", got.out, exact.out, 2 * _distance(plain.out, exact.out) + _limit(1e-5, exact.out))
    for name, ref in exact.gradients.items():
        limit = 3 * _distance(plain.gradients[name], ref) + times * _limit(1e-4, ref)
        _assert_within("d" + name, got.gradients[name], ref, limit)


def _limit(number: float, ref: np.ndarray) -> np.ndarray:
    return number + number * np.abs(_wide(ref))


def _assert_within(name: str, got: np.ndarray, ref: np.ndarray, limit: Any) -> None:
    got, ref = _wide(got), _wide(ref)
    assert got.shape == ref.shape, f"{name} has shape {got.shape}, not {ref.shape}"
    difference = np.abs(got - ref)
    limit = np.broadcast_to(limit, got.shape)
    wrong = ~(difference <= limit)  # NaN is wrong
    if wrong.any():
        worst = np.unravel_index(
            np.argmax(np.where(wrong, np.nan_to_num(difference, nan=np.inf), 0)), got.shape
        )
        raise AssertionError(
            f"{name} is wrong at {wrong.sum()} of {wrong.size} places, first {_where(wrong)}; worst at "
            f"{tuple(map(int, worst))}: got {got[worst]:.8g}, ref {ref[worst]:.8g}, "
            f"difference {difference[worst]:.3g}, allowed {limit[worst]:.3g}"
        )


def _distance(low: np.ndarray, ref: np.ndarray) -> float:
    return float(np.max(np.abs(_wide(low) - _wide(ref)), initial=0))


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _where(condition: np.ndarray) -> str:
    places = np.argwhere(condition)[:3].tolist()
    return ", ".join(map(str, map(tuple, places))) or "no place"
