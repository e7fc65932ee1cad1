"""`mha` and `paged_attention` of jax.experimental.pallas.ops.gpu, which JAX deprecates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from ..attention import flash_attention
from ..checker import Checker
from ..options import ArrayLike, Implementation, IndexLike, Number
from .pages_by_head import Pools

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class BlockSizes:
    """Pallas's tile sizes. Code that makes them still works, but they have no effect."""

    block_q: int = 128
    block_k: int = 128
    block_q_dkv: int | None = None
    block_kv_dkv: int | None = None
    block_q_dq: int | None = None
    block_kv_dq: int | None = None

    @classmethod
    def get_default(cls) -> BlockSizes:
        return cls()


def mha(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    segment_ids: ArrayLike | None,
    sm_scale: Number = 1.0,
    causal: bool = False,
    block_sizes: Any = None,
    backward_pass_impl: str = "triton",
    num_warps: int | None = None,
    num_stages: int = 2,
    grid: tuple[int, ...] | None = None,
    interpret: bool = False,
    debug: bool = False,
    return_residuals: bool = False,
    *,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array]:
    """`flash_attention` with the arguments of `jax.experimental.pallas.ops.gpu.attention.mha`.

    Args:
      q: `[b, sq, hq, d]`, float16, bfloat16 or float32.
      k, v: `[b, sk, hk, d]` and `[b, sk, hk, dv]`, q's dtype. Pallas's kernel needs `hq == hk`, here `hk` divides `hq`.
      segment_ids: int32 `[b, s]` with s = sq = sk; a query attends only to keys of its own segment.
      sm_scale: factor of q·kᵀ, 1 by default.
      causal: query i attends to keys 0 … i, whatever the lengths.
      block_sizes, num_warps, num_stages, grid, interpret, debug: have no effect. No length has to be a multiple of a
        block size.
      backward_pass_impl: "triton" or "xla", without effect.
      return_residuals: also return log2 Σ exp2(S·log2 e), float32 `[b, hq, sq]`: Pallas's residual is to base 2. It is
        differentiable here; Pallas's call with it is not.
      implementation: as in `flash_attention`.

    Returns:
      `[b, sq, hq, dv]` in q's dtype, or the pair `(out, residual)`. Differentiable with respect to q, k and v.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: the interface is JAX's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> out = mha(q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5, causal=True)
    """
    check = Checker("mha")
    if backward_pass_impl not in ("triton", "xla"):
        raise check.fail(f'backward_pass_impl must be "triton" or "xla", got {backward_pass_impl!r}')
    out, lse = flash_attention(
        q,
        k,
        v,
        causal=causal,
        align="top_left",
        segment_ids=segment_ids,
        scale=sm_scale,
        return_lse=True,
        implementation=implementation,
    )
    return (out, lse * _LOG2_E) if check.flag("return_residuals", return_residuals) else out


def paged_attention(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_tables: IndexLike,
    lengths: IndexLike | None,
    k_scales_pages: ArrayLike | None = None,
    v_scales_pages: ArrayLike | None = None,
    *,
    block_h: int = 16,
    pages_per_compute_block: int = 8,
    k_splits: int = 16,
    num_warps: int = 8,
    num_stages: int = 2,
    interpret: bool = False,
    debug: bool = False,
    mask_value: float | None = None,
    attn_logits_soft_cap: Number | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """`jax_flash.paged_attention` with the arguments of `jax.experimental.pallas.ops.gpu.paged_attention`.

    The pools are read where they are, as one pool for each KV head: nothing is copied, and pools that are sharded over
    their heads stay so.

    Args:
      q: `[n, hq, d]`, one token of each sequence, float16, bfloat16 or float32. It is not scaled: multiply it by 1/√d.
      k_pages, v_pages: `[hk, p, ps, d]`, q's dtype; or float8_e4m3fn, float8_e5m2 or int8, with scales.
      block_tables: int32 `[n, pages]`. Entries past a length are never read; rows that need a page outside the pool
        give NaN.
      lengths: int32 `[n]`, keys of each sequence; None where all tables are full.
      k_scales_pages, v_scales_pages: `[hk, p, ps]`, a scale of each key and value: value = stored · scale. Float8 pools
        of one dtype are read as they are, by a table with an entry for each token. Where a pool is int8, or only one of
        the two is quantised, both are made float32 in each call, with a warning.
      block_h, pages_per_compute_block, k_splits, num_warps, num_stages, interpret, debug: have no effect.
      mask_value: has no effect; keys past a length are not seen.
      attn_logits_soft_cap: c in `S ← c·tanh(S/c)`.
      implementation: as in `flash_attention`.

    Returns:
      `[n, hq, d]` in q's dtype. A sequence of length 0 gives 0. Differentiable with respect to q and the pools unless
      they are float8.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `jax_flash.paged_attention`.

    Source: Kwon et al., PagedAttention (2023); the interface is JAX's.

    Example:
      >>> out = paged_attention(q / jnp.sqrt(d), k_pages, v_pages, block_tables, lengths)
    """
    check = Checker("pallas_gpu.paged_attention")
    pools = Pools.of(check, k_pages, v_pages)
    shape = pools.arrays[0].shape
    scales = (
        _scales(check, "k_scales_pages", k_scales_pages, shape),
        _scales(check, "v_scales_pages", v_scales_pages, shape),
    )
    pools = replace(pools, scales=scales)
    return pools.attend(q, "block_tables", block_tables, lengths, attn_logits_soft_cap, implementation)


def _scales(check: Checker, name: str, x: Any, pool: tuple[Any, ...]) -> Array | None:
    if x is None:
        return None
    scales = check.array(name, x)
    check.shape(name, scales, pool[:-1], "hk, p, ps")
    return scales.astype(jnp.float32)
