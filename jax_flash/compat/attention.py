"""`flash_attn_func` and `flash_attn_varlen_func`."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax.numpy as jnp
from jax import Array

from ..attention import flash_attention
from ..checker import Checker
from ..options import ArrayLike, Implementation, IndexLike, Number
from ..paged.attention import paged_attention
from ..varlen import flash_attention_varlen
from . import arguments
from .options import FlashAttnOptions, FlashAttnVarlenOptions, WindowSize


# fmt: off
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    *, return_attn_probs: Literal[False] = ..., **options: Unpack[FlashAttnOptions],
) -> Array: ...
@overload
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike,
    *, return_attn_probs: Literal[True], **options: Unpack[FlashAttnOptions],
) -> tuple[Array, Array, None]: ...
@overload  # with options by position
def flash_attn_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, dropout_p: float, /,
    *options: Any, **named: Any,
) -> Any: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attn_func(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def flash_attn_func(  # type: ignore[misc]  # only an overload has `unpacked`
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    dropout_p: float = 0.0,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: Number = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    dropout_key: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array, None]:
    """`flash_attention` with flash_attn's arguments.

    Args:
      q: `[b, sq, hq, d]`, float16, bfloat16 or float32.
      k, v: `[b, sk, hk, d]` and `[b, sk, hk, dv]`, q's dtype; `hk` divides `hq`.
      dropout_p: probability that an attention weight is dropped; needs dropout_key.
      softmax_scale: factor of q·kᵀ, 1/√d by default.
      causal: query i attends to keys 0 … i + (sk − sq).
      window_size: (left, right) keys visible around that diagonal; −1 for unlimited.
      softcap: c in `S ← c·tanh(S/c)`; 0.0 or less for none.
      alibi_slopes: float32 `[hq]` or `[b, hq]`; adds −slope·|i + sk − sq − j|.
      deterministic: makes the backward pass bit-for-bit reproducible.
      return_attn_probs: returns `(out, softmax_lse, None)` with float32 softmax_lse `[b, hq, sq]`.
      dropout_key: `jax.random.key`. The weights that it drops are not those that flash_attn's generator drops.
      implementation: as in `flash_attention`.

    Returns:
      `[b, sq, hq, dv]` in q's dtype. Differentiable with respect to q, k and v, also through softmax_lse.

    Raises:
      NotImplementedError: for return_attn_probs with dropout.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> out = flash_attn_func(q, k, v, causal=True, window_size=(256, 0))
    """
    check = Checker("flash_attn_func")
    arguments.refuse_weights(check, return_attn_probs, dropout_p, "flash_attention")
    out, lse = flash_attention(
        q,
        k,
        v,
        causal=causal,
        window=arguments.window(check, window_size),
        scale=softmax_scale,
        softcap=arguments.softcap(check, softcap),
        alibi_slopes=alibi_slopes,
        **arguments.dropout(check, dropout_p, dropout_key),
        return_lse=True,
        deterministic=deterministic,
        implementation=implementation,
    )
    return (out, lse, None) if return_attn_probs else out


# fmt: off
@overload
def flash_attn_varlen_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: IndexLike, cu_seqlens_k: IndexLike, max_seqlen_q: Any,
    max_seqlen_k: Any,
    *, return_attn_probs: Literal[False] = ..., **options: Unpack[FlashAttnVarlenOptions],
) -> Array: ...
@overload
def flash_attn_varlen_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: IndexLike, cu_seqlens_k: IndexLike, max_seqlen_q: Any,
    max_seqlen_k: Any,
    *, return_attn_probs: Literal[True], **options: Unpack[FlashAttnVarlenOptions],
) -> tuple[Array, Array, None]: ...
@overload  # with options by position
def flash_attn_varlen_func(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: IndexLike, cu_seqlens_k: IndexLike, max_seqlen_q: Any,
    max_seqlen_k: Any, dropout_p: float, /,
    *options: Any, **named: Any,
) -> Any: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attn_varlen_func(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def flash_attn_varlen_func(  # type: ignore[misc]  # only an overload has `unpacked`
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: Number | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: Number = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: IndexLike | None = None,
    *,
    dropout_key: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array, None]:
    """`flash_attention_varlen`, or `paged_attention` with a block_table, with flash_attn's arguments.

    Args:
      q: `[tq, hq, d]`, packed sequences.
      k, v: `[tk, hk, d]` and `[tk, hk, dv]`, packed; with block_table page pools `[p, ps, hk, d]` and
        `[p, ps, hk, dv]`.
      cu_seqlens_q, cu_seqlens_k: int32 `[n + 1]`, offsets of the sequences; with block_table the differences of
        cu_seqlens_k are the numbers of keys of each sequence.
      max_seqlen_q, max_seqlen_k: ignored; they may be traced.
      alibi_slopes: float32 `[hq]` or `[n, hq]`.
      return_attn_probs: returns `(out, softmax_lse, None)` with float32 softmax_lse `[hq, tq]`.
      block_table: int32 `[n, pages]`, the pages of each sequence.
      dropout_p, softmax_scale, causal, window_size, softcap, deterministic, dropout_key, implementation: as in
        `flash_attn_func`, per sequence.

    Returns:
      `[tq, hq, dv]` in q's dtype. Differentiable with respect to q, k and v, pools included.

    Raises:
      NotImplementedError: for dropout with block_table, and for return_attn_probs with dropout.
      ValueError, TypeError, NotImplementedError: as in `flash_attention_varlen` and `paged_attention`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> cu_seqlens = jnp.array([0, 3, 10], jnp.int32)
      >>> out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 7, 7, causal=True)
    """
    check = Checker("flash_attn_varlen_func")
    arguments.refuse_weights(check, return_attn_probs, dropout_p, "flash_attention_varlen")
    options: dict[str, Any] = dict(
        causal=causal,
        window=arguments.window(check, window_size),
        scale=softmax_scale,
        softcap=arguments.softcap(check, softcap),
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        implementation=implementation,
    )
    if block_table is None:
        dropout = arguments.dropout(check, dropout_p, dropout_key)
        out, lse = flash_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, **options, **dropout, return_lse=True
        )
    else:
        if dropout_p:
            raise check.fail(
                f"dropout_p is {dropout_p} with a block_table; pages have no dropout, pass dropout_p=0.0",
                NotImplementedError,
            )
        offsets = check.int32("cu_seqlens_k", cu_seqlens_k)
        tables = arguments.ranked(check, "block_table", block_table, "n pages")
        check.shape("cu_seqlens_k", offsets, (tables.shape[0] + 1,), "n+1")
        out, lse = paged_attention(
            q, k, v, block_table, jnp.diff(offsets), cu_seqlens_q=cu_seqlens_q, **options, return_lse=True
        )
    return (out, lse, None) if return_attn_probs else out
