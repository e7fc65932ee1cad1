"""The attention of EasyDeL's models, with the arguments of `ejkernel.modules`:

    from easydel.operations.kernels import flash_attention, scaled_dot_product_attention
    from jax_flash.compat import easydel

    flash_attention.flash_attention = easydel.flash_attention
    scaled_dot_product_attention.scaled_dot_product_attention = easydel.scaled_dot_product_attention

Models with `attn_mechanism="flash_attn2"` or `"sdpa"` then run here; `"auto"` is `"sdpa"` on GPUs. To serve here too,
replace `ragged_page_attention.ragged_page_attention_v2` and `_v3`, and `unified_attention.unified_attention`. All this
holds for EasyDeL 0.3.0 and ejkernel 0.0.78; neither is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..attention import flash_attention as attend
from ..batch_dims import local_window
from ..checker import MARK_STATIC, Checker
from ..options import ArrayLike, Implementation, Number
from .easydel_pages import ragged_page_attention_v2, ragged_page_attention_v3, unified_attention

__all__ = [
    "flash_attention",
    "ragged_page_attention_v2",
    "ragged_page_attention_v3",
    "scaled_dot_product_attention",
    "unified_attention",
]

_CHECK = Checker("easydel.flash_attention")
_CHECK_SDPA = Checker("easydel.scaled_dot_product_attention")
# Ids of queries and keys outside every segment; they differ, so that such queries see no key.
_PADDING = (-1, -2)


def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    cum_seqlens_q: Any = None,
    cum_seqlens_k: Any = None,
    softmax_aux: ArrayLike | None = None,
    block_tables: Any = None,
    /,
    *,
    mask_info: Any = None,
    softmax_scale: Number | None = None,
    dropout_prob: Number = 0.0,
    causal: bool = False,
    dropout_seed: Any = None,
    sliding_window: int | tuple[int, int] | None = None,
    logits_soft_cap: Number | None = None,
    normalize_output: bool = True,
    precision: Any = None,
    logits_dtype: Any = None,
    platform: Any = None,
    cfg: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    implementation: Implementation | None = None,
) -> Array:
    """ejkernel's `flash_attention` with its arguments and meaning.

    Args:
      query, key, value: `[b, sq, hq, d]`, `[b, sk, hk, d]`, `[b, sk, hk, dv]`, of dtypes that promote to float16,
        bfloat16 or float32.
      bias: added before the soft cap, broadcastable to `[b, hq, sq, sk]`. Differentiable here.
      softmax_aux: `[sinks]` for all heads or `[hq, sinks]`: logits that take part in the softmax sum only, once (in
        ejkernel's XLA kernel once for each block of keys). Differentiable here.
      mask_info: a MaskInfo. Kernels skip keys by its segment ids, which are −1 for padding; its attention mask is
        dense. If both are given, both apply.
      softmax_scale: factor of q·kᵀ, 1/√d by default.
      dropout_prob, dropout_seed: dropout of the attention weights, with other random bits than ejkernel's.
      causal: query i sees keys up to i.
      sliding_window: `(left, right)` around key i, or one number for both.
      logits_soft_cap: c in `S ← c·tanh(S/c)`.
      precision, logits_dtype, platform, cfg: have no effect; scores and softmax are float32.
      mesh, in_specs, out_specs: have no effect; the call is partitioned as its operands are sharded.
      implementation: as in `jax_flash.flash_attention`.

    Returns:
      `[b, sq, hq, dv]` in query's dtype.

    Raises:
      NotImplementedError: for block_tables, for cum_seqlens without an attention mask, and for normalize_output=False.
      ValueError, TypeError: as in `jax_flash.flash_attention`.

    One deviation: a query that sees nothing gives 0, not the mean of the values.

    Source: the interface is ejkernel's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> out = flash_attention(q, k, v, causal=True, sliding_window=(1023, 0))
    """
    del precision, logits_dtype, platform, cfg, mesh, in_specs, out_specs
    q, k, v = (_CHECK.array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    dtype = jnp.result_type(q, k, v)
    if block_tables is not None:
        raise _CHECK.fail("block_tables: use jax_flash.paged_attention for pages", NotImplementedError)
    if not _CHECK.flag("normalize_output", normalize_output):
        raise _CHECK.fail("normalize_output must be True", NotImplementedError)
    rate = _CHECK.number("dropout_prob", dropout_prob, MARK_STATIC)
    mask, ids = _seen(_CHECK, mask_info)
    if mask is None and (cum_seqlens_q is not None or cum_seqlens_k is not None):
        raise _CHECK.fail(
            "cum_seqlens need an attention mask in mask_info, as on ejkernel's XLA platform; "
            "use jax_flash.flash_attention_varlen for packed sequences",
            NotImplementedError,
        )
    out: Array = attend(
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        causal=causal,
        window=local_window(_CHECK, sliding_window, "sliding_window"),
        align="top_left",
        mask=mask,
        segment_ids=ids,
        scale=softmax_scale,
        softcap=logits_soft_cap,
        bias=None if bias is None else _CHECK.bias("bias", bias, dtype),
        bias_first=True,
        sinks=None if softmax_aux is None else _sinks(softmax_aux, q.shape[2]),
        dropout_rate=rate,
        dropout_key=jax.random.key(0 if dropout_seed is None else dropout_seed) if rate else None,
        implementation=implementation,
    )
    return out.astype(q.dtype)


def scaled_dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    cum_seqlens_q: Any = None,
    cum_seqlens_k: Any = None,
    /,
    *,
    mask_info: Any = None,
    init_bias: Callable[[], ArrayLike] | None = None,
    softmax_scale: Number | None = None,
    causal: bool = False,
    sliding_window: int | tuple[int, int] | None = None,
    platform: Any = None,
    mesh: Any = None,
    in_specs: Any = None,
    out_specs: Any = None,
    implementation: Implementation | None = None,
) -> Array:
    """ejkernel's `scaled_dot_product_attention` with its arguments and meaning.

    Args:
      query, key, value, bias, softmax_scale, causal, sliding_window, platform, mesh, in_specs, out_specs,
        implementation: as in `flash_attention`.
      cum_seqlens_q, cum_seqlens_k: int32 `[b]`, which are lengths: rows and keys in use of each batch entry.
      mask_info: a MaskInfo; its attention mask, or where it has none its segment ids.
      init_bias: makes the bias where none is given.

    Returns:
      `[b, sq, hq, dv]` in query's dtype.

    Raises:
      ValueError, TypeError: as in `jax_flash.flash_attention`.

    One deviation: a query that sees nothing gives 0, not the mean of the values.

    Source: the interface is ejkernel's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> out = scaled_dot_product_attention(q, k, v, causal=True)
    """
    del platform, mesh, in_specs, out_specs
    q, k, v = (_CHECK_SDPA.array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    dtype = jnp.result_type(q, k, v)
    if bias is None and init_bias is not None:
        bias = init_bias()
    mask, ids = _seen(_CHECK_SDPA, mask_info)
    out: Array = attend(
        q.astype(dtype),
        k.astype(dtype),
        v.astype(dtype),
        causal=causal,
        window=local_window(_CHECK_SDPA, sliding_window, "sliding_window"),
        align="top_left",
        mask=mask,
        segment_ids=None if mask is not None else ids,
        q_lengths=cum_seqlens_q,
        kv_lengths=cum_seqlens_k,
        scale=softmax_scale,
        bias=None if bias is None else _CHECK_SDPA.bias("bias", bias, dtype),
        implementation=implementation,
    )
    return out.astype(q.dtype)


def _seen(check: Checker, info: Any) -> tuple[Array | None, tuple[Array, Array] | None]:
    """A MaskInfo's mask `[b, heads | 1, sq, sk]`, and segment ids. Queries and keys with negative ids are padding."""
    if info is None:
        return None, None
    if not hasattr(info, "_attention_mask"):
        raise check.fail(
            f"mask_info must be ejkernel's MaskInfo or None, got {type(info).__name__}; "
            "MaskInfo.from_attention_mask makes one of an array",
            TypeError,
        )
    mask, ids = info._attention_mask, None
    if info._q_segment_ids is not None or info._kv_segment_ids is not None:
        given = info.get_or_compute_segment_ids(per_head=False)
        q_ids, kv_ids = (jnp.where(x < 0, out, x).astype(jnp.int32) for x, out in zip(given, _PADDING))
        ids = q_ids, kv_ids
    elif mask is None:
        mask = info.get_or_compute_attention_mask()
    if mask is None:
        return None, ids
    mask = jnp.asarray(mask).astype(bool)
    if mask.ndim == 2:  # the mask is one of keys
        mask = mask[:, None, None]
    return mask[:, None] if mask.ndim == 3 else mask, ids


def _sinks(aux: ArrayLike, heads: int) -> Array:
    """One sink for each head, which adds as much to the softmax's sum as all of the head's sinks together."""
    given = _CHECK.array("softmax_aux", aux).astype(jnp.float32)
    if given.ndim not in (1, 2) or (given.ndim == 2 and given.shape[0] not in (1, heads)):
        raise _CHECK.fail(f"softmax_aux must have shape [sinks] or [{heads}, sinks], got {given.shape}")
    return jnp.broadcast_to(jax.nn.logsumexp(given, axis=-1), (heads,))
