"""Attention over fixed-length batches."""

from __future__ import annotations

from typing import Any

import jax

from . import validate
from .autodiff import attend

Window = tuple[int | None, int | None]


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    align: str = "bottom_right",
    mask: jax.Array | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    q_lengths: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Any:
    """Exact attention, softmax(scale · q·kᵀ)·v, in memory linear in the sequence length.

    Rows that may attend to nothing give 0 (and lse −inf), never NaN. What lies past a length is never read.

    Args:
      query: `[b, sq, hq, d]`, float16, bfloat16 or float32.
      key: `[b, sk, hk, d]`, query's dtype; `hk` divides `hq` and query head i reads KV head `i // (hq // hk)`.
      value: `[b, sk, hk, dv]`, query's dtype.
      causal: attend only to keys at or before the query's diagonal.
      window: `(left, right)` keys visible around the diagonal, each an int ≥ 0 or None for unlimited.
      align: where the diagonal of query i lies: `"bottom_right"`, key i + (sk − sq) by the lengths in use,
        or `"top_left"`, key i.
      mask: boolean, broadcastable to `[b, hq, sq, sk]`; True = may attend.
      segment_ids: int32 `(q_ids [b, sq], kv_ids [b, sk])`, or one array when sq = sk; attend only where equal.
      q_lengths: int32 `[b]`, rows in use of each batch entry.
      kv_lengths: int32 `[b]`, keys in use of each batch entry.
      scale: factor on q·kᵀ, default 1/√d.
      softcap: c of `S ← c·tanh(S/c)`.
      bias: added to S, broadcastable to `[b, hq, sq, sk]`; −inf masks. Differentiable.
      alibi_slopes: float32 `[hq]` or `[b, hq]`; adds −slope·|distance to the diagonal|. No gradient.
      sinks: float32 `[hq]`, logits that take part in the softmax sum only. Differentiable.
      dropout_rate: share of attention weights dropped, in [0, 1).
      dropout_key: `jax.random.key`, needed when dropout_rate > 0; the same key drops the same weights on every
        platform and under every sharding.
      return_lse: also return log Σ exp(S), float32 `[b, hq, sq]`; differentiable.
      deterministic: make the backward pass bit-for-bit repeatable.
      implementation: `"cuda"`, `"cpu"`, `"xla"` (plain JAX), or None: the custom call of the platform compiled for.

    Returns:
      `[b, sq, hq, dv]` in query's dtype, or `(out, lse)`.

    Raises:
      ValueError, TypeError: while tracing, naming the argument, its value and what is allowed.
      NotImplementedError: when the implementation lacks the configuration or the platform has none.

    Source: Dao et al., FlashAttention (2022); Dao, FlashAttention-2 (2023).

    Example:
      >>> out = flash_attention(q, k, v, causal=True, window=(1024, 0))
    """
    options = dict(
        causal=causal, window=window, align=align, mask=mask, segment_ids=segment_ids, q_lengths=q_lengths,
        kv_lengths=kv_lengths, scale=scale, softcap=softcap, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks,
        dropout_rate=dropout_rate, dropout_key=dropout_key, deterministic=deterministic,
        implementation=implementation,
    )  # fmt: skip
    spec, operands = validate.fixed("flash_attention", query, key, value, options)
    out, lse = attend(spec, operands)
    return (out, lse) if return_lse else out
