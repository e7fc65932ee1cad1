"""`attention_fn` for the MultiHeadAttention of Flax linen and nnx, in training and decode.

This module does not import Flax, so that `import jax_flash.flax` works without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._jax import same_dim
from .attention import flash_attention
from .batch_dims import check_batch_dims, over_batch_dims, plain_if_float64, promote
from .checker import MARK_STATIC, Checker
from .masks import Mask
from .options import ArrayLike, Implementation, IndexLike, Number, Window
from .spec import UNLIMITED
from .validate import band, dropout_key

_CHECK = Checker("attention_fn")
_SCORES = "batch... heads q_length kv_length"


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: ArrayLike | Mask | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Array] | None = None,
    qk_attn_weights_einsum: Callable[..., Array] | None = None,
    attn_weights_value_einsum: Callable[..., Array] | None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    *,
    window: Window | None = None,
    scale: Number | None = None,
    softcap: Number | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    segment_ids: ArrayLike | tuple[IndexLike, IndexLike] | None = None,
    deterministic_backward: bool = False,
    implementation: Implementation | None = None,
    **unknown: Any,
) -> Array:
    """`flash_attention` with the signature that Flax expects of an `attention_fn`.

    Shapes: query `[batch..., q_length, heads, depth]`, key and value `[batch..., kv_length, kv_heads, depth]`
    with any number of batch dims, also none; `heads` is a multiple of `kv_heads`. The result is
    `[batch..., q_length, heads, v_depth]` in the promoted dtype: float16, bfloat16, float32, or float64, which always
    runs as plain JAX.

    Args:
      bias: added to the scores, broadcastable to `[batch..., heads, q_length, kv_length]`; differentiable.
      mask: broadcastable to the same shape; True or nonzero where a query may attend, as Flax makes them. Or a value of
        `jax_flash.masks`, with one batch dim. Batch dims that only bias or mask have (`extra_batch_dims`) become the
        result's, as in linen.
      broadcast_dropout: has no effect. With True, Flax shares one dropout mask among all batch entries and
        heads; here every element has its own random bits in either case. Both drop each weight with probability
        `dropout_rate`, so that only the correlation between batch entries and heads differs.
      dropout_rng, dropout_rate, deterministic: dropout of the attention weights unless `deterministic`. The
        same key gives the same result, but not the result of Flax's own generator.
      dtype: computation dtype; None promotes query, key and value together, as Flax does.
      precision: None or a `jax.lax.Precision` in any spelling. It allows float32 products to be rounded; here
        they are never rounded, which satisfies all of them.
      module: a module of linen or nnx, which sows the attention weights before dropout, `[batch..., heads, q_length,
        kv_length]`, as `attention_weights` (`sow_weights=True`). Plain JAX computes them in addition to the
        kernel's result, in quadratic memory and more than its time: use it to inspect weights, not to train.
      force_fp32_for_softmax: the softmax is always float32; with True weights that are sown are float32 too.
      promote_dtype: a function that replaces the promotion, called with `(query, key, value)` and `dtype=`.
      is_causal: query i attends to keys 0 … i. nnx passes it, so that one bound with `functools.partial` has no
        effect. A single query with a mask is a decode step, whose mask says which cached keys exist. There
        `is_causal`, which some versions of nnx pass, is ignored, and the query's position, for `window` and
        `alibi_slopes`, is that of the last key that the mask shows.
      segment_ids: int32 `(q_ids [batch..., q_length], kv_ids [batch..., kv_length])`, or one array for both; a query
        attends only to keys of its own segment.
      sinks: float32 `[heads]`, or for each token `[batch..., q_length, heads]`; differentiable.
      window, scale, softcap, alibi_slopes, implementation: as in `flash_attention`, and
        `deterministic_backward` is its `deterministic`. Flax passes neither these nor segment_ids; bind them with
        `attention_fn=functools.partial(jax_flash.flax.attention_fn, window=(256, 0))`.

    Raises:
      ValueError: for dropout without `dropout_rng`, for shapes that do not match, for a `window` in a decode step whose
        mask is a value of `jax_flash.masks`, and for combinations of einsums that Flax refuses.
      NotImplementedError: for what a fused kernel cannot do: einsum or dot_general replacements, a `precision` that
        names a dot algorithm, and any argument that is not listed here.
      TypeError: for complex numbers, and for a `dropout_rng` that is not one key.

    One more deviation from Flax: a query whose keys are all masked gives 0 instead of the mean of the values.

    Source: the interface is Flax's; the algorithm is Dao, FlashAttention-2 (2023).

    Example:
      >>> layer = nnx.MultiHeadAttention(8, 512, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
      >>> y = layer(x, is_causal=True)  # x [batch, length, 512]
    """
    _refuse(
        unknown,
        precision,
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    _check_precision(precision)
    dropout_rate = _CHECK.rate("dropout_rate", dropout_rate, MARK_STATIC)
    dropout = not deterministic and dropout_rate > 0.0
    if dropout and dropout_rng is None:
        raise _CHECK.fail(
            f"dropout_rng is required where dropout_rate is {dropout_rate}; pass a key, or deterministic=True"
        )
    query, key, value = (promote_dtype or promote)((query, key, value), dtype=dtype)
    _check_shapes(query, key, value)
    bias = None if bias is None else _CHECK.array("bias", bias)
    mask = mask if mask is None or isinstance(mask, Mask) else _CHECK.array("mask", mask)
    query, key, value = _with_batch_dims_of((bias, mask), query, key, value)
    decode_step = mask is not None and same_dim(query.shape[-3], 1)
    left = band(_CHECK, False, window)[0] if decode_step else UNLIMITED
    if left != UNLIMITED and isinstance(mask, Mask):
        raise _CHECK.fail(
            f"window is {window}, but the position of a decode step is not known if its mask is a value of "
            "jax_flash.masks; join masks.window(left, 0, offset=position) to the mask instead"
        )
    # Without sinks the weights do not depend on the position from which ALiBi counts.
    slopes: Array | None = None
    if decode_step and sinks is not None and alibi_slopes is not None:
        slopes, alibi_slopes = _slopes(alibi_slopes, query), None
        if isinstance(mask, Mask):
            raise _CHECK.fail(
                "alibi_slopes are given with sinks, but the position of a decode step is not known if its mask is a "
                "value of jax_flash.masks; pass a boolean mask, or a bias instead of the slopes"
            )

    def attend(query: Array, key: Array, value: Array, *, plain: bool = False, **arrays: Any) -> Array:
        ids = (arrays.pop("q_ids"), arrays.pop("kv_ids")) if "q_ids" in arrays else None
        out: Array = flash_attention(
            query,
            key,
            value,
            causal=is_causal and not decode_step,
            window=None if decode_step else window,
            align="bottom_right" if decode_step else "top_left",
            scale=scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            segment_ids=ids,
            dropout_rate=dropout_rate if "dropout_key" in arrays else 0.0,
            deterministic=deterministic_backward,
            implementation="xla" if plain else plain_if_float64(implementation, query.dtype),
            **arrays,
        )
        return out

    scores = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
    arrays: dict[str, Array] = {}
    if bias is not None:
        arrays["bias"] = _CHECK.broadcastable("bias", _CHECK.bias("bias", bias, query.dtype), scores, _SCORES)
    if isinstance(mask, Mask):
        if query.ndim != 4:
            raise _CHECK.fail(
                f"a mask of jax_flash.masks needs one batch dim, got query of shape {query.shape}"
            )
        attend = partial(attend, mask=mask)
    elif mask is not None:
        arrays["mask"] = _CHECK.broadcastable("mask", mask.astype(bool), scores, _SCORES)
        if left != UNLIMITED or slopes is not None:
            arrays["mask"], distance = _before_last(arrays["mask"], key.shape[-3])
        if left != UNLIMITED:
            arrays["mask"] &= distance <= left
        if slopes is not None:
            wide = jnp.promote_types(query.dtype, jnp.float32)
            alibi = -slopes.astype(wide) * distance.astype(wide)
            arrays["bias"] = alibi + arrays["bias"].astype(wide) if "bias" in arrays else alibi
    if segment_ids is not None:
        arrays["q_ids"], arrays["kv_ids"] = _segments(segment_ids, query, key)
    if sinks is not None:
        given = _CHECK.float32("sinks", sinks)
        if given.ndim == 1:
            attend = partial(attend, sinks=given)
        else:
            _CHECK.shape("sinks", given, query.shape[:-1], "batch... q_length heads")
            arrays["sinks"] = given
    if module:
        wide = jnp.promote_types(query.dtype, jnp.float32) if force_fp32_for_softmax else query.dtype
        # Attention over unit vectors gives the weights, with every option.
        units = jnp.eye(key.shape[-3], dtype=wide)[:, None]
        units = jnp.broadcast_to(units, (*key.shape[:-1], key.shape[-3]))
        rows = over_batch_dims(
            partial(attend, plain=True), query.astype(wide), key.astype(wide), units, arrays
        )
        _sow(module, jnp.moveaxis(rows, -2, -3))
    if dropout and dropout_rng is not None:
        arrays["dropout_key"] = dropout_key(_CHECK, "dropout_rng", dropout_rng)
    out: Array = over_batch_dims(attend, query, key, value, arrays)
    return out


def _slopes(given: ArrayLike, query: Array) -> Array:
    """ALiBi's slopes, [heads] or [batch, heads], as they broadcast to the scores."""
    slopes, heads = lax.stop_gradient(_CHECK.float32("alibi_slopes", given)), query.shape[-2]
    batch = query.shape[-4] if query.ndim > 3 else 1
    if (
        slopes.ndim not in (1, 2)
        or slopes.shape[-1] != heads
        or slopes.shape[:-1] not in ((), (1,), (batch,))
    ):
        raise _CHECK.fail(
            f"alibi_slopes must be [heads] = ({heads},) or [batch, heads], got shape {slopes.shape}"
        )
    by_entry = slopes if query.ndim > 3 else slopes.reshape(heads)
    lead = (1,) * (query.ndim - 2 - by_entry.ndim)
    return by_entry.reshape((*lead, *by_entry.shape, 1, 1))


def _before_last(mask: Array, kv_length: Any) -> tuple[Array, Array]:
    """The mask with all columns, and the distance of each key from the last one that its row shows."""
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], kv_length))
    at = lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    return mask, jnp.max(jnp.where(mask, at, -1), axis=-1, keepdims=True, initial=-1) - at


def _sow(module: Any, weights: Array) -> None:
    """Stores the weights where Flax's own attention does."""
    from flax import nnx

    collection = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(collection, "attention_weights", weights)


_LEAVE_OUT = "leave it out, or use flax's own dot_product_attention"
_WAYS_OUT = {  # of unknown arguments
    "causal": "Flax's name is is_causal, as in layer(x, is_causal=True)",
    "float32_logits": "scores are always float32, so that a function around attention_fn can leave it out",
    "input_positions": "a function around attention_fn can rotate query and key by them (jax_flash.apply_rotary) and "
    "leave them out",
}


def _refuse(unknown: dict[str, Any], precision: Any, **unsupported: Any) -> None:
    """Raises for arguments that a fused kernel cannot support."""
    einsums = [
        unsupported[f"{name}_einsum"] is not None for name in ("qk_attn_weights", "attn_weights_value")
    ]
    if any(einsums) and not all(einsums):
        raise _CHECK.fail("qk_attn_weights_einsum and attn_weights_value_einsum must be specified together")
    if any(einsums) and (precision or unsupported["einsum_dot_general"]):
        raise _CHECK.fail(
            "precision or einsum_dot_general, and qk_attn_weights_einsum exclude each other; pass one"
        )
    if unknown:
        name = next((x for x in _WAYS_OUT if x in unknown), next(iter(unknown)))
        raise _CHECK.fail(f"unknown argument {name}; {_WAYS_OUT.get(name, _LEAVE_OUT)}", NotImplementedError)
    given = [name for name, argument in unsupported.items() if argument is not None]
    if given:
        raise _CHECK.fail(f"{given[0]} cannot change a fused kernel; {_LEAVE_OUT}", NotImplementedError)


def _check_precision(precision: Any) -> None:
    """Accepts every `jax.lax.Precision`, in any spelling or as a pair; raises for a dot algorithm."""
    pair = precision if isinstance(precision, list) or type(precision) is tuple else (precision,)
    for item in pair:
        try:
            jax.lax.Precision(item)
        except (TypeError, ValueError):
            raise _CHECK.fail(
                f"precision is {precision!r}; allowed are None and jax.lax.Precision, "
                "dot algorithms cannot be chosen",
                NotImplementedError,
            ) from None


def _with_batch_dims_of(scored: Sequence[Any], query: Array, key: Array, value: Array) -> list[Array]:
    """Query, key and value, repeated along the batch dims of bias and mask that they lack or have as 1."""
    batch = query.shape[:-3]
    wider = [jnp.shape(x)[:-3] for x in scored if x is not None and not isinstance(x, Mask)]
    with suppress(ValueError):  # the checks of bias and mask say which does not fit
        batch = jnp.broadcast_shapes(batch, *wider)
    arrays = query, key, value
    return [x if batch == x.shape[:-3] else jnp.broadcast_to(x, (*batch, *x.shape[-3:])) for x in arrays]


def _segments(given: Any, query: Array, key: Array) -> Sequence[Array]:
    """The segment ids of queries, `[batch..., q_length]`, and of keys."""
    pair = _CHECK.segment_pair(given)
    found = []
    for ids, x, dims in zip(pair, (query, key), ("batch... q_length", "batch... kv_length")):
        checked = _CHECK.broadcastable("segment_ids", _CHECK.int32("segment_ids", ids), x.shape[:-2], dims)
        found.append(jnp.broadcast_to(checked, x.shape[:-2]))
    return found


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    check_batch_dims(_CHECK, query, key, value)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if not kv_heads or heads % kv_heads:
        raise _CHECK.fail(f"query's {heads} heads must be a multiple of key's {kv_heads}")
    if not same_dim(key.shape[-3], value.shape[-3]):
        raise _CHECK.fail(f"key and value lengths must match, got {key.shape[-3]} and {value.shape[-3]}")
    if not same_dim(query.shape[-1], key.shape[-1]):
        raise _CHECK.fail(f"query and key depths must match, got {query.shape[-1]} and {key.shape[-1]}")
