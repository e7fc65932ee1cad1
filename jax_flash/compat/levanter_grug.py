"""The attention of `levanter.grug`, over raw arrays, which Levanter's Snowball calls."""

from __future__ import annotations

from typing import Any, get_args

import jax.numpy as jnp
from jax import Array

from .. import masks
from ..attention import flash_attention
from ..checker import Checker
from ..options import ArrayLike, Implementation
from . import arguments

_CHECK = Checker("levanter.grug_attention")
_FIELDS = ("fa4_bounds", "is_causal", "segment_ids", "sliding_window")


def grug_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: Any,
    *,
    implementation: str | None = None,
) -> Array:
    """`flash_attention` with the arguments of `levanter.grug.attention.attention`.

    Args:
      q: `[B, Q, Hq, D]`, float16, bfloat16 or float32.
      k, v: `[B, K, Hkv, D]` and `[B, K, Hkv, Dv]`, q's dtype; `Hkv` divides `Hq`.
      mask: an `AttentionMask` of `levanter.grug`, by whose diagonal, window, segments and FA4 bounds kernels skip; a
        boolean or an additive array `[Q, K]` or `[B | 1, Q, K]`; or None.
      implementation: as in `flash_attention`. Grug's own names have no effect.

    Returns:
      `[B, Q, Hq, Dv]` in q's dtype, sharded as q. Differentiable with respect to q, k, v and an additive mask.

    Raises:
      NotImplementedError: for fields of an `AttentionMask` that this version does not know.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    One deviation: a query without a visible key gives 0, not the mean of all values.

    Source: the interface is Levanter's; the algorithm is Dao, FlashAttention-2 (2023).
    """
    query, key, value = (_CHECK.array(*x) for x in (("q", q), ("k", k), ("v", v)))
    for name, x in (("q", query), ("k", key), ("v", value)):
        _CHECK.rank(name, x, "B tokens heads D")
    ours = next((x for x in get_args(Implementation) if x == implementation), None)
    out: Array = flash_attention(
        query,
        key,
        value,
        align="top_left",
        implementation=ours,
        **_options(mask, query, key),
    )
    return out


def _options(mask: Any, query: Array, key: Array) -> dict[str, Any]:
    """The options of `flash_attention` that a mask means."""
    if mask is None:
        return {}
    if not hasattr(mask, "is_causal"):
        array = _CHECK.array("mask", mask)
        if array.ndim not in (2, 3):
            raise _CHECK.fail(f"mask must be [Q, K] or [B, Q, K], got shape {array.shape}")
        array = array[..., None, :, :] if array.ndim == 3 else array
        if array.dtype == jnp.bool_:
            return dict(mask=array)
        return dict(bias=_CHECK.bias("mask", array, query.dtype))
    instead = f"mask.materialize_mask({query.shape[1]}, {key.shape[1]}) is an array with all of them"
    arguments.known_fields(_CHECK, mask, _FIELDS, instead)
    if mask.fa4_bounds is not None:  # valid[b, q] and lower[b, q] ≤ k ≤ q; Levanter then reads nothing else
        lower, valid = (jnp.asarray(x) for x in mask.fa4_bounds)
        end = jnp.arange(1, query.shape[1] + 1, dtype=jnp.int32)
        high = jnp.where(valid.astype(bool), end, 0)
        return dict(mask=masks.ranges(lower.astype(jnp.int32)[:, None], high[:, None]))
    options: dict[str, Any] = dict(causal=mask.is_causal)
    if mask.sliding_window is not None:
        options["window"] = mask.sliding_window - 1, None
    if mask.segment_ids is not None:
        ids = []
        for name, x, array in zip(("q_ids", "kv_ids"), mask.segment_ids, (query, key)):
            wanted = array.shape[:2]
            one = _CHECK.broadcastable(f"segment_ids' {name}", _CHECK.int32(name, x), wanted, "B tokens")
            ids.append(jnp.broadcast_to(one, wanted))
        options["segment_ids"] = tuple(ids)
    return options
