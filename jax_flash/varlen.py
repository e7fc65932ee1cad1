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
    """Attention within each of several sequences that are packed along one token axis.

    Sequence i holds the query tokens `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]` and the keys `cu_seqlens_k[i]` to
    `cu_seqlens_k[i + 1]`. Tokens outside every sequence are padding: they are never read, and their out is 0, their lse
    −inf and their gradient 0.

    Args:
      query: `[tq, hq, d]`, float16, bfloat16 or float32.
      key: `[tk, hk, d]`, query's dtype; `hk` divides `hq`.
      value: `[tk, hk, dv]`, query's dtype.
      cu_seqlens_q: int32 `[n + 1]`, offsets of the sequences in query; sequences may be empty. The kernels read the
        running maximum of these values clamped to [0, tq]; `check_inputs` raises if that changes any of them.
      cu_seqlens_k: int32 `[n + 1]`, offsets in key and value; None means cu_seqlens_q.
      kv_lengths: int32 `[n]`, keys in use of each sequence, all by default.
      alibi_slopes: float32 `[hq]` or `[n, hq]`.
      causal, window, align, scale, softcap, sinks, dropout_rate, dropout_key, deterministic, implementation:
        as in `flash_attention`, with each sequence's own lengths.
      return_lse: also return lse = log Σ exp(S), float32 `[hq, tq]`; differentiable.

    Returns:
      `[tq, hq, dv]` in query's dtype, or the pair `(out, lse)`.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

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
