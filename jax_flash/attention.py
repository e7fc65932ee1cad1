"""Attention over fixed-length batches."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from jax import Array

from . import largest, validate
from .autodiff import attend
from .masks import Mask
from .options import (
    Align,
    ArrayLike,
    FixedArguments,
    FixedOptions,
    Implementation,
    IndexLike,
    LengthsLike,
    Number,
    Window,
)


# fmt: off
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, return_lse: Literal[False] = ..., return_max: Literal[False] = ..., **options: Unpack[FixedOptions],
) -> Array: ...
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, return_lse: Literal[True], return_max: Literal[False] = ..., **options: Unpack[FixedOptions],
) -> tuple[Array, Array]: ...
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, return_lse: Literal[False] = ..., return_max: Literal[True], **options: Unpack[FixedOptions],
) -> tuple[Array, Array]: ...
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, return_lse: Literal[True], return_max: Literal[True], **options: Unpack[FixedOptions],
) -> tuple[Array, Array, Array]: ...
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, return_lse: bool, return_max: Literal[False] = ..., **options: Unpack[FixedOptions],
) -> Array | tuple[Array, Array]: ...
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, return_lse: bool = ..., return_max: bool, **options: Unpack[FixedOptions],
) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def flash_attention(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def flash_attention(  # type: ignore[misc]  # only an overload has `unpacked`
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike | None,
    *,
    causal: bool = False,
    window: Window | None = None,
    align: Align = "bottom_right",
    mask: ArrayLike | Mask | None = None,
    segment_ids: ArrayLike | tuple[IndexLike, IndexLike] | None = None,
    q_lengths: LengthsLike | None = None,
    kv_lengths: LengthsLike | None = None,
    scale: Number | None = None,
    softcap: Number | None = None,
    bias: ArrayLike | None = None,
    bias_first: bool = False,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: Number = 0.0,
    dropout_key: ArrayLike | None = None,
    return_lse: bool = False,
    return_max: bool = False,
    deterministic: bool = False,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, ...]:
    """Exact attention, softmax(scale · q·kᵀ)·v, in memory linear in the sequence length.

    A row without a visible key gives 0 and lse −inf (its sink, if there is one), never NaN. Rows and keys past a length
    are never read. Where an argument is int32, integers on the host (lists, NumPy arrays of any integer type) are taken
    too if int32 holds their values.

    Args:
      query: `[b, sq, hq, d]`, float16, bfloat16 or float32.
      key: `[b, sk, hk, d]`, query's dtype. `hk` divides `hq`, and query head i reads KV head `i // (hq // hk)`.
      value: `[b, sk, hk, dv]`, query's dtype; None: V is K, and key's gradient is the sum of both. d and dv
        are at most 512 (on sm_75, 256); with `implementation="xla"` they may be larger.
      causal: attend only to keys at or before the query's diagonal.
      window: `(left, right)` keys visible around the diagonal, each an int ≥ 0 or None for unlimited.
      align: the diagonal of query i is key i + (sk − sq) with `"bottom_right"`, where sq and sk are the lengths in
        use, and key i with `"top_left"`.
      mask: boolean of rank 2 or 4, broadcastable to `[b, hq, sq, sk]`, True where a query may attend; or a value of
        `jax_flash.masks`, whose hidden tiles kernels skip.
      segment_ids: int32 `(q_ids [b, sq], kv_ids [b, sk])`, or one array when sq = sk. A query
        attends only to keys of its own segment.
      q_lengths: int32 `[b]`, rows in use of each batch entry, or one number for all.
      kv_lengths: int32 `[b]`, keys in use of each batch entry, or one number for all.
      scale: factor of q·kᵀ, 1/√d by default; a number that is known while tracing. Multiply query by a traced one.
      softcap: c in `S ← c·tanh(S/c)`, applied before bias and alibi_slopes; 0 for none.
      bias: added to S, broadcastable to `[b, hq, sq, sk]`; −inf masks. Differentiable.
      bias_first: add the bias before the softcap, which then caps the sum. A bias of −inf still masks.
      alibi_slopes: float32 `[hq]` or `[b, hq]`; adds −slope·|distance to the diagonal|. No gradient.
      sinks: float32 `[hq]`, or for each token `[b, sq, hq]`: logits that take part in the softmax sum only.
        Differentiable.
      dropout_rate: probability that an attention weight is dropped, in [0, 1), rounded to a multiple of 1/32768.
      dropout_key: `jax.random.key` of any implementation, required if dropout_rate > 0. The same key drops the same
        weights on every platform and with every sharding under jit. In a `shard_map` of your own, batch entries and
        heads count from the shard's first: where a manual axis splits them, fold the shard's index into the key
        (`jax.random.fold_in(key, jax.lax.axis_index("data"))`), or all shards drop alike. The dropped elements then
        differ from those on one device. A split sequence needs no folding: `ring_attention` drops what one device
        would.
      return_lse: also return lse = log Σ exp(S), float32 `[b, hq, sq]`; differentiable.
      return_max: also return the largest visible S of each sequence and head, sinks aside, float32 `[b, hq]`; −inf
        where there is none. No gradient. It is what QK-clip asks for.
      deterministic: makes the backward pass bit-for-bit reproducible.
      implementation: `"cuda"`, `"cpu"` or `"xla"` (plain JAX). None is the custom call of the platform that the
        program is compiled for.

    Returns:
      `[b, sq, hq, dv]` in query's dtype, or a tuple of the requested ones of (out, lse, max).

    Raises:
      ValueError, TypeError: while tracing; the message names the argument, its value and what is allowed.
      NotImplementedError: if the implementation lacks this configuration, if the platform has no implementation, or
        if a second derivative is used: both modes of differentiation run once, `"xla"` has every derivative.

    Source: Dao et al., FlashAttention (2022); Dao, FlashAttention-2 (2023).

    Example:
      >>> out = flash_attention(q, k, v, causal=True, window=(1024, 0))
    """
    arguments = FixedArguments(
        query=query,
        key=key,
        value=value,
        causal=causal,
        window=window,
        align=align,
        mask=mask,
        segment_ids=segment_ids,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
        scale=scale,
        softcap=softcap,
        bias=bias,
        bias_first=bias_first,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        return_lse=return_lse,
        return_max=return_max,
        deterministic=deterministic,
        implementation=implementation,
    )
    spec, operands = validate.fixed("flash_attention", arguments)
    return largest.results(arguments, spec, operands, attend(spec, operands))
