"""Attention over packed sequences of different lengths."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from jax import Array

from . import largest, validate
from .autodiff import attend
from .masks import Mask
from .options import (
    Align,
    ArrayLike,
    Implementation,
    IndexLike,
    LengthsLike,
    Number,
    VarlenArguments,
    VarlenOptions,
    Window,
)


# fmt: off
@overload
def flash_attention_varlen(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None, cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike | None = None,
    *, return_lse: Literal[False] = ..., return_max: Literal[False] = ..., **options: Unpack[VarlenOptions],
) -> Array: ...
@overload
def flash_attention_varlen(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None, cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike | None = None,
    *, return_lse: Literal[True], return_max: Literal[False] = ..., **options: Unpack[VarlenOptions],
) -> tuple[Array, Array]: ...
@overload
def flash_attention_varlen(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None, cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike | None = None,
    *, return_lse: Literal[False] = ..., return_max: Literal[True], **options: Unpack[VarlenOptions],
) -> tuple[Array, Array]: ...
@overload
def flash_attention_varlen(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None, cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike | None = None,
    *, return_lse: Literal[True], return_max: Literal[True], **options: Unpack[VarlenOptions],
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attention_varlen(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None, cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike | None = None,
    *, return_lse: bool, return_max: Literal[False] = ..., **options: Unpack[VarlenOptions],
) -> Array | tuple[Array, Array]: ...
@overload
def flash_attention_varlen(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None, cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike | None = None,
    *, return_lse: bool = ..., return_max: bool, **options: Unpack[VarlenOptions],
) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attention_varlen(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def flash_attention_varlen(  # type: ignore[misc]  # only an overload has `unpacked`
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike | None,
    cu_seqlens_q: IndexLike,
    cu_seqlens_k: IndexLike | None = None,
    *,
    causal: bool = False,
    window: Window | None = None,
    align: Align = "bottom_right",
    mask: Mask | None = None,
    kv_lengths: LengthsLike | None = None,
    scale: Number | None = None,
    softcap: Number | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: Number = 0.0,
    dropout_key: ArrayLike | None = None,
    return_lse: bool = False,
    return_max: bool = False,
    deterministic: bool = False,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, ...]:
    """Attention within each of several sequences that are packed along one token axis.

    Sequence i holds the query tokens `cu_seqlens_q[i]` to `cu_seqlens_q[i + 1]` and the keys `cu_seqlens_k[i]` to
    `cu_seqlens_k[i + 1]`. Tokens outside every sequence are padding: they are never read, and their out is 0, their lse
    −inf and their gradient 0.

    Args:
      query: `[tq, hq, d]`, float16, bfloat16 or float32.
      key: `[tk, hk, d]`, query's dtype; `hk` divides `hq`.
      value: `[tk, hk, dv]`, query's dtype; None: V is K, as in `flash_attention`.
      cu_seqlens_q: int32 `[n + 1]`, offsets of the sequences in query; sequences may be empty. The kernels read the
        running maximum of these values clamped to [0, tq]; `check_inputs` raises if that changes any of them.
      cu_seqlens_k: int32 `[n + 1]`, offsets in key and value; None means cu_seqlens_q. With None, or the same array
        again, tokens that are sharded over devices stay so under jit; with dropout, or a window or slopes of each
        sequence, they are gathered, since bits and distances count from the first token of each sequence.
      mask: a value of `jax_flash.masks`, whose rows and keys count from the first of each sequence; arrays are
        `[hq | 1, tq]`, and `[n]` where there is one number for each sequence.
      kv_lengths: int32 `[n]`, keys in use of each sequence, or one number for all; by default every key.
      alibi_slopes: float32 `[hq]` or `[n, hq]`.
      sinks: float32 `[hq]`, or for each token `[tq, hq]`.
      causal, window, align, scale, softcap, dropout_rate, dropout_key, deterministic, implementation: as in
        `flash_attention`, with each sequence's own lengths.
      return_lse: also return lse = log Σ exp(S), float32 `[hq, tq]`; differentiable.
      return_max: also return the largest visible S of each sequence and head, float32 `[n, hq]`; no gradient.

    Returns:
      `[tq, hq, dv]` in query's dtype, or a tuple of the requested ones of (out, lse, max).

    Raises:
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: Dao, FlashAttention-2 (2023).

    Example:
      >>> cu_seqlens = jnp.array([0, 3, 10], jnp.int32)  # two documents, of 3 and 7 tokens
      >>> out = flash_attention_varlen(q, k, v, cu_seqlens, causal=True)
    """
    arguments = VarlenArguments(
        query=query,
        key=key,
        value=value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        causal=causal,
        window=window,
        align=align,
        mask=mask,
        kv_lengths=kv_lengths,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_lse=return_lse,
        return_max=return_max,
        deterministic=deterministic,
        implementation=implementation,
    )
    spec, operands = validate.varlen("flash_attention_varlen", arguments)
    return largest.results(arguments, spec, operands, attend(spec, operands))
