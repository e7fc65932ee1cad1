"""The functions of flash_attn that take q, k and v, or k and v, in one array.

XLA copies q, k and v out of that array, and their gradients into one. Separate arrays avoid these copies.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

import jax
from jax import Array

from .._jax import same_dim
from ..checker import Checker
from ..options import ArrayLike, Implementation, IndexLike, Number
from .arguments import ranked
from .attention import flash_attn_func, flash_attn_varlen_func
from .options import FlashAttnOptions, WindowSize


# fmt: off
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayLike,
    *, return_attn_probs: Literal[False] = ..., **options: Unpack[FlashAttnOptions],
) -> Array: ...
@overload
def flash_attn_qkvpacked_func(
    qkv: ArrayLike,
    *, return_attn_probs: Literal[True], **options: Unpack[FlashAttnOptions],
) -> tuple[Array, Array, None]: ...
@overload  # with options by position
def flash_attn_qkvpacked_func(
    qkv: ArrayLike, dropout_p: float, /,
    *options: Any, **named: Any,
) -> Any: ...
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attn_qkvpacked_func(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...
def flash_attn_qkvpacked_func(  # type: ignore[misc]  # only an overload has `unpacked`
    qkv: ArrayLike, dropout_p: float = 0.0, softmax_scale: Number | None = None, causal: bool = False,
    window_size: WindowSize = (-1, -1), softcap: Number = 0.0, alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
    *, dropout_key: ArrayLike | None = None, implementation: Implementation | None = None,
) -> Array | tuple[Array, Array, None]:
    # fmt: on
    """`flash_attn_func` of queries, keys and values in one array.

    Args:
      qkv: `[b, s, 3, h, d]`, float16, bfloat16 or float32: q, k and v, which all have h heads.
      dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        dropout_key, implementation: as in `flash_attn_func`.

    Returns:
      `[b, s, h, d]` in qkv's dtype, or what return_attn_probs says. Differentiable with respect to qkv.

    Raises:
      ValueError: if qkv has another rank, or another size where 3 is wanted.
      ValueError, TypeError, NotImplementedError: as in `flash_attn_func`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> out = flash_attn_qkvpacked_func(jnp.stack([q, k, v], axis=2), causal=True)
    """
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, "b s 3 h d")
    result: Array | tuple[Array, Array, None] = flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, dropout_key=dropout_key, implementation=implementation,
    )  # fmt: skip
    return result


# fmt: off
@overload
def flash_attn_kvpacked_func(
    q: ArrayLike, kv: ArrayLike,
    *, return_attn_probs: Literal[False] = ..., **options: Unpack[FlashAttnOptions],
) -> Array: ...
@overload
def flash_attn_kvpacked_func(
    q: ArrayLike, kv: ArrayLike,
    *, return_attn_probs: Literal[True], **options: Unpack[FlashAttnOptions],
) -> tuple[Array, Array, None]: ...
@overload  # with options by position
def flash_attn_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, dropout_p: float, /,
    *options: Any, **named: Any,
) -> Any: ...
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attn_kvpacked_func(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...
def flash_attn_kvpacked_func(  # type: ignore[misc]  # only an overload has `unpacked`
    q: ArrayLike, kv: ArrayLike, dropout_p: float = 0.0, softmax_scale: Number | None = None, causal: bool = False,
    window_size: WindowSize = (-1, -1), softcap: Number = 0.0, alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
    *, dropout_key: ArrayLike | None = None, implementation: Implementation | None = None,
) -> Array | tuple[Array, Array, None]:
    # fmt: on
    """`flash_attn_func` of keys and values in one array.

    Args:
      q: `[b, sq, hq, d]`, float16, bfloat16 or float32.
      kv: `[b, sk, 2, hk, d]`, q's dtype: k and v; `hk` divides `hq`.
      dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        dropout_key, implementation: as in `flash_attn_func`.

    Returns:
      `[b, sq, hq, d]` in q's dtype, or what return_attn_probs says. Differentiable with respect to q and kv.

    Raises:
      ValueError: if kv has another rank, or another size where 2 is wanted.
      ValueError, TypeError, NotImplementedError: as in `flash_attn_func`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> out = flash_attn_kvpacked_func(q, jnp.stack([k, v], axis=2), causal=True)
    """
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, "b sk 2 hk d")
    result: Array | tuple[Array, Array, None] = flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, dropout_key=dropout_key, implementation=implementation,
    )  # fmt: skip
    return result


# fmt: off
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayLike, cu_seqlens: IndexLike, max_seqlen: Any,
    *, return_attn_probs: Literal[False] = ..., **options: Unpack[FlashAttnOptions],
) -> Array: ...
@overload
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayLike, cu_seqlens: IndexLike, max_seqlen: Any,
    *, return_attn_probs: Literal[True], **options: Unpack[FlashAttnOptions],
) -> tuple[Array, Array, None]: ...
@overload  # with options by position
def flash_attn_varlen_qkvpacked_func(
    qkv: ArrayLike, cu_seqlens: IndexLike, max_seqlen: Any, dropout_p: float, /,
    *options: Any, **named: Any,
) -> Any: ...
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attn_varlen_qkvpacked_func(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...
def flash_attn_varlen_qkvpacked_func(  # type: ignore[misc]  # only an overload has `unpacked`
    qkv: ArrayLike, cu_seqlens: IndexLike, max_seqlen: Any, dropout_p: float = 0.0,
    softmax_scale: Number | None = None, causal: bool = False, window_size: WindowSize = (-1, -1),
    softcap: Number = 0.0, alibi_slopes: ArrayLike | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
    *, dropout_key: ArrayLike | None = None, implementation: Implementation | None = None,
) -> Array | tuple[Array, Array, None]:
    # fmt: on
    """`flash_attn_varlen_func` of queries, keys and values in one array.

    Args:
      qkv: `[t, 3, h, d]`, packed sequences, float16, bfloat16 or float32: q, k and v, which all have h heads.
      cu_seqlens: int32 `[n + 1]`, offsets of the sequences.
      max_seqlen: ignored; it may be traced.
      dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        dropout_key, implementation: as in `flash_attn_varlen_func`.

    Returns:
      `[t, h, d]` in qkv's dtype, or what return_attn_probs says. Differentiable with respect to qkv.

    Raises:
      ValueError: if qkv has another rank, or another size where 3 is wanted.
      ValueError, TypeError, NotImplementedError: as in `flash_attn_varlen_func`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> cu_seqlens = jnp.array([0, 3, 10], jnp.int32)
      >>> out = flash_attn_varlen_qkvpacked_func(jnp.stack([q, k, v], axis=1), cu_seqlens, 7, causal=True)
    """
    q, k, v = _parts("flash_attn_varlen_qkvpacked_func", "qkv", qkv, "t 3 h d")
    result: Array | tuple[Array, Array, None] = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, dropout_key=dropout_key, implementation=implementation,
    )  # fmt: skip
    return result


# fmt: off
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, cu_seqlens_q: IndexLike, cu_seqlens_k: IndexLike, max_seqlen_q: Any,
    max_seqlen_k: Any,
    *, return_attn_probs: Literal[False] = ..., **options: Unpack[FlashAttnOptions],
) -> Array: ...
@overload
def flash_attn_varlen_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, cu_seqlens_q: IndexLike, cu_seqlens_k: IndexLike, max_seqlen_q: Any,
    max_seqlen_k: Any,
    *, return_attn_probs: Literal[True], **options: Unpack[FlashAttnOptions],
) -> tuple[Array, Array, None]: ...
@overload  # with options by position
def flash_attn_varlen_kvpacked_func(
    q: ArrayLike, kv: ArrayLike, cu_seqlens_q: IndexLike, cu_seqlens_k: IndexLike, max_seqlen_q: Any,
    max_seqlen_k: Any, dropout_p: float, /,
    *options: Any, **named: Any,
) -> Any: ...
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attn_varlen_kvpacked_func(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...
def flash_attn_varlen_kvpacked_func(  # type: ignore[misc]  # only an overload has `unpacked`
    q: ArrayLike, kv: ArrayLike, cu_seqlens_q: IndexLike, cu_seqlens_k: IndexLike, max_seqlen_q: Any,
    max_seqlen_k: Any, dropout_p: float = 0.0, softmax_scale: Number | None = None, causal: bool = False,
    window_size: WindowSize = (-1, -1), softcap: Number = 0.0, alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
    *, dropout_key: ArrayLike | None = None, implementation: Implementation | None = None,
) -> Array | tuple[Array, Array, None]:
    # fmt: on
    """`flash_attn_varlen_func` of keys and values in one array.

    Args:
      q: `[tq, hq, d]`, packed sequences, float16, bfloat16 or float32.
      kv: `[tk, 2, hk, d]`, packed, q's dtype: k and v; `hk` divides `hq`.
      cu_seqlens_q, cu_seqlens_k: int32 `[n + 1]`, offsets of the sequences.
      max_seqlen_q, max_seqlen_k: ignored; they may be traced.
      dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        dropout_key, implementation: as in `flash_attn_varlen_func`.

    Returns:
      `[tq, hq, d]` in q's dtype, or what return_attn_probs says. Differentiable with respect to q and kv.

    Raises:
      ValueError: if kv has another rank, or another size where 2 is wanted.
      ValueError, TypeError, NotImplementedError: as in `flash_attn_varlen_func`.

    Source: Dao, FlashAttention-2 (2023); the interface is flash_attn's.

    Example:
      >>> cu_seqlens = jnp.array([0, 3, 10], jnp.int32)
      >>> out = flash_attn_varlen_kvpacked_func(q, jnp.stack([k, v], axis=1), cu_seqlens, cu_seqlens, 7, 7)
    """
    k, v = _parts("flash_attn_varlen_kvpacked_func", "kv", kv, "tk 2 hk d")
    result: Array | tuple[Array, Array, None] = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, dropout_key=dropout_key, implementation=implementation,
    )  # fmt: skip
    return result


def _parts(function: str, name: str, packed: Any, dims: str) -> list[jax.Array]:
    """The arrays packed along the third dimension from the end, whose size `dims` says."""
    check = Checker(function)
    x = ranked(check, name, packed, dims)
    wanted = int(dims.split()[-3])
    if not same_dim(x.shape[-3], wanted):
        raise check.fail(f"{name} must have shape [{', '.join(dims.split())}], got {x.shape}")
    return [x[..., part, :, :] for part in range(wanted)]
