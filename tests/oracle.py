"""The right results, and the contract's tolerance around them.

`ref` and `low` come from jax_flash/reference.py; `by_rows` writes the same equations once more in numpy, a
row at a time in float64 with gradients by hand, so that reference.py is itself tested against something.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, Inputs, operands, spec

from jax_flash import reference
from jax_flash.spec import AttentionSpec

DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
ROUNDED = ("query", "key", "value", "bias")


@dataclass(frozen=True)
class Result:
    """out, lse and the gradients by operand name, as numpy arrays; out keeps its own dtype."""

    out: np.ndarray
    lse: np.ndarray
    gradients: dict[str, np.ndarray] = field(default_factory=dict)


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
    moving = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE}
    return moving, {name: x for name, x in arrays.items() if name not in moving}


def plain(case: Case, inputs: Inputs, arrays: dict[str, jax.Array], round_to: Any = None) -> Result:
    """Results and gradients of reference.py for `arrays`, the operands of the case."""
    moving, fixed = split(arrays)
    static = spec(case, inputs)

    def run(moving: dict[str, jax.Array]) -> Any:
        return reference.attention(static, moving | fixed, round_to=round_to)

    return differentiate(run, moving, inputs.dout, inputs.dlse)


def ref(case: Case, inputs: Inputs) -> Result:
    """The equations in float32, from the same inputs."""
    arrays = operands(inputs)
    return plain(case, inputs, arrays | {n: arrays[n].astype(jnp.float32) for n in ROUNDED if n in arrays})


def low(case: Case, inputs: Inputs) -> Result:
    """The same equations with S and P rounded to the input dtype, products accumulated in float32."""
    dtype = inputs.positional["query"].dtype
    return plain(case, inputs, operands(inputs), round_to=dtype if dtype.itemsize == 2 else None)


def references(case: Case, inputs: Inputs) -> tuple[Result, Result]:
    """`ref` and `low`, which are the same where nothing is 16-bit."""
    right = ref(case, inputs)
    moving, _ = split(operands(inputs))
    return right, low(case, inputs) if any(x.dtype.itemsize == 2 for x in moving.values()) else right


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


def assert_near_plain(got: Result, exact: Result, plain: Result) -> None:
    """A known deviation from the contract (docs/architecture.md): large float32 scores round by as much as its limits.

    As for 16 bits, the limit is widened by 2 times the error of plain float32 (3 times for gradients).
    """
    assert_lse(got.lse, exact.lse)
    _assert_within("out", got.out, exact.out, 2 * _distance(plain.out, exact.out) + _limit(1e-5, exact.out))
    for name, ref in exact.gradients.items():
        limit = 3 * _distance(plain.gradients[name], ref) + _limit(1e-4, ref)
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


# The same equations in numpy, one row at a time.


def by_rows(spec: AttentionSpec, operands: dict[str, Any], dout: Any, dlse: Any) -> Result:
    """The semantics of docs/architecture.md in numpy float64, forward and backward, row after row."""
    x = {name: np.asarray(array) for name, array in operands.items()}
    x = {name: array if array.dtype.kind in "iub" else _wide(array) for name, array in x.items()}
    q_shape, k_shape, v_shape = (x[name].shape for name in ("query", "key", "value"))
    hq, hk, group = q_shape[-2], k_shape[-2], q_shape[-2] // k_shape[-2]
    q, do = x["query"].reshape(-1, hq, q_shape[-1]), _wide(dout).reshape(-1, hq, v_shape[-1])
    k, v = x["key"].reshape(-1, hk, k_shape[-1]), x["value"].reshape(-1, hk, v_shape[-1])
    dl = np.swapaxes(_wide(dlse), -1, -2).reshape(-1, hq)
    o, lse = np.zeros_like(do), np.full(dl.shape, -np.inf)
    gradients = {name: np.zeros(x[name].shape) for name in DIFFERENTIABLE if name in x}
    dq, dk, dv = (gradients[n].reshape(a.shape) for n, a in (("query", q), ("key", k), ("value", v)))
    dbias = np.zeros((q_shape[0], hq, q_shape[1], k_shape[1])) if "bias" in x else None

    for z, (q0, nq, k0, nk) in enumerate(_sequences(spec, x)):
        for h in range(hq):
            kh = h // group
            for i in range(nq):
                row = q0 + i
                js, s, cap_slope = _row(spec, x, (z, h, i, nq, nk), q[row, h], k[k0 : k0 + nk, kh])
                cols = k0 + js
                logits = np.append(s, x["sinks"][h]) if "sinks" in x else s
                if logits.size == 0:
                    continue
                lse[row, h] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
                p = np.exp(s - lse[row, h])
                drop = np.array([_drop_factor(spec, x, z, h, i, int(j)) for j in js])
                o[row, h] = (p * drop) @ v[cols, kh]
                delta = (do[row, h] @ o[row, h] if js.size else 0) - dl[row, h]
                if "sinks" in x:
                    gradients["sinks"][h] -= np.exp(x["sinks"][h] - lse[row, h]) * delta
                dv[cols, kh] += np.outer(p * drop, do[row, h])
                ds = p * (drop * (v[cols, kh] @ do[row, h]) - delta)
                if dbias is not None:
                    dbias[z, h, i, js] += ds
                ds *= cap_slope
                dq[row, h] += spec.scale * ds @ k[cols, kh]
                dk[cols, kh] += spec.scale * np.outer(ds, q[row, h])
    if dbias is not None:
        broadcast = tuple(axis for axis in range(4) if x["bias"].shape[axis] != dbias.shape[axis])
        gradients["bias"] = dbias.sum(broadcast, keepdims=True)
    lse = np.swapaxes(lse.reshape(*q_shape[:-2], hq), -1, -2)
    return Result(o.reshape(*q_shape[:-1], v_shape[-1]), lse, gradients)


def tangents_by_rows(
    spec: AttentionSpec, operands: dict[str, Any], tangents: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The tangents of out and lse in numpy float64, row after row; `tangents` has those of every moving operand."""
    x = {name: np.asarray(array) for name, array in operands.items()}
    x = {name: array if array.dtype.kind in "iub" else _wide(array) for name, array in x.items()}
    rows = {n: x[n].reshape(-1, *x[n].shape[-2:]) for n in ("query", "key", "value")}
    moved = {n: _wide(tangents[n]).reshape(rows[n].shape) for n in rows}
    hq, group = rows["query"].shape[1], rows["query"].shape[1] // rows["key"].shape[1]
    tout = np.zeros((*rows["query"].shape[:2], x["value"].shape[-1]))
    tlse = np.zeros(tout.shape[:2])
    for z, (q0, nq, k0, nk) in enumerate(_sequences(spec, x)):
        for h, i in np.ndindex(hq, nq):
            row, kh = q0 + i, h // group
            q, tq = rows["query"][row, h], moved["query"][row, h]
            js, s, cap_slope = _row(spec, x, (z, h, i, nq, nk), q, rows["key"][k0 : k0 + nk, kh])
            k, tk, v, tv = (a[n][k0 + js, kh] for n in ("key", "value") for a in (rows, moved))
            logits = np.append(s, x["sinks"][h]) if "sinks" in x else s
            if logits.size == 0:
                continue
            p = np.exp(logits - logits.max())
            p /= p.sum()
            ts = spec.scale * (k @ tq + tk @ q) * cap_slope
            if "bias" in x:
                ts += [_at(_wide(tangents["bias"]), z, h, i, int(j)) for j in js]
            t_logits = np.append(ts, _wide(tangents["sinks"])[h]) if "sinks" in x else ts
            tlse[row, h] = p @ t_logits
            tp = (p * (t_logits - tlse[row, h]))[: js.size]
            drop = np.array([_drop_factor(spec, x, z, h, i, int(j)) for j in js])
            tout[row, h] = (tp * drop) @ v + (p[: js.size] * drop) @ tv
    shape = x["query"].shape
    return tout.reshape(*shape[:-1], x["value"].shape[-1]), np.swapaxes(tlse.reshape(shape[:-1]), -1, -2)


def _sequences(spec: AttentionSpec, x: dict[str, np.ndarray]) -> list[tuple[int, int, int, int]]:
    """(first query token, queries, first key, keys) of each batch entry or sequence."""
    if spec.layout == "fixed":
        (b, sq), sk = x["query"].shape[:2], x["key"].shape[1]
        nq = [min(max(int(n), 0), sq) for n in x.get("q_lengths", [sq] * b)]
        nk = [min(max(int(n), 0), sk) for n in x.get("kv_lengths", [sk] * b)]
        return [(z * sq, nq[z], z * sk, nk[z]) for z in range(b)]
    cu_q, cu_k = (
        [max(min(max(int(c), 0), x[t].shape[0]) for c in x[name][: i + 1]) for i in range(x[name].size)]
        for name, t in (("cu_seqlens_q", "query"), ("cu_seqlens_k", "key"))
    )
    found = []
    for z in range(len(cu_q) - 1):
        nk = cu_k[z + 1] - cu_k[z]
        if "kv_lengths" in x:
            nk = min(nk, max(int(x["kv_lengths"][z]), 0))
        found.append((cu_q[z], cu_q[z + 1] - cu_q[z], cu_k[z], nk))
    return found


def _row(
    spec: AttentionSpec, x: dict[str, np.ndarray], place: tuple[int, int, int, int, int], q: Any, k: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The visible columns of a row, their scores, and the slope of the softcap there."""
    z, h, i, nq, nk = place
    diagonal = i + nk - nq if spec.align == "bottom_right" else i
    columns, scores, slopes = [], [], []
    for j in range(nk):
        if spec.left >= 0 and j < diagonal - spec.left:
            continue
        if spec.right >= 0 and j > diagonal + spec.right:
            continue
        if "q_segment_ids" in x and x["q_segment_ids"][z, i] != x["kv_segment_ids"][z, j]:
            continue
        if "mask" in x and not _at(x["mask"], z, h, i, j):
            continue
        if "bias" in x and _at(x["bias"], z, h, i, j) == -np.inf:
            continue
        if "draft_mask" in x and _draft_hides(x["draft_mask"], z, i, j - (nk - nq), nq):
            continue
        s, slope = spec.scale * float(q @ k[j]), 1.0
        if spec.softcap:
            s = spec.softcap * np.tanh(s / spec.softcap)
            slope = 1 - (s / spec.softcap) ** 2
        if "bias" in x:
            s += _at(x["bias"], z, h, i, j)
        if "alibi_slopes" in x:
            s -= _at(x["alibi_slopes"], z, h) * abs(diagonal - j)
        columns.append(j)
        scores.append(s)
        slopes.append(slope)
    return np.array(columns, int), np.array(scores, float), np.array(slopes, float)


def _draft_hides(mask: np.ndarray, z: int, a: int, b: int, tokens: int) -> bool:
    """Whether new token a of so many does not see new token b; b < 0 are keys before the new tokens."""
    return b >= 0 and tokens <= mask.shape[-1] and not _at(mask, z, a, b)


def visible_pairs(spec: AttentionSpec, operands: dict[str, Any]) -> int:
    """The visible pairs of a query and a key of all batch entries and heads, counted one at a time."""
    x = {name: np.asarray(array) for name, array in operands.items() if name != "dropout"}
    nothing, total = np.zeros(1), 0
    for z, (_, nq, _, nk) in enumerate(_sequences(spec, x)):
        for h in range(x["query"].shape[-2]):
            rows = (_row(spec, x, (z, h, i, nq, nk), nothing, np.zeros((nk, 1))) for i in range(nq))
            total += sum(columns.size for columns, _, _ in rows)
    return total


def _at(x: np.ndarray, *index: int) -> Any:
    return x[tuple(i if size > 1 else 0 for i, size in zip(index, x.shape, strict=True))]


def _drop_factor(spec: AttentionSpec, x: dict[str, np.ndarray], z: int, h: int, i: int, j: int) -> float:
    if "dropout" not in x:
        return 1.0
    kept = dropout_number(x["dropout"], z, h, i, j) >= round(spec.dropout_rate * 32768)
    return kept / (1 - spec.dropout_rate)


def dropout_number(dropout: Any, z: int, h: int, i: int, j: int) -> int:
    """The 15-bit number that decides about element (i, j) of a head: half j % 2 of word j // 8 % 4
    of its Philox block, and for the second eight rows of sixteen the same of words turned by a byte."""
    key0, key1, z0, h0, i0, j0 = map(int, dropout)
    i, j = i + i0, j + j0
    block = philox((key0, key1), (j // 32 * 4 + j // 2 % 4, i // 16 * 8 + i % 8, h + h0, z + z0))
    word = block[j // 8 % 4]
    if i % 16 >= 8:
        word = (word >> 8) + (word % 256 << 24)
    return word >> 16 * (j % 2) & 0x7FFF


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-7 in Python's own integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
