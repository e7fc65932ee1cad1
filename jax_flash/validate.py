"""Every shape, dtype and option rule of the public functions, and every message.

Each public function turns its arguments into an AttentionSpec and a dictionary of normalised operands here. Nothing is
checked again below this file, except for what only the device knows.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._jax import is_symbolic, same_dim
from .operands import OPTIONAL
from .spec import ALIGNMENTS, UNLIMITED, AttentionSpec, Layout

DTYPES = ("float16", "bfloat16", "float32")
MAX_HEAD_DIM = 256
IMPLEMENTATIONS = ("cpu", "cuda", "xla")
_INT32_MAX = 2**31 - 1

Operands = dict[str, jax.Array]


class Checker:
    """Checks of single arguments; every message begins with the name of the public function."""

    def __init__(self, op: str):
        self.op = op

    def fail(self, message: str, error: type[Exception] = ValueError) -> Exception:
        return error(f"{self.op}: {message}")

    def array(self, name: str, x: Any) -> jax.Array:
        if x is None or isinstance(x, (str, bytes)):
            raise self.fail(f"{name} must be an array, got {x!r}", TypeError)
        return jnp.asarray(x)

    def dtype(self, name: str, x: jax.Array, allowed: tuple[str, ...] = DTYPES, hint: str = "") -> None:
        if x.dtype.name not in allowed:
            raise self.fail(f"{name} has dtype {x.dtype}, allowed are {', '.join(allowed)}{hint}", TypeError)

    def rank(self, name: str, x: jax.Array, dims: str) -> None:
        wanted = len(dims.split())
        if x.ndim != wanted:
            raise self.fail(f"{name} must have rank {wanted} [{dims}], got shape {x.shape}")

    def dim(self, name: str, axis: str, got: Any, wanted: Any, owner: str) -> None:
        if not same_dim(got, wanted):
            raise self.fail(f"{name} has {axis} {got}, which differs from {owner}'s {wanted}")

    def shape(self, name: str, x: jax.Array, wanted: tuple[Any, ...], dims: str) -> None:
        if x.ndim != len(wanted) or not all(map(same_dim, x.shape, wanted)):
            raise self.fail(f"{name} must have shape [{dims}] = {wanted}, got {x.shape}")

    def int32(self, name: str, x: Any) -> jax.Array:
        if not hasattr(x, "dtype"):
            x = jnp.asarray(x, jnp.int32)
        if x.dtype != jnp.int32:
            raise self.fail(f"{name} must be int32, got {x.dtype}; cast it with .astype('int32')", TypeError)
        return jnp.asarray(x)

    def float32(self, name: str, x: Any) -> jax.Array:
        array = self.array(name, x)
        if array.dtype != jnp.float32:
            raise self.fail(
                f"{name} must be float32, got {array.dtype}; cast it with .astype('float32')", TypeError
            )
        return array

    def number(self, name: str, x: Any) -> float:
        if isinstance(x, bool) or not isinstance(x, numbers.Real):
            raise self.fail(
                f"{name} must be a Python number (it is compiled in), got {type(x).__name__}", TypeError
            )
        if not np.isfinite(float(x)):
            raise self.fail(f"{name} must be finite, got {x}")
        return float(x)

    def flag(self, name: str, x: Any) -> bool:
        if not isinstance(x, (bool, np.bool_)):
            raise self.fail(f"{name} must be True or False, got {x!r}", TypeError)
        return bool(x)

    def broadcastable(self, name: str, x: jax.Array, wanted: tuple[Any, ...], dims: str) -> jax.Array:
        """x, with leading dimensions of 1 up to the wanted rank; each dimension must be 1 or the wanted one."""
        full = (1,) * (len(wanted) - x.ndim) + x.shape
        if x.ndim > len(wanted) or not all(
            same_dim(got, 1) or same_dim(got, want) for got, want in zip(full, wanted)
        ):
            raise self.fail(f"{name} must broadcast to [{dims}] = {wanted}, got shape {x.shape}")
        return x.reshape(full) if x.ndim < len(wanted) else x


def _tokens(
    check: Checker, query: Any, key: Any, value: Any, layout: str, implementation: str | None
) -> Operands:
    """query, key and value, with shapes and dtypes checked; `layout` names the dims before the heads, 'b s' or 't'."""
    q, k, v = (check.array(n, x) for n, x in (("query", query), ("key", key), ("value", value)))
    allowed = DTYPES + (("float64",) if implementation == "xla" else ())
    hint = '; implementation="xla" takes float64' if q.dtype == jnp.float64 else ""
    check.dtype("query", q, allowed, hint)
    for name, x in (("key", k), ("value", v)):
        if x.dtype != q.dtype:
            raise check.fail(f"{name} has dtype {x.dtype}, which differs from query's {q.dtype}", TypeError)
    check.rank("query", q, f"{layout} hq d".replace("s ", "sq ").replace("t ", "tq "))
    check.rank("key", k, f"{layout} hk d".replace("s ", "sk ").replace("t ", "tk "))
    check.rank("value", v, f"{layout} hk dv".replace("s ", "sk ").replace("t ", "tk "))
    if layout == "b s":
        check.dim("key", "batch size", k.shape[0], q.shape[0], "query")
        check.dim("value", "batch size", v.shape[0], q.shape[0], "query")
    check.dim("key", "head dim", k.shape[-1], q.shape[-1], "query")
    check.dim("value", "length", v.shape[-3], k.shape[-3], "key")
    check.dim("value", "head count", v.shape[-2], k.shape[-2], "key")
    check_heads(check, q.shape[-2], k.shape[-2])
    for name, x in (("query", q), ("value", v)):
        d = x.shape[-1]
        if is_symbolic(d) or d < 1:
            raise check.fail(f"{name} must have a static head dim of at least 1, got {d}")
        if d > MAX_HEAD_DIM and implementation != "xla":
            raise check.fail(
                f'{name} has head dim {d}, allowed are 1 to {MAX_HEAD_DIM}; implementation="xla" takes any'
            )
    for name, x in (("query", q), ("key", k)):
        if not is_symbolic(x.shape[-3]) and x.shape[-3] > _INT32_MAX:
            raise check.fail(f"{name} has length {x.shape[-3]}, allowed are at most {_INT32_MAX}")
    return {"query": q, "key": k, "value": v}


def check_heads(check: Checker, hq: Any, hk: Any, key: str = "key") -> None:
    """Checks that hq is a multiple of hk; `key` is the name of the argument with hk heads."""
    if is_symbolic(hq) or is_symbolic(hk):
        raise check.fail(f"the numbers of heads must be static, got query {hq}, {key} {hk}")
    if hk < 1 or hq < 1:
        raise check.fail(f"query and {key} must have at least one head, got {hq} and {hk}")
    if hq % hk:
        raise check.fail(f"{key} has {hk} heads, which does not divide query's {hq}")


def _band(check: Checker, causal: Any, window: Any) -> tuple[int, int]:
    """The numbers of keys visible to the left and to the right of the diagonal."""
    left = right = UNLIMITED
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise check.fail(f"window must be None or a pair (left, right), got {window!r}", TypeError)
        left, right = (_window_side(check, side, x) for side, x in zip(("left", "right"), window))
    if check.flag("causal", causal):
        right = 0
    return left, right


def _window_side(check: Checker, side: str, x: Any) -> int:
    if x is None:
        return UNLIMITED
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise check.fail(f"window's {side} must be an int ≥ 0 or None, got {x!r}", TypeError)
    if x < 0:
        raise check.fail(f"window's {side} must be ≥ 0, or None for unlimited, got {x}")
    return int(x) if x < _INT32_MAX else UNLIMITED


def dropout_operand(check: Checker, rate: float, key: Any) -> jax.Array | None:
    """uint32 [6]: two key words, then the global offsets, zeros which sharding replaces; None without dropout."""
    if rate == 0.0:
        return None
    if key is None:
        raise check.fail(f"dropout_rate is {rate}, which needs a dropout_key (jax.random.key)")
    key = check.array("dropout_key", key)
    words = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if words.dtype != jnp.uint32 or words.shape not in ((2,), (4,)):
        raise check.fail(
            f"dropout_key must be one jax.random.key, got dtype {key.dtype} and shape {key.shape}", TypeError
        )
    if words.shape == (4,):
        words = words[:2] ^ words[2:]
    return jnp.concatenate([words, jnp.zeros(4, jnp.uint32)])


def static_spec(
    check: Checker, layout: Layout, operands: Operands, options: dict[str, Any], **paged: Any
) -> AttentionSpec:
    """The AttentionSpec from the static options that all layouts share; adds the dropout operand to `operands`."""
    left, right = _band(check, options["causal"], options["window"])
    if options["align"] not in ALIGNMENTS:
        raise check.fail(f"align must be one of {ALIGNMENTS}, got {options['align']!r}")
    d = operands["query"].shape[-1]
    scale = d**-0.5 if options["scale"] is None else check.number("scale", options["scale"])
    softcap = 0.0
    if options["softcap"] is not None:
        softcap = check.number("softcap", options["softcap"])
        if softcap <= 0:
            raise check.fail(f"softcap must be positive, or None for none, got {softcap}")
    rate = check.number("dropout_rate", options.get("dropout_rate", 0.0))
    if not 0 <= rate < 1:
        raise check.fail(f"dropout_rate must be in [0, 1), got {rate}")
    dropout = dropout_operand(check, rate, options.get("dropout_key"))
    if dropout is not None:
        operands["dropout"] = dropout
    return AttentionSpec(
        layout=layout,
        left=left,
        right=right,
        align=options["align"],
        scale=scale,
        softcap=softcap,
        dropout_rate=rate,
        deterministic=check.flag("deterministic", options["deterministic"]),
        operands=tuple(name for name in OPTIONAL if name in operands),
        implementation=implementation_name(check, options["implementation"]),
        **paged,
    )


def implementation_name(check: Checker, x: str | None) -> str | None:
    if x is not None and x not in IMPLEMENTATIONS:
        raise check.fail(f"implementation must be None or one of {IMPLEMENTATIONS}, got {x!r}")
    return x


def score_operands(
    check: Checker, operands: Operands, options: dict[str, Any], sequences: Any, dim: str
) -> None:
    """Adds alibi_slopes, [hq] or [sequences, hq], and sinks, [hq], to `operands`."""
    hq = operands["query"].shape[-2]
    if options["alibi_slopes"] is not None:
        given = check.float32("alibi_slopes", options["alibi_slopes"])
        slopes = check.broadcastable("alibi_slopes", given, (sequences, hq), f"{dim} hq")
        if slopes.shape[-1] != hq:
            raise check.fail(
                f"alibi_slopes must have one slope for each of query's {hq} heads, got {given.shape}"
            )
        operands["alibi_slopes"] = slopes
    if options["sinks"] is not None:
        operands["sinks"] = check.float32("sinks", options["sinks"])
        check.shape("sinks", operands["sinks"], (hq,), "hq")


def fixed(
    op: str, query: Any, key: Any, value: Any, options: dict[str, Any]
) -> tuple[AttentionSpec, Operands]:
    """The spec and operands of a flash_attention call."""
    check = Checker(op)
    operands = _tokens(check, query, key, value, "b s", implementation_name(check, options["implementation"]))
    b, sq, hq, _ = operands["query"].shape
    sk = operands["key"].shape[1]
    for name in ("q_lengths", "kv_lengths"):
        if options[name] is not None:
            operands[name] = check.int32(name, options[name])
            check.shape(name, operands[name], (b,), "b")
    if options["segment_ids"] is not None:
        ids = _segment_pair(check, options["segment_ids"], sq, sk)
        for name, part, s, dims in zip(("q_segment_ids", "kv_segment_ids"), ids, (sq, sk), ("b sq", "b sk")):
            operands[name] = check.int32("segment_ids", part)
            check.shape("segment_ids", operands[name], (b, s), dims)
    if options["mask"] is not None:
        mask = check.array("mask", options["mask"])
        if mask.dtype != jnp.bool_:
            raise check.fail(
                f"mask must be boolean (True = may attend), got {mask.dtype}; use bias for additive",
                TypeError,
            )
        operands["mask"] = check.broadcastable("mask", mask, (b, hq, sq, sk), "b hq sq sk")
    if options["bias"] is not None:
        bias = check.array("bias", options["bias"])
        if bias.dtype.name not in DTYPES and bias.dtype != operands["query"].dtype:
            raise check.fail(f"bias must be {', '.join(DTYPES)}, got {bias.dtype}", TypeError)
        operands["bias"] = check.broadcastable("bias", bias, (b, hq, sq, sk), "b hq sq sk")
    score_operands(check, operands, options, b, "b")
    return static_spec(check, "fixed", operands, options), operands


def _segment_pair(check: Checker, ids: Any, sq: Any, sk: Any) -> Sequence[Any]:
    if isinstance(ids, (tuple, list)):
        if len(ids) != 2:
            raise check.fail(f"segment_ids must be one array or a pair (q_ids, kv_ids), got {len(ids)} items")
        return ids
    if not same_dim(sq, sk):
        raise check.fail(
            f"segment_ids must be a pair (q_ids, kv_ids) when query's length {sq} differs from key's {sk}"
        )
    return ids, ids


def varlen(
    op: str, query: Any, key: Any, value: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, options: dict[str, Any]
) -> tuple[AttentionSpec, Operands]:
    """The spec and operands of a flash_attention_varlen call."""
    check = Checker(op)
    operands = _tokens(check, query, key, value, "t", implementation_name(check, options["implementation"]))
    tq, tk = operands["query"].shape[0], operands["key"].shape[0]
    cu_q = check.int32("cu_seqlens_q", cu_seqlens_q)
    check.rank("cu_seqlens_q", cu_q, "n+1")
    if same_dim(cu_q.shape[0], 0):
        raise check.fail("cu_seqlens_q must have n + 1 ≥ 1 offsets, got 0")
    if cu_seqlens_k is None:
        if not same_dim(tq, tk):
            raise check.fail(f"cu_seqlens_k is needed when key has {tk} tokens and query {tq}")
        cu_k = cu_q
    else:
        cu_k = check.int32("cu_seqlens_k", cu_seqlens_k)
        check.shape("cu_seqlens_k", cu_k, cu_q.shape, "n+1")
    operands |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    n = cu_q.shape[0] - 1
    if options["kv_lengths"] is not None:
        operands["kv_lengths"] = check.int32("kv_lengths", options["kv_lengths"])
        check.shape("kv_lengths", operands["kv_lengths"], (n,), "n")
    score_operands(check, operands, options, n, "n")
    return static_spec(check, "varlen", operands, options), operands
