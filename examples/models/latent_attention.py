"""Multi-head latent attention (DeepSeek-AI 2024, V2): keys and values of a token are products of one latent.

The cache keeps the latent, and behind it the rotated features that all heads share: 512 + 64 numbers a token and layer
in DeepSeek V3. Whole sequences multiply the latents out, in training and where a step begins its prompts. Later steps
move the products to the queries and the results instead: q·(W c) = (Wᵀ q)·c, so that every head reads the latents as
they are, and the values are the first columns of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flash import flash_attention_varlen
from jax_flash.masks import Mask

from .attention import CausalAttention
from .cache import KVShape, PagedCache
from .config import Config
from .layers import RMSNorm, linear
from .rope import magnitude, make_rope

EPSILON = 1e-6  # of the latents' norms, whatever rms_norm_eps is


@dataclass(frozen=True, kw_only=True)
class LatentConfig(Config):
    """The sizes of the latents and of the parts of a head."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None  # None: queries are projections of the token itself
    rope_interleave: bool = True
    attention_bias: bool = False


class LatentAttention(CausalAttention):
    """Causal self-attention whose cache has latents."""

    def __init__(self, config: LatentConfig, layer: int, *, rngs: nnx.Rngs):
        heads, rank, width = config.num_attention_heads, config.kv_lora_rank, config.hidden_size
        self.nope, dim = config.qk_nope_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
        rope = make_rope(config.qk_rope_head_dim, config.rope_parameters, interleaved=config.rope_interleave)
        shape = KVShape(1, rank + config.qk_rope_head_dim, None)
        super().__init__(config, layer, rope, shape, scale=dim**-0.5 * sharpness(config.rope_parameters))
        bias = config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = linear(config, width, heads * dim, rngs=rngs)
        else:
            self.q_a_proj = linear(config, width, config.q_lora_rank, bias=bias, rngs=rngs)
            self.q_a_layernorm = RMSNorm(config, config.q_lora_rank, EPSILON)
            self.q_b_proj = linear(config, config.q_lora_rank, heads * dim, rngs=rngs)
        self.kv_a_proj_with_mqa = linear(config, width, shape.key_dim, bias=bias, rngs=rngs)
        self.kv_a_layernorm = RMSNorm(config, rank, EPSILON)
        self.kv_b_proj = linear(config, rank, heads * (self.nope + config.v_head_dim), rngs=rngs)
        self.o_proj = linear(config, heads * config.v_head_dim, width, bias=bias, rngs=rngs)
        self.heads, self.rank = heads, rank

    def __call__(self, x: jax.Array, cache: PagedCache | None = None, mask: Mask | None = None) -> jax.Array:
        """x [b, s, width] of whole sequences, or [t, width] of a step's tokens with a cache → the same shape."""
        q, q_rope = jnp.split(self.by_heads(self.queries(x)), [self.nope], -1)
        latent, k_rope = jnp.split(self.kv_a_proj_with_mqa(x), [self.rank], -1)
        latent = self.kv_a_layernorm(latent)
        positions = jnp.arange(x.shape[-2]) if cache is None else cache.positions
        q_rope, k_rope = self.rope(positions, q_rope, k_rope[..., None, :])
        latents = jnp.concatenate([latent[..., None, :], k_rope], -1)
        if cache is None:
            out = self.attend(*self.multiplied(q, q_rope, latent, k_rope), None, mask)
        else:
            cache.append(self.layer, latents, None, self.options["implementation"])
            out = jax.lax.cond(
                (cache.batch.cached == 0).all(),
                lambda: self.of_new_tokens(*self.multiplied(q, q_rope, latent, k_rope), cache, mask),
                lambda: self.of_latents(q, q_rope, cache, mask),
            )
        return self.o_proj(out.reshape(*x.shape[:-1], -1))

    def multiplied(
        self, q: jax.Array, q_rope: jax.Array, latent: jax.Array, k_rope: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of every head, whose latents are multiplied out."""
        k, v = jnp.split(self.by_heads(self.kv_b_proj(latent)), [self.nope], -1)
        k_rope = jnp.broadcast_to(k_rope, (*k.shape[:-1], k_rope.shape[-1]))
        return jnp.concatenate([q, q_rope], -1), jnp.concatenate([k, k_rope], -1), v

    def of_new_tokens(
        self, q: jax.Array, k: jax.Array, v: jax.Array, cache: PagedCache, mask: Mask | None
    ) -> jax.Array:
        """A step's tokens attend to one another: requests that had nothing in the cache."""
        return flash_attention_varlen(
            q, k, v, cache.cu_seqlens, causal=mask is None, mask=mask, **self.options
        )

    def of_latents(self, q: jax.Array, q_rope: jax.Array, cache: PagedCache, mask: Mask | None) -> jax.Array:
        """A step's tokens attend to the latents in the cache."""
        products = self.kv_b_proj.kernel[...].reshape(self.rank, self.heads, -1)
        of_keys, of_values = jnp.split(products, [self.nope], -1)
        q = jnp.concatenate([jnp.einsum("thn,rhn->thr", q, of_keys), q_rope], -1)
        out = self.attend(q, None, None, cache, mask, value_dim=self.rank)
        return jnp.einsum("thr,rhv->thv", out, of_values)

    def queries(self, x: jax.Array) -> jax.Array:
        """[..., width] → [..., heads · d]."""
        return (
            self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )

    def by_heads(self, x: jax.Array) -> jax.Array:
        """[..., h · d] → [..., h, d]."""
        return x.reshape(*x.shape[:-1], self.heads, -1)


def sharpness(rope_parameters: Mapping[str, Any]) -> float:
    """YaRN's factor on the scores, which V3 has in their scale rather than in cos and sin."""
    of_all = rope_parameters.get("mscale_all_dim")
    return magnitude(rope_parameters["factor"], of_all) ** 2 if of_all else 1.0
