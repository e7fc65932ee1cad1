"""The attention of MaxDiffusion's models (Stable Diffusion, Flux, Wan, LTX-2, Z-Image), to be set in its place:

    from maxdiffusion.models import attention_flax
    from jax_flash.compat import maxdiffusion

    attention_flax._apply_attention = maxdiffusion.apply_attention

Its AttentionOp and NNXAttentionOp then run here, whatever `attention` and `flash_min_seq_length` of the configuration
say; "cudnn_flash_te" would still import Transformer Engine. MaxDiffusion's own attention stays in the older LTX-Video,
in Z-Image and Qwen 3 with "dot_product", and in Z-Image below `flash_min_seq_length`. It holds for its commit
7cfb8801. This module does not import MaxDiffusion.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..attention import flash_attention
from ..batch_dims import plain_if_float64, promote
from ..checker import Checker
from ..options import Implementation, Number

_CHECK = Checker("maxdiffusion.apply_attention")


def apply_attention(
    query: Array,
    key: Array,
    value: Array,
    heads: int,
    dim_head: Any = None,
    split_head_dim: Any = None,
    float32_qk_product: Any = None,
    attention_kernel: Any = None,
    flash_min_seq_length: Any = None,
    use_memory_efficient_attention: Any = None,
    scale: Number | None = None,
    dtype: Any = None,
    mesh: Any = None,
    axis_names_q: Any = None,
    axis_names_kv: Any = None,
    flash_block_sizes: Any = None,
    dpa_layer: Any = None,
    mask_padding_tokens: Any = True,
    residual_checkpoint_name: Any = None,
    attention_mask: Array | None = None,
    use_base2_exp: Any = False,
    use_experimental_scheduler: Any = False,
    ulysses_shards: Any = -1,
    ulysses_attention_chunks: Any = 1,
    is_causal: bool = False,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """MaxDiffusion's `_apply_attention` with its arguments and meaning.

    Args:
      query, key, value: `[b, sq, heads·d]`, `[b, sk, heads·d]` and `[b, sk, heads·dv]`, or each `[b, heads, s, d]`; the
        dtypes are promoted to one: float16, bfloat16, float32, or float64, which always runs as plain JAX.
      scale: a number, the factor of q·kᵀ; 1/√d by default.
      dtype: that of the weights: the result has it promoted with value's.
      attention_mask: `[b, sk]`, True or nonzero for the keys that exist.
      is_causal: query i attends to keys 0 … i. MaxDiffusion's own "dot_product" ignores it.
      implementation: as in `flash_attention`.
      The others choose and steer MaxDiffusion's kernels, and have no effect. Remat policies see `flash_out` and
        `flash_lse` instead of `residual_checkpoint_name`.

    Returns:
      `[b, sq, heads·dv]`.

    Raises:
      ValueError: for columns that heads does not divide, and for a mask of another shape.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Source: the interface is MaxDiffusion's; the algorithm is Dao, FlashAttention-2 (2023).
    """
    named = ("query", query), ("key", key), ("value", value)
    q, k, v = promote([_by_head(name, x, heads) for name, x in named])
    mask = None
    if attention_mask is not None:
        mask = _CHECK.array("attention_mask", attention_mask)
        _CHECK.shape("attention_mask", mask, (k.shape[0], k.shape[1]), "b sk")
        mask = mask.astype(bool)[:, None, None]
    out = flash_attention(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        causal=is_causal,
        align="top_left",
        implementation=plain_if_float64(implementation, q.dtype),
    )
    wide = value.dtype if dtype is None else jnp.promote_types(dtype, value.dtype)
    joined: Array = out.astype(wide).reshape(*out.shape[:2], -1)
    return joined


def _by_head(name: str, given: Array, heads: int) -> Array:
    """`[b, s, heads, d]`."""
    x = _CHECK.array(name, given)
    heads = _CHECK.whole("heads", heads, least=1)
    if x.ndim == 4:
        return x.swapaxes(1, 2)
    if x.ndim != 3 or x.shape[-1] % heads:
        raise _CHECK.fail(
            f"{name} must be [b, s, heads·d] with {heads} heads, or [b, heads, s, d], got shape {x.shape}"
        )
    return x.reshape(*x.shape[:2], heads, -1)
