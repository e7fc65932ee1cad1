"""The attention of Keras 3 on its JAX backend, to be set in the place of the backend's own:

    from keras.src.backend.jax import nn
    from jax_flash.compat.keras import dot_product_attention

    nn.dot_product_attention = dot_product_attention

`keras.ops.dot_product_attention`, MultiHeadAttention, GroupQueryAttention and the models of keras_hub then run here,
where Keras calls its backend's function: it does not for layers with dropout, with returned attention scores or with
several attention axes. keras_hub 0.32 computes scores itself in T5, Falcon, gpt-oss, Bloom, DeBERTa, XLNet, Gemma 2 and
3n, and on CPUs in its other Gemmas, Mixtral and Qwen MoE. It holds for Keras 3.15.1. This module does not import Keras.
"""

from __future__ import annotations

from jax import Array

from ..attention import flash_attention as attend
from ..batch_dims import plain_if_float64, promote
from ..checker import Checker, broadcasts
from ..options import ArrayLike, Implementation, Number

_CHECK = Checker("keras.dot_product_attention")


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    scale: Number | None = None,
    is_causal: bool = False,
    flash_attention: bool | None = None,
    attn_logits_soft_cap: Number | None = None,
    *,
    implementation: Implementation | None = None,
) -> Array:
    """`flash_attention` with the arguments of `keras.ops.dot_product_attention`.

    Args:
      query, key, value: arrays or variables of Keras, `[b, sq, hq, d]`, `[b, sk, hk, d]` and `[b, sk, hk, dv]`, whose
        dtypes are promoted to one: float16, bfloat16, float32, or float64, which always runs as plain JAX.
      bias: added to the scores, broadcastable to `[b, hq, sq, sk]`, or `[b, sq, sk]` where it could not be
        `[hq, sq, sk]`; each dimension may be 1. Differentiable.
      mask: of the same shapes; True or nonzero where a query may attend.
      scale: a number, the factor of q·kᵀ; 1/√d by default.
      is_causal: query i attends to keys 0 … i, whatever the lengths.
      flash_attention: has no effect.
      attn_logits_soft_cap: c in `S ← c·tanh(S/c)`; `keras.ops` refuses it except on TPUs.
      implementation: as in `flash_attention`.

    Returns:
      `[b, sq, hq, dv]` in the promoted dtype. Differentiable with respect to query, key, value and bias.

    Raises:
      ValueError: for shapes that do not match.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    Deviations from Keras: a query without a visible key, such as padding with `mask_zero=True`, gives 0, not the mean
    of all values. A mask of rank 3 never means `[b, hq, sk]`.

    Source: the interface is Keras'; the algorithm is Dao, FlashAttention-2 (2023).
    """
    del flash_attention
    q, k, v = promote([_CHECK.array(*x) for x in (("query", query), ("key", key), ("value", value))])
    return attend(
        q,
        k,
        v,
        bias=None if bias is None else _CHECK.bias("bias", _of_rank_4("bias", bias, q, k), q.dtype),
        mask=None if mask is None else _of_rank_4("mask", mask, q, k).astype(bool),
        scale=scale,
        causal=is_causal,
        align="top_left",
        softcap=attn_logits_soft_cap,
        implementation=plain_if_float64(implementation, q.dtype),
    )


def _of_rank_4(name: str, x: ArrayLike, q: Array, k: Array) -> Array:
    """x with the dimensions [b, hq, sq, sk]. As in Keras, [b, sq, sk] is tried after NumPy's broadcasting."""
    array = _CHECK.array(name, x)
    if q.ndim != 4 or k.ndim != 4:
        return array  # flash_attention raises
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    for wide in (array, array[:, None] if array.ndim == 3 else array):
        if broadcasts(wide.shape, sizes):
            return wide.reshape((1,) * (4 - wide.ndim) + wide.shape)
    raise _CHECK.fail(
        f"{name} must broadcast to [b hq sq sk] = {sizes}, or have the shape [b sq sk], got shape {array.shape}"
    )
