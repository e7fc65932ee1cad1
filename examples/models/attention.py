"""Grouped-query attention as decoders have it: `flash_attention` of whole sequences, `paged_attention` from a cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flash import flash_attention, paged_attention
from jax_flash.masks import Mask

from .cache import KVShape, PagedCache
from .config import Config
from .layers import RMSNorm, linear
from .rope import Rope


class CausalAttention(nnx.Module):
    """What attention with any projections has: its place in the model, rotary positions, and how rows see keys.

    Args:
      config: of the model.
      layer: index of the layer, by which the cache knows it.
      rope: the angles of its positions.
      kv_shape: what the cache keeps of a token; None: another layer keeps it, whose index `layer` is.
      window, sinks, scale: as in `Attention`.
    """

    def __init__(
        self,
        config: Config,
        layer: int,
        rope: Rope,
        kv_shape: KVShape | None,
        *,
        window: int | None = None,
        sinks: bool = False,
        scale: float | None = None,
    ):
        self.layer, self.rope, self.kv_shape = layer, rope, kv_shape
        self.sinks = nnx.Param(jnp.zeros(config.num_attention_heads, jnp.float32)) if sinks else None
        self.options = dict(
            window=None if window is None else (window - 1, None),
            scale=scale,
            implementation=config.attention,
        )

    def attend(
        self,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        cache: PagedCache | None,
        mask: Mask | None,
        **paged: Any,
    ) -> jax.Array:
        """q [..., hq, d], k and v [..., hk, d] → [..., hq, d]; `paged` are options of `paged_attention` alone.

        Without k, what the cache has of the layer is attended to.
        """
        options: dict[str, Any] = dict(self.options, causal=mask is None, mask=mask)
        if self.sinks is not None:
            options["sinks"] = self.sinks[...]
        if cache is None:
            return flash_attention(q, k, v, **options)
        if k is not None:
            cache.append(self.layer, k, v, options["implementation"])
        pages = cache.read(self.layer)
        return paged_attention(q, *pages, cu_seqlens_q=cache.cu_seqlens, **options, **paged)


class Attention(CausalAttention):
    """Causal self-attention with rotary positions.

    Args:
      config: of the model; the projections have its sizes.
      layer: index of the layer, by which the cache knows it.
      rope: the angles of its positions.
      window: how many tokens a query sees, itself included; None for all before it.
      qk_norm: whether each head's queries and keys are normalised before they are rotated.
      sinks: whether each head has a learned logit that takes part in the softmax's sum alone.
      bias: whether the projections have biases.
      scale: of the scores, 1/√head_dim by default.
    """

    def __init__(
        self,
        config: Config,
        layer: int,
        rope: Rope,
        *,
        window: int | None = None,
        qk_norm: bool = False,
        sinks: bool = False,
        bias: bool = False,
        scale: float | None = None,
        rngs: nnx.Rngs,
    ):
        width, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        super().__init__(
            config, layer, rope, KVShape(kv_heads, dim, dim), window=window, sinks=sinks, scale=scale
        )
        self.q_proj = linear(config, width, heads * dim, bias=bias, rngs=rngs)
        self.k_proj = linear(config, width, kv_heads * dim, bias=bias, rngs=rngs)
        self.v_proj = linear(config, width, kv_heads * dim, bias=bias, rngs=rngs)
        self.o_proj = linear(config, heads * dim, width, bias=bias, rngs=rngs)
        self.q_norm = RMSNorm(config, dim) if qk_norm else None
        self.k_norm = RMSNorm(config, dim) if qk_norm else None
        self.head_dim = dim

    def __call__(self, x: jax.Array, cache: PagedCache | None = None, mask: Mask | None = None) -> jax.Array:
        """x [b, s, width] of whole sequences, or [t, width] of a step's tokens with a cache → the same shape.

        A mask takes the causal mask's place; the window still holds.
        """
        q, k, v = (self.by_heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        positions = jnp.arange(x.shape[-2]) if cache is None else cache.positions
        q, k = self.rope(positions, q, k)
        out = self.attend(q, k, v, cache, mask)
        return self.o_proj(out.reshape(*x.shape[:-1], -1))

    def by_heads(self, x: jax.Array) -> jax.Array:
        """[..., h · d] → [..., h, d]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)
