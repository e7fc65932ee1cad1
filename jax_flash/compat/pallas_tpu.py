"""`flash_attention` of jax.experimental.pallas.ops.tpu; Splash attention is in `jax_flash.compat.splash`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..attention import flash_attention as attend
from ..batch_dims import as_bias
from ..checker import Checker
from ..options import ArrayLike, Implementation, Number
from . import arguments
from .arguments import SegmentIds

__all__ = ["BlockSizes", "SegmentIds", "flash_attention"]

_CHECK = Checker("pallas_tpu.flash_attention")
_SCORES = "b h sq sk"


@dataclass(frozen=True)
class BlockSizes:
    """Pallas's tile sizes. Code that makes them still works, but they have no effect."""

    block_q: int
    block_k_major: int
    block_k: int
    block_b: int
    block_q_major_dkv: int | None = None
    block_k_major_dkv: int | None = None
    block_k_dkv: int | None = None
    block_q_dkv: int | None = None
    block_k_major_dq: int | None = None
    block_k_dq: int | None = None
    block_q_dq: int | None = None

    @classmethod
    def get_default(
        cls, batch_size: int, num_heads: int, q_seq_len: int, kv_len: int, d_model: int
    ) -> BlockSizes:
        del batch_size, num_heads, q_seq_len, kv_len, d_model
        return cls(128, 128, 128, 1)


def flash_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    ab: ArrayLike | None = None,
    segment_ids: Any = None,
    *,
    causal: bool = False,
    sm_scale: Number = 1.0,
    block_sizes: Any = None,
    debug: bool = False,
    implementation: Implementation | None = None,
) -> Array:
    """`jax_flash.flash_attention` with the arguments of `jax.experimental.pallas.ops.tpu.flash_attention`.

    Args:
      q: `[b, h, sq, d]`, float16, bfloat16 or float32.
      k, v: `[b, hk, sk, d]` and `[b, hk, sk, dv]`, q's dtype. Pallas's kernel needs `h == hk` and `d == dv`, here `hk`
        divides `h`.
      ab: a bias that broadcasts to `[b, h, sq, sk]`, added before the scale: S = sm_scale · (q·kᵀ + ab).
      segment_ids: `SegmentIds` of this module or JAX's, of `[b, sq]` and `[b, sk]`.
      causal: query i attends to keys 0 … i, whatever the lengths.
      sm_scale: 1 by default.
      block_sizes, debug: have no effect. No length has to be a multiple of a block size.
      implementation: as in `jax_flash.flash_attention`.

    Returns:
      `[b, h, sq, dv]` in q's dtype. Differentiable with respect to q, k, v and ab.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `jax_flash.flash_attention`.

    One deviation: a query without a visible key gives 0, not the mean of all values.

    Source: the interface is JAX's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> out = flash_attention(q, k, v, causal=True, sm_scale=q.shape[-1] ** -0.5)
    """
    del block_sizes, debug
    dims = (("q", q, "b h sq d"), ("k", k, "b hk sk d"), ("v", v, "b hk sk dv"))
    query, key, value = (arguments.ranked(_CHECK, *x).swapaxes(1, 2) for x in dims)
    scale = _CHECK.number("sm_scale", sm_scale)
    bias = None
    if ab is not None:
        sizes = query.shape[0], query.shape[2], query.shape[1], key.shape[1]
        bias = as_bias(_CHECK.broadcastable("ab", _CHECK.array("ab", ab), sizes, _SCORES), query.dtype)
        bias = bias if scale == 1 else bias.astype(jnp.float32) * scale  # 16 bits would round the product
    out: Array = attend(
        query,
        key,
        value,
        causal=causal,
        align="top_left",
        segment_ids=None if segment_ids is None else arguments.segment_ids(_CHECK, segment_ids),
        scale=scale,
        bias=bias,
        implementation=implementation,
    )
    return out.swapaxes(1, 2)
