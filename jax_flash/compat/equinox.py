"""The attention of Equinox's `MultiheadAttention`, also of layers that already exist:

    import equinox
    from jax_flash.compat.equinox import multihead_attention

    equinox.nn.MultiheadAttention.__call__ = multihead_attention

A subclass with `__call__ = multihead_attention` leaves Equinox's own class as it is. It holds for Equinox 0.13.8. This
module does not import Equinox.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from ..attention import flash_attention
from ..batch_dims import plain_if_float64, promote
from ..checker import Checker
from ..masks import Mask
from ..options import Implementation
from ..validate import dropout_key

_CHECK = Checker("equinox.multihead_attention")


def multihead_attention(
    self: Any,
    query: Array,
    key_: Array,
    value: Array,
    mask: Array | Mask | None = None,
    *,
    key: Array | None = None,
    inference: bool | None = None,
    deterministic: bool | None = None,
    process_heads: Callable[..., tuple[Array, Array, Array]] | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """`equinox.nn.MultiheadAttention.__call__` with its arguments and meaning.

    Args:
      self: the layer, whose query_proj, key_proj, value_proj, output_proj, num_heads and dropout say what is computed.
        Heads are promoted to one dtype: float16, bfloat16, float32, or float64, which always runs as plain JAX.
      query, key_, value: `[sq, features]`, `[sk, features]` and `[sk, features]`; `jax.vmap` maps over batches.
      mask: `[sq, sk]` or `[heads, sq, sk]`, True or nonzero where a query may attend. Or a value of `jax_flash.masks`,
        such as `masks.causal()`, with one batch entry, for which no array of sq × sk exists.
      key: a `jax.random.key` for dropout of the attention weights, with other random bits than Equinox's.
      inference: True turns dropout off; the layer's `dropout.inference` by default.
      deterministic: Equinox's old name of inference.
      process_heads: a function of query, key and value heads, `[sq or sk, heads, d]`, that returns new ones, such as
        rotated ones.
      implementation: as in `flash_attention`.

    Returns:
      `[sq, output features]`.

    Raises:
      ValueError: for arrays with a batch dim, and for dropout without a key.
      ValueError, TypeError, NotImplementedError: as in `flash_attention`.

    One deviation from Equinox: a query without a visible key gives 0, not the mean of all values.

    Source: the interface is Equinox's; the algorithm is Dao, FlashAttention-2 (2023).
    """
    for name, x in (("query", query), ("key_", key_), ("value", value)):
        if x.ndim != 2:
            raise _CHECK.fail(
                f"{name} must have rank 2 [tokens, features], got shape {x.shape}; jax.vmap maps a layer over batches"
            )
    heads = [
        jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1)
        for project, x in ((self.query_proj, query), (self.key_proj, key_), (self.value_proj, value))
    ]
    q, k, v = promote(heads if process_heads is None else process_heads(*heads))
    off = next(x for x in (deterministic, inference, self.dropout.inference) if x is not None)
    instead = "keep it a float, as equinox.filter_jit does"
    rate = 0.0 if off else _CHECK.number("dropout.p", self.dropout.p, instead)
    if rate and key is None:
        raise _CHECK.fail(f"dropout.p is {rate}, which needs key (a jax.random.key), or inference=True")
    if mask is not None and not isinstance(mask, Mask):
        seen = _CHECK.array("mask", mask).astype(bool)
        mask = seen[None] if seen.ndim == 3 else seen  # [1, heads, sq, sk]
    out = flash_attention(
        q[None],
        k[None],
        v[None],
        mask=mask,
        dropout_rate=rate,
        dropout_key=dropout_key(_CHECK, "key", key) if rate else None,
        implementation=plain_if_float64(implementation, q.dtype),
    )
    joined: Array = jax.vmap(self.output_proj)(out.reshape(query.shape[0], -1))
    return joined
