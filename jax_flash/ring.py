"""Attention over sequences that are split over devices."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from jax import Array

from . import largest, validate
from .all_to_all import all_to_all_attention
from .autodiff import attend
from .masks import Mask
from .options import (
    Align,
    ArrayLike,
    Implementation,
    IndexLike,
    LengthsLike,
    Number,
    Order,
    RingArguments,
    RingMode,
    RingOptions,
    Window,
)


# fmt: off
@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, axis_name: str | tuple[str, ...],
    return_lse: Literal[False] = ..., return_max: Literal[False] = ..., **options: Unpack[RingOptions],
) -> Array: ...
@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, axis_name: str | tuple[str, ...],
    return_lse: Literal[True], return_max: Literal[False] = ..., **options: Unpack[RingOptions],
) -> tuple[Array, Array]: ...
@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, axis_name: str | tuple[str, ...],
    return_lse: Literal[False] = ..., return_max: Literal[True], **options: Unpack[RingOptions],
) -> tuple[Array, Array]: ...
@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, axis_name: str | tuple[str, ...],
    return_lse: Literal[True], return_max: Literal[True], **options: Unpack[RingOptions],
) -> tuple[Array, Array, Array]: ...
@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, axis_name: str | tuple[str, ...],
    return_lse: bool, return_max: Literal[False] = ..., **options: Unpack[RingOptions],
) -> Array | tuple[Array, Array]: ...
@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike | None,
    *, axis_name: str | tuple[str, ...],
    return_lse: bool = ..., return_max: bool, **options: Unpack[RingOptions],
) -> Array | tuple[Array, Array] | tuple[Array, Array, Array]: ...
# fmt: on
@overload  # with options from a dict, whose types mypy does not know one by one
def ring_attention(*arguments: Any, unpacked: Any, **options: Any) -> Any: ...


def ring_attention(  # type: ignore[misc]  # only an overload has `unpacked`
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike | None,
    *,
    axis_name: str | tuple[str, ...],
    order: Order = "contiguous",
    mode: RingMode = "ring",
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
    """`flash_attention` over a sequence that is split over devices; to be called inside `jax.shard_map`.

    Each device holds 1/n of the queries and of the keys. It computes the results of its own queries from its own keys
    and from those of the other devices. Their shards arrive one at a time, while the device multiplies its queries by
    the shard before. Memory on a device is linear in its share of the sequence, forward and backward. With a causal
    mask or a window, shards that no query of a device sees are not sent to it.

    Args:
      query: `[b, sq / n, hq, d]`, the local shard, float16, bfloat16 or float32.
      key: `[b, sk / n, hk, d]`, the local shard, query's dtype; `hk` divides `hq`.
      value: `[b, sk / n, hk, dv]`, the local shard, query's dtype; None if V is K, which is then sent once.
      axis_name: the mesh axis that the sequence is split over, or several, which count as one. If its size does not
        divide a sequence, pad the sequence, and pass `q_lengths` and `kv_lengths` to say which rows are in use.
      order: `"contiguous"`: device i holds the i-th of n equal parts. `"zigzag"`: it holds the parts i and 2n − 1 − i
        of 2n, one after the other, which gives all devices the same work under a causal mask.
      mode: `"ring"`, or `"all_to_all"`: every device gets all tokens of a part of the heads, and sends results back.
      causal, window, align: as in `flash_attention`, by positions in the whole sequence.
      mask: boolean of rank 2 or 4, broadcastable to `[b, hq, sq / n, sk]`: local rows, and the columns of all keys,
        which are in the sequence's own order whatever `order` is. Or a value of `jax_flash.masks` whose arrays are of
        the local rows, and whose keys count from the first of the sequence.
      segment_ids: int32 `(q_ids [b, sq / n], kv_ids [b, sk / n])`, local shards, or one array when sq = sk. Documents
        that are packed one after the other may cross shards: give each its own id.
      q_lengths, kv_lengths: int32 `[b]`, rows and keys in use of the whole sequence, or one number for all.
      bias: like mask, added to S; differentiable. bias_first: as in `flash_attention`.
      scale, softcap, alibi_slopes, deterministic, implementation: as in `flash_attention`.
      sinks: float32 `[hq]`, or for each token `[b, sq / n, hq]`, the local shard.
      dropout_rate: as in `flash_attention`.
      dropout_key: the same `jax.random.key` on all devices of the axis. The dropped weights depend on positions in the
        whole sequence, so they are those of a call on one device. They depend on the batch entry and the head within
        the shard: if the mesh splits these too, fold the device's index on their axes into the key.
      return_lse: also return lse = log Σ exp(S), float32 `[b, hq, sq / n]`; differentiable.
      return_max: also return the largest visible S of the whole sequence, float32 `[b, hq]`, on every device; no
        gradient.

    Returns:
      `[b, sq / n, hq, dv]` in query's dtype, or a tuple of the requested ones of (out, lse, max).

    Raises:
      ValueError, TypeError, NotImplementedError: as in `flash_attention`; and ValueError where axis_name is not a
        manual axis.

    Source: Liu, Zaharia, Abbeel, Ring Attention with Blockwise Transformers (2023); Brandon et al., Striped Attention
    (2023), on balance under a causal mask; Jacobs et al., DeepSpeed Ulysses (2023), the all-to-all form.

    Example:
      >>> shard = P(None, "sequence")
      >>> attend = partial(ring_attention, axis_name="sequence", causal=True)
      >>> out = jax.shard_map(attend, mesh=mesh, in_specs=(shard, shard, shard), out_specs=shard)(q, k, v)
    """
    arguments = RingArguments(
        query=query,
        key=key,
        value=value,
        axis_name=axis_name,
        order=order,
        mode=mode,
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
    spec, operands = validate.ring("ring_attention", arguments)
    attend_split = attend if mode == "ring" else all_to_all_attention
    return largest.results(arguments, spec, operands, attend_split(spec, operands))
