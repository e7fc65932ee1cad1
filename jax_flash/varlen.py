"""Attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import Any

import jax

from . import validate
from .attention import Window
from .autodiff import attend


def flash_attention_varlen(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cu_seqlens_q: jax.Array,
    cu_seqlens_k: jax.Array | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    align: str = "bottom_right",
    kv_lengths: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention over sequences packed one after another, none seeing another.

    Sequence i holds the query tokens `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]` and the keys `cu_seqlens_k[i]` to
    `cu_seqlens_k[i + 1]`. Tokens outside every sequence are padding: never read, out 0, lse −inf, gradient 0.

    Args:
      query: `[tq, hq, d]`, float16, bfloat16 or float32.
      key: `[tk, hk, d]`, query's dtype; `hk` divides `hq`.
      value: `[tk, hk, dv]`, query's dtype.
      cu_seqlens_q: int32 `[n + 1]`, offsets of the sequences in query; empty ones are fine. Read as their running
        maximum clamped to [0, tq]; `check_inputs` tells when that changes anything.
      cu_seqlens_k: int32 `[n + 1]`, offsets in key and value; None: as cu_seqlens_q.
      kv_lengths: int32 `[n]`, keys in use of each sequence.
      alibi_slopes: float32 `[hq]` or `[n, hq]`.
      causal, window, align, scale, softcap, sinks, dropout_rate, dropout_key, deterministic, implementation:
        as in `flash_attention`, per sequence and by its own lengths.
      return_lse: also return log Σ exp(S), float32 `[hq, tq]`.

    Returns:
      `[tq, hq, dv]` in query's dtype, or `(out, lse)`.

    Raises:
      ValueError, TypeError, NotImplementedError: as `flash_attention`.

    Source: Dao, FlashAttention-2 (2023).

    Example:
      >>> cu_seqlens = jnp.array([0, 3, 10], jnp.int32)  # two documents, of 3 and 7 tokens
      >>> out = flash_attention_varlen(q, k, v, cu_seqlens, causal=True)
    """
    options = dict(
        causal=causal, window=window, align=align, kv_lengths=kv_lengths, scale=scale, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, dropout_rate=dropout_rate, dropout_key=dropout_key,
        deterministic=deterministic, implementation=implementation,
    )  # fmt: skip
    spec, operands = validate.varlen(
        "flash_attention_varlen", query, key, value, cu_seqlens_q, cu_seqlens_k, options
    )
    out, lse = attend(spec, operands)
    return (out, lse) if return_lse else out
