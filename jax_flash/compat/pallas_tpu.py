"""`flash_attention` and `paged_attention` of jax.experimental.pallas.ops.tpu.

Splash attention is in `jax_flash.compat.splash`, ragged paged attention in `jax_flash.compat.ragged_paged_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ..attention import flash_attention as attend
from ..checker import Checker
from ..options import ArrayLike, Implementation, IndexLike, Number
from . import arguments
from .arguments import SegmentIds
from .pages_by_head import Pools

__all__ = ["BlockSizes", "QuantizedTensor", "SegmentIds", "flash_attention", "paged_attention"]

_CHECK = Checker("pallas_tpu.flash_attention")
_PAGED = Checker("pallas_tpu.paged_attention")
_SCORES = "b h sq sk"
_MEGACORE = ("batch", "kv_head")
_MAX_INT8 = 127.5  # JAX's, by which it divides scales


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
        bias = _CHECK.broadcastable("ab", _CHECK.bias("ab", ab, query.dtype), sizes, _SCORES)
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


class QuantizedTensor(NamedTuple):
    """Pages as integers or float8, and their scales: value = weight · scales / 127.5, as in JAX."""

    weight: ArrayLike
    scales: ArrayLike


def paged_attention(
    q: ArrayLike,
    k_pages: Any,
    v_pages: Any,
    lengths: IndexLike,
    page_indices: IndexLike,
    *,
    mask_value: float | None = None,
    attn_logits_soft_cap: Number | None = None,
    pages_per_compute_block: int | None = None,
    megacore_mode: str | None = None,
    inline_seq_dim: bool = True,
    implementation: Implementation | None = None,
) -> Array:
    """`jax_flash.paged_attention` with the arguments of `jax.experimental.pallas.ops.tpu.paged_attention`.

    The pools are read where they are, as one pool for each KV head: nothing is transposed or copied, and pools that are
    sharded over their heads stay so.

    Args:
      q: `[b, hq, d]`, one token of each sequence, float16, bfloat16 or float32. It is not scaled: multiply it by 1/√d.
      k_pages, v_pages: `[hk, p, ps, d]`, q's dtype or float8_e4m3fn or float8_e5m2, or a `QuantizedTensor` of this
        module or JAX's. Float8 weights of one dtype with scales `[hk, p, ps, 1]` are read as they are, by a table with
        an entry for each token. No kernel reads int8, which JAX's own quantisation makes, scales `[hk, p, ps, d]`, or
        pools of which only one is quantised: both are then made float32 in each call, with a warning.
      lengths: int32 `[b]`, keys of each sequence.
      page_indices: int32 `[b, pages]`. Entries past a length are never read; rows that need a page outside the pool
        give NaN.
      mask_value: has no effect; keys past a length are not seen.
      attn_logits_soft_cap: c in `S ← c·tanh(S/c)`.
      pages_per_compute_block, megacore_mode, inline_seq_dim: have no effect. No number of pages or heads has to be a
        multiple of another.
      implementation: as in `jax_flash.paged_attention`.

    Returns:
      `[b, hq, d]` in q's dtype. A sequence of length 0 gives 0. Differentiable with respect to q and the pools unless
      they are float8.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `jax_flash.paged_attention`.

    Source: Kwon et al., PagedAttention (2023); the interface is JAX's.

    Example:
      >>> out = paged_attention(q / jnp.sqrt(d), k_pages, v_pages, lengths, page_indices, pages_per_compute_block=4)
    """
    del mask_value, pages_per_compute_block, inline_seq_dim
    if megacore_mode is not None:
        _PAGED.one_of("megacore_mode", megacore_mode, _MEGACORE)
    ends = _PAGED.int32("lengths", lengths)
    k, k_scales = _parts("k_pages", k_pages)
    v, v_scales = _parts("v_pages", v_pages)
    pools = replace(Pools.of(_PAGED, k, v), scales=(k_scales, v_scales))
    return pools.attend(q, "page_indices", page_indices, ends, attn_logits_soft_cap, implementation)


def _parts(name: str, pages: Any) -> tuple[Any, Array | None]:
    """The array of a pool, and the factors of its tokens `[hk, p, ps]` or elements `[hk, p, ps, d]`, if it has any."""
    if not (hasattr(pages, "weight") and hasattr(pages, "scales")):
        return pages, None
    weight = arguments.ranked(_PAGED, f"{name}.weight", pages.weight, "hk p ps d")
    scales = _PAGED.array(f"{name}.scales", pages.scales)
    by_token = scales.ndim == 4 and scales.shape[-1] == 1
    _PAGED.shape(
        f"{name}.scales",
        scales,
        weight.shape[:3] + ((1,) if by_token else weight.shape[3:]),
        "hk, p, ps, 1 or d",
    )
    factors = scales.astype(jnp.float32) / _MAX_INT8
    return weight, factors[..., 0] if by_token else factors
