"""Ragged paged attention in the order of sglang-jax's arguments, to be assigned in its attention backend:

from sgl_jax.srt.layers.attention import flashattention_backend
from jax_flash.compat import sglang_jax

flashattention_backend.ragged_paged_attention_v3 = sglang_jax.ragged_paged_attention
"""

from __future__ import annotations

from typing import Any

import jax

from ..checker import Checker
from ..options import ArrayLike, IndexLike
from .ragged_paged_attention import ragged_paged_attention_update

_INSTEAD = {
    "custom_mask": "give ragged_paged_attention_update a draft_mask of the new tokens",
    "xai_temperature_len": "multiply queries by the temperatures of their positions",
}


def ragged_paged_attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    kv_cache_fused: ArrayLike,
    kv_lens: IndexLike,
    page_indices: IndexLike,
    cu_q_lens: IndexLike,
    cu_kv_lens: IndexLike,
    distribution: IndexLike,
    custom_mask: ArrayLike | None = None,
    attention_sink: ArrayLike | None = None,
    *,
    causal: int = 1,
    xai_temperature_len: float | None = None,
    softmax_dtype: Any = None,
    mask_aligned_to_cu_kv: bool = False,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`ragged_paged_attention_update` with the arguments of sglang-jax's kernels, v3 included.

    Args:
      queries, keys, values, kv_lens, page_indices, cu_q_lens, cu_kv_lens, distribution, attention_sink, options: as in
        `ragged_paged_attention_update`.
      kv_cache_fused: its kv_cache, interleaved.
      causal: 1, or 0 for its use_causal_mask=False.
      custom_mask, xai_temperature_len: must be None.
      softmax_dtype, mask_aligned_to_cu_kv: not used; the softmax is float32.

    Returns:
      `(out [tokens, hq, d], kv_cache_fused)`.

    Raises:
      NotImplementedError: for a custom_mask and an xai_temperature_len.
      ValueError, TypeError: as in `ragged_paged_attention_update`.

    Source: the interface is sglang-jax's.

    Example:
      >>> flashattention_backend.ragged_paged_attention_v3 = jax_flash.compat.sglang_jax.ragged_paged_attention
    """
    del softmax_dtype, mask_aligned_to_cu_kv
    check = Checker("sglang_jax.ragged_paged_attention")
    for name, x in (("custom_mask", custom_mask), ("xai_temperature_len", xai_temperature_len)):
        if x is not None:
            raise check.fail(f"{name} must be None; {_INSTEAD[name]}", NotImplementedError)
    if causal not in (0, 1):
        raise check.fail(f"causal must be 0 or 1, got {causal!r}")
    return ragged_paged_attention_update(
        queries,
        keys,
        values,
        kv_cache_fused,
        kv_lens,
        page_indices,
        cu_q_lens,
        distribution,
        attention_sink,
        cu_kv_lens=cu_kv_lens,
        use_causal_mask=bool(causal),
        **options,
    )
