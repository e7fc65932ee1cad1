"""Every shape, dtype and option rule of the public functions, and every message.

Each public function turns its arguments into an AttentionSpec and a dictionary of normalised operands here. Nothing is
checked again below this file, except for what only the device knows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from . import philox
from ._jax import is_symbolic, same_dim, whole_along
from .checker import DTYPES, INT32_MAX, MARK_STATIC, Checker, is_function, is_int
from .masks import Mask
from .operands import OPTIONAL
from .options import (
    Arguments,
    DenseArguments,
    Implementation,
    RingArguments,
    RingMode,
    SequenceArguments,
    VarlenArguments,
)
from .spec import ALIGNMENTS, ORDERS, UNLIMITED, AttentionSpec, Layout, Ring
from .visible import operands as mask_operands

IMPLEMENTATIONS = get_args(Implementation)
MODES = get_args(RingMode)
CAST = "; cast one of them by .astype(…)"  # the way out where dtypes differ
OF_RANK_3 = ": [:, None] makes [b, 1, sq, sk] of it, [None] makes [1, hq, sq, sk]"
LARGEST_SOFTCAP = 1e32  # scores below 1e-38 of the softcap become 0

Operands = dict[str, jax.Array]


def _tokens(check: Checker, arguments: DenseArguments, layout: str) -> Operands:
    """query, key and value, with shapes and dtypes checked; `layout` names the dims before the heads, 'b s' or 't'."""
    implementation = implementation_name(check, arguments.implementation)
    q = check.array("query", arguments.query)
    k = check.array("key", arguments.key)
    v = k if arguments.value is None else check.array("value", arguments.value)
    allowed = DTYPES + (("float64",) if implementation == "xla" else ())
    hint = '; implementation="xla" takes float64' if q.dtype == jnp.float64 else ""
    check.dtype("query", q, allowed, hint)
    for name, x in (("key", k), ("value", v)):
        if x.dtype != q.dtype:
            raise check.fail(
                f"{name} has dtype {x.dtype}, which differs from query's {q.dtype}{CAST}", TypeError
            )
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
    check.head_dim("query", q, implementation)
    check.head_dim("value", v, implementation)
    for name, x in (("query", q), ("key", k)):
        if not is_symbolic(x.shape[-3]) and x.shape[-3] > INT32_MAX:
            raise check.fail(f"{name} has length {x.shape[-3]}, allowed are at most {INT32_MAX}")
    return {"query": q, "key": k, "value": v}


def check_heads(check: Checker, hq: Any, hk: Any, key: str = "key", hint: str = "") -> None:
    """Checks that hq is a multiple of hk; `key` is the name of the argument with hk heads, `hint` ends the error."""
    if is_symbolic(hq) or is_symbolic(hk):
        raise check.fail(f"the numbers of heads must be static, got query {hq}, {key} {hk}")
    if hk < 1 or hq < 1:
        raise check.fail(f"query and {key} must have at least one head, got {hq} and {hk}")
    if hq % hk:
        raise check.fail(f"{key} has {hk} heads, which does not divide query's {hq}{hint}")


def band(check: Checker, causal: Any, window: Any) -> tuple[int, int]:
    """The numbers of keys visible to the left and to the right of the diagonal."""
    left = right = UNLIMITED
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise check.fail(
                f"window must be None or a pair (left, right), got {window!r}{_window_hint(window)}",
                TypeError,
            )
        left, right = (_window_side(check, side, x) for side, x in zip(("left", "right"), window))
    if check.flag("causal", causal):
        right = 0
    return left, right


def _window_hint(window: Any) -> str:
    """A hint at what a window of one number may have meant."""
    if not is_int(window) or window < 1:
        return ""
    return (
        f"; a query and the {window - 1} keys before it (Gemma, Hugging Face, MaxText) are ({window - 1}, 0), "
        f"a query and the {window} keys before it (flash_attn) are ({window}, 0)"
    )


def _window_side(check: Checker, side: str, x: Any) -> int:
    if x is None:
        return UNLIMITED
    if not is_int(x):
        instead = (
            "; mask=masks.window(left, right) takes arrays" if isinstance(x, (jax.Array, np.ndarray)) else ""
        )
        raise check.fail(f"window's {side} must be an int ≥ 0 or None, got {x!r}{instead}", TypeError)
    if x < 0:
        raise check.fail(f"window's {side} must be ≥ 0, or None for unlimited, got {x}")
    return int(x) if x < INT32_MAX else UNLIMITED


def require_dropout_key(check: Checker, name: str, rate: object, key: Any) -> None:
    """`name`: that of the rate."""
    if key is None:
        raise check.fail(f"{name} is {rate}, which needs a dropout_key (jax.random.key)")


def dropout_key(check: Checker, name: str, given: Any) -> jax.Array:
    """The argument `name` as one key of jax.random, typed or the words of one."""
    if is_function(given):  # such as nnx.Rngs and its streams
        raise check.fail(
            f"{name} must be one jax.random.key, got {type(given).__name__}, which makes keys: "
            "pass rngs.dropout() or rngs()",
            TypeError,
        )
    key = check.array(name, given)
    words = key.dtype == jnp.uint32 and key.shape in ((2,), (4,))
    if not words and (key.shape != () or not _is_typed(key)):
        raise check.fail(
            f"{name} must be one jax.random.key, got dtype {key.dtype} and shape {key.shape}", TypeError
        )
    return key


def _is_typed(key: jax.Array) -> bool:
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key))


def _dropout_operand(check: Checker, rate: object, given: Any) -> jax.Array:
    """uint32 [6]: two key words, then the global offsets, zeros which sharding replaces."""
    require_dropout_key(check, "dropout_rate", rate, given)
    key = dropout_key(check, "dropout_key", given)
    words = jax.random.key_data(key) if _is_typed(key) else whole_along(key, 0)
    if jax.debug_key_reuse.value and _is_typed(key):
        jax.random.bits(key)  # consumes the key for JAX's checker, as key_data does not
    return jnp.concatenate([philox.key_words(words), jnp.zeros(4, jnp.uint32)])


def _dropout_rate(check: Checker, given: Any) -> float:
    rate = check.rate("dropout_rate", given, MARK_STATIC)
    threshold = philox.threshold(rate)
    if threshold == philox.NUMBERS:
        raise check.fail(
            f"dropout_rate must be below 1 when rounded to a multiple of 1/{philox.NUMBERS}, got {rate}"
        )
    return threshold / philox.NUMBERS  # the rate at which elements are dropped, exact in float32


def _softcap(check: Checker, given: Any, scale: float) -> float:
    """The softcap, 0 for none."""
    softcap = 0.0 if given is None else check.number("softcap", given, MARK_STATIC)
    if softcap < 0:
        raise check.fail(f"softcap must be positive, or None or 0 for none, got {softcap}")
    # The kernels compute scale / softcap and multiples of it in float32.
    limits = np.finfo(np.float32)
    least = max(float(limits.tiny), 4 * abs(scale) / float(limits.max))
    if softcap and not least <= softcap <= LARGEST_SOFTCAP:
        raise check.fail(
            f"softcap must be None, 0, or from {least:.2g} to {LARGEST_SOFTCAP:g} in float32 with a scale of "
            f"{scale:.4g}, got {softcap}"
        )
    return softcap


def static_spec(check: Checker, layout: Layout, operands: Operands, arguments: Arguments) -> AttentionSpec:
    """The AttentionSpec from the static options that all layouts share; adds the dropout operand to `operands`."""
    check.flag("return_lse", arguments.return_lse)
    row_max = check.flag("return_max", arguments.return_max)
    left, right = band(check, arguments.causal, arguments.window)
    check.one_of("align", arguments.align, ALIGNMENTS)
    d = operands["query"].shape[-1]
    scale = d**-0.5
    if arguments.scale is not None:
        scale = check.number("scale", arguments.scale, "multiply query by it and pass scale=1.0")
    rate, value_dim = 0.0, 0
    if isinstance(arguments, DenseArguments):
        value_dim = d if arguments.value is None else 0
        rate = _dropout_rate(check, arguments.dropout_rate)
        if rate:
            operands["dropout"] = _dropout_operand(check, arguments.dropout_rate, arguments.dropout_key)
    return AttentionSpec(
        layout=layout,
        left=left,
        right=right,
        align=arguments.align,
        scale=scale,
        softcap=_softcap(check, arguments.softcap, scale),
        dropout_rate=rate,
        deterministic=check.flag("deterministic", arguments.deterministic),
        operands=tuple(name for name in OPTIONAL if name in operands),
        implementation=implementation_name(check, arguments.implementation),
        value_dim=value_dim,
        row_max=row_max,
    )


def implementation_name(check: Checker, x: Any) -> Implementation | None:
    if x is not None and not (isinstance(x, str) and x in IMPLEMENTATIONS):
        raise check.fail(f"implementation must be None or one of {IMPLEMENTATIONS}, got {x!r}")
    return cast("Implementation | None", x)


def score_operands(
    check: Checker, operands: Operands, arguments: Arguments, sequences: Any, dim: str
) -> None:
    """Adds alibi_slopes, [hq] or [sequences, hq], and sinks, [hq] or for each token, to `operands`."""
    *tokens, hq, _ = operands["query"].shape
    if arguments.alibi_slopes is not None:
        given = check.float32("alibi_slopes", arguments.alibi_slopes)
        slopes = check.broadcastable("alibi_slopes", given, (sequences, hq), f"{dim} hq")
        if slopes.shape[-1] != hq:
            raise check.fail(
                f"alibi_slopes must have one slope for each of query's {hq} heads, got {given.shape}"
            )
        operands["alibi_slopes"] = slopes
    if arguments.sinks is not None:
        sinks = check.float32("sinks", arguments.sinks)
        by_head, by_token = (hq,), (*tokens, hq)
        wanted = by_head if sinks.ndim == 1 else by_token
        if sinks.ndim != len(wanted) or not all(map(same_dim, sinks.shape, wanted)):
            dims = f"{dim} sq hq" if len(tokens) == 2 else "tq hq"
            raise check.fail(
                f"sinks must have shape [hq] = {by_head} or [{dims}] = {by_token}, got {sinks.shape}"
            )
        operands["sinks"] = jnp.expand_dims(sinks, range(len(by_token) - sinks.ndim))


def fixed(op: str, arguments: SequenceArguments, ring: Ring | None = None) -> tuple[AttentionSpec, Operands]:
    """The spec and operands of a flash_attention call, or of one on a shard of a sequence."""
    check = Checker(op)
    operands = _tokens(check, arguments, "b s")
    b, sq, hq, _ = operands["query"].shape
    sk = operands["key"].shape[1]
    columns = sk if ring is None else sk * ring.size
    if arguments.q_lengths is not None:
        operands["q_lengths"] = check.lengths("q_lengths", arguments.q_lengths, b, "b")
    if arguments.kv_lengths is not None:
        operands["kv_lengths"] = check.lengths("kv_lengths", arguments.kv_lengths, b, "b")
    if arguments.segment_ids is not None:
        ids = check.segment_pair(arguments.segment_ids)
        if ids is not arguments.segment_ids and not same_dim(sq, sk):
            raise check.fail(
                f"segment_ids must be a pair (q_ids, kv_ids) when query's length {sq} differs from key's {sk}"
            )
        for name, part, s, dims in zip(("q_segment_ids", "kv_segment_ids"), ids, (sq, sk), ("b sq", "b sk")):
            operands[name] = check.int32("segment_ids", part)
            check.shape("segment_ids", operands[name], (b, s), dims)
    if arguments.mask is not None and not isinstance(arguments.mask, Mask):
        operands["mask"] = _boolean_mask(check, arguments.mask, (b, hq, sq, columns))
    if arguments.bias is not None:
        of_query = operands["query"].dtype
        bias = (check.array if of_query == jnp.float64 else check.narrow)("bias", arguments.bias)
        if bias.dtype.name not in DTYPES and bias.dtype != of_query:
            raise check.fail(
                f"bias must be {', '.join(DTYPES)}, got {bias.dtype}; cast it with .astype('float32')",
                TypeError,
            )
        operands["bias"] = check.broadcastable("bias", bias, (b, hq, sq, columns), "b hq sq sk")
    score_operands(check, operands, arguments, b, "b")
    spec = static_spec(check, "fixed", operands, arguments)
    if check.flag("bias_first", arguments.bias_first) and spec.softcap and "bias" in operands:
        spec = replace(spec, bias_first=True)
    if isinstance(arguments.mask, Mask):
        spec = mask_operands.apply(check, arguments.mask, spec, operands, ring)
    return spec, operands


def _boolean_mask(check: Checker, given: Any, scores: tuple[Any, ...]) -> jax.Array:
    """A boolean array, `[b|1, hq|1, sq|1, sk|1]`."""
    mask = check.array("mask", given)
    if mask.dtype != jnp.bool_:
        raise check.fail(
            f"mask must be boolean (True = may attend), got {mask.dtype}; use bias for additive",
            TypeError,
        )
    if mask.ndim not in (2, 4):
        raise check.fail(
            f"mask must have rank 2 [sq sk] or 4 [b hq sq sk], got shape {mask.shape}"
            f"{OF_RANK_3 if mask.ndim == 3 else ''}"
        )
    return check.broadcastable("mask", mask, scores, "b hq sq sk")


def ring(op: str, arguments: RingArguments) -> tuple[AttentionSpec, Operands]:
    """The spec and operands of a ring_attention call: those of a flash_attention call on a shard, and the ring."""
    check = Checker(op)
    ring_names(check, arguments)
    given, order = arguments.axis_name, arguments.order
    axes = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    mesh = jax.sharding.get_abstract_mesh()
    manual = mesh.manual_axes
    known = all(isinstance(axis, str) and axis in manual for axis in axes)
    if not axes or not known or len(set(axes)) < len(axes):
        raise check.fail(
            f"axis_name must name axes that are manual in the jax.shard_map around the call, {manual}, got {given!r}"
        )
    size = jax.lax.axis_size(axes)
    ring = Ring.on(mesh, axes, size, order)
    spec, operands = fixed(op, arguments, ring)
    for name in ("query", "key"):
        length = operands[name].shape[1]
        if is_symbolic(length):
            raise check.fail(f"{name} must have a static length, got {length}")
        if length * size > INT32_MAX:
            raise check.fail(f"{name} has {length * size} tokens on {size} devices, allowed are {INT32_MAX}")
        if order == "zigzag" and length % 2:
            raise check.fail(
                f'{name} has {length} tokens on each device; order="zigzag" needs an even number'
            )
    hq = operands["query"].shape[2]
    if arguments.mode == "all_to_all" and hq % size:
        raise check.fail(
            f'mode="all_to_all" gives each of the {size} devices along {given!r} as many heads, and query has {hq}; '
            f'mode="ring" takes any number'
        )
    return replace(spec, ring=ring), operands


def ring_names(check: Checker, arguments: RingArguments) -> None:
    for name, given, allowed in (("order", arguments.order, ORDERS), ("mode", arguments.mode, MODES)):
        check.one_of(name, given, allowed)


def varlen(op: str, arguments: VarlenArguments) -> tuple[AttentionSpec, Operands]:
    """The spec and operands of a flash_attention_varlen call."""
    check = Checker(op)
    operands = _tokens(check, arguments, "t")
    tq, tk = operands["query"].shape[0], operands["key"].shape[0]
    cu_q = check.int32("cu_seqlens_q", arguments.cu_seqlens_q)
    check.rank("cu_seqlens_q", cu_q, "n+1")
    if same_dim(cu_q.shape[0], 0):
        raise check.fail("cu_seqlens_q must have n + 1 ≥ 1 offsets, got 0")
    if arguments.cu_seqlens_k is None:
        if not same_dim(tq, tk):
            raise check.fail(f"cu_seqlens_k is needed when key has {tk} tokens and query {tq}")
        cu_k = cu_q
    else:
        cu_k = check.int32("cu_seqlens_k", arguments.cu_seqlens_k)
        check.shape("cu_seqlens_k", cu_k, cu_q.shape, "n+1")
    operands |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    n = cu_q.shape[0] - 1
    if arguments.kv_lengths is not None:
        operands["kv_lengths"] = check.lengths("kv_lengths", arguments.kv_lengths, n, "n")
    score_operands(check, operands, arguments, n, "n")
    same = arguments.cu_seqlens_k is None or arguments.cu_seqlens_k is arguments.cu_seqlens_q
    spec = static_spec(check, "varlen", operands, arguments)
    spec = replace(spec, same_offsets=same and same_dim(tq, tk))
    if arguments.mask is not None:
        mask = mask_operands.require_mask(check, arguments.mask)
        spec = mask_operands.apply(check, mask, spec, operands)
    return spec, operands
