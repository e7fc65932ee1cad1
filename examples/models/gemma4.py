"""Gemma 4 (Gemma Team 2026): windows as in Gemma 3, wide heads in the layers without, and layers that share keys.

Five layers with a window and heads of 256 features come for each one without and with heads of 512. In 31B and 26B-A4B,
the latter's keys and values are one projection: values are its normalised result, keys that result scaled and a quarter
of its features rotated. 26B-A4B adds 128 experts to the MLP. In E2B and E4B the last layers read the keys and values
of the last layer of their kind that has some, and every layer adds an embedding of the token that is its own.

Every token of an image sees the whole image, in layers with a window only. The encoders are not here: their vectors
are an argument.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flash.masks import Mask

from .attention import CausalAttention
from .cache import KVShape, PagedCache
from .gemma3 import Gemma3, image_mask
from .gemma4_config import WINDOW, Gemma4Config
from .layers import MLP, Experts, RMSNorm, activation, choose, linear, normalised
from .rope import make_rope

KeysAndValues = tuple[jax.Array, jax.Array]


class Attention(CausalAttention):
    """Attention with keys and values of its own, or of an earlier layer."""

    def __init__(self, config: Gemma4Config, layer: int, *, rngs: nnx.Rngs):
        kind, (kv_heads, dim) = config.layer_types[layer], config.heads(layer)
        source, width, heads = config.source(layer), config.hidden_size, config.num_attention_heads
        shape = KVShape(kv_heads, dim, dim) if source == layer else None
        rope = make_rope(dim, config.rope_parameters[kind])
        super().__init__(config, source, rope, shape, window=config.window(layer), scale=1.0)
        self.q_proj, self.q_norm = linear(config, width, heads * dim, rngs=rngs), RMSNorm(config, dim)
        self.o_proj = linear(config, heads * dim, width, rngs=rngs)
        if shape is not None:
            self.k_proj = linear(config, width, kv_heads * dim, rngs=rngs)
            self.k_norm = RMSNorm(config, dim)
            apart = kind == WINDOW or not config.attention_k_eq_v
            self.v_proj = linear(config, width, kv_heads * dim, rngs=rngs) if apart else None
        self.head_dim, self.epsilon = dim, config.rms_norm_eps

    def __call__(
        self, x: jax.Array, cache: PagedCache | None, mask: Mask | None, shared: KeysAndValues | None
    ) -> tuple[jax.Array, KeysAndValues | None]:
        """x as in `models.attention.Attention` → the same shape, and keys and values; `shared` are the source's."""
        positions = jnp.arange(x.shape[-2]) if cache is None else cache.positions
        (q,) = self.rope(positions, self.q_norm(self.by_heads(self.q_proj(x))))
        if self.kv_shape is not None:
            k = self.by_heads(self.k_proj(x))
            v = k if self.v_proj is None else self.by_heads(self.v_proj(x))
            (k,) = self.rope(positions, self.k_norm(k))
            shared = k, normalised(v, self.epsilon).astype(x.dtype)
        out = self.attend(q, *(shared or (None, None)), cache, mask)
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), shared if cache is None else None

    def by_heads(self, x: jax.Array) -> jax.Array:
        """[..., h · d] → [..., h, d]."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class Router(nnx.Module):
    """The experts with the largest probabilities, weighted by these and by a factor of each expert."""

    def __init__(self, config: Gemma4Config, *, rngs: nnx.Rngs):
        experts, width = config.num_experts, config.hidden_size
        self.proj = linear(config, width, experts, rngs=rngs)
        self.scale, self.per_expert_scale = (nnx.Param(jnp.ones(n, config.dtype)) for n in (width, experts))
        self.epsilon, self.chosen = config.rms_norm_eps, config.top_k_experts

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] → [..., experts], 0 for experts that are not chosen."""
        y = normalised(x, self.epsilon).astype(x.dtype) * self.scale[...] * x.shape[-1] ** -0.5
        weights, index = jax.lax.top_k(jax.nn.softmax(self.proj(y).astype(jnp.float32)), self.chosen)
        weights = weights / weights.sum(-1, keepdims=True) * self.per_expert_scale[...][index]
        return choose(weights, index, self.per_expert_scale.shape[0])


class Block(nnx.Module):
    """Gemma 3's block, where experts may follow in parallel to the MLP, and then the layer's embedding of the token."""

    def __init__(self, config: Gemma4Config, layer: int, *, rngs: nnx.Rngs):
        width, own = config.hidden_size, config.hidden_size_per_layer_input
        self.kind, shares = config.layer_types[layer], config.source(layer) != layer
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config, width), RMSNorm(config, width)
        self.self_attn = Attention(config, layer, rngs=rngs)
        self.pre_feedforward_layernorm = RMSNorm(config, width)
        self.post_feedforward_layernorm = RMSNorm(config, width)
        wide = 2 if shares and config.use_double_wide_mlp else 1
        self.mlp = MLP(config, wide * config.intermediate_size, rngs=rngs)
        self.layer_scalar = nnx.Variable(jnp.ones(1, config.dtype))  # no gradient trains it
        self.router = Router(config, rngs=rngs) if config.enable_moe_block else None
        if config.enable_moe_block:
            self.experts = Experts(config, config.num_experts, config.moe_intermediate_size, rngs=rngs)
            self.pre_feedforward_layernorm_2 = RMSNorm(config, width)
            self.post_feedforward_layernorm_1 = RMSNorm(config, width)
            self.post_feedforward_layernorm_2 = RMSNorm(config, width)
        if own:
            self.activation = activation(config)
            self.per_layer_input_gate = linear(config, width, own, rngs=rngs)
            self.per_layer_projection = linear(config, own, width, rngs=rngs)
            self.post_per_layer_input_norm = RMSNorm(config, width)

    def __call__(
        self, x: jax.Array, cache: Any, mask: Mask | None, shared: KeysAndValues | None, own: jax.Array | None
    ) -> tuple[jax.Array, KeysAndValues | None]:
        attended, shared = self.self_attn(self.input_layernorm(x), cache, mask, shared)
        x = x + self.post_attention_layernorm(attended)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        if self.router is not None:
            chosen = self.experts(self.pre_feedforward_layernorm_2(x), self.router(x))
            y = self.post_feedforward_layernorm_1(y) + self.post_feedforward_layernorm_2(chosen)
        x = x + self.post_feedforward_layernorm(y)
        if own is not None:
            y = self.per_layer_projection(self.activation(self.per_layer_input_gate(x)) * own)
            x = x + self.post_per_layer_input_norm(y)
        return x * self.layer_scalar[...], shared


class Gemma4(Gemma3):
    """Tokens, and vectors of images, → logits; `spans` and `images` as in Gemma 3."""

    config_type = Gemma4Config
    unread = tuple(f"model.{x}." for x in ("vision_tower", "audio_tower", "embed_vision", "embed_audio"))

    def __init__(self, config: Gemma4Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if own := config.hidden_size_per_layer_input:
            dtype, features = jnp.dtype(config.dtype), own * config.num_hidden_layers
            self.model.embed_tokens_per_layer = nnx.Embed(
                config.vocab_size_per_layer_input, features, dtype=dtype, param_dtype=dtype, rngs=rngs
            )
            self.model.per_layer_model_projection = linear(config, config.hidden_size, features, rngs=rngs)
            self.model.per_layer_projection_norm = RMSNorm(config, own)

    def __call__(
        self,
        tokens: jax.Array,
        cache: PagedCache | None = None,
        *,
        spans: jax.Array | None = None,
        images: jax.Array | None = None,
    ) -> jax.Array:
        x = self.embed_with_images(tokens, spans, images)
        if images is not None:
            tokens = jnp.where(spans >= 0, self.config.pad_token_id, tokens)
        own, shared = self.of_layers(tokens, x), {}
        mask = None if spans is None else image_mask(spans, cache)
        for i, block in enumerate(self.model.layers):
            arguments = mask if block.kind == WINDOW else None, shared.get(block.kind), own[i]
            x, shared[block.kind] = self.call(block, x, cache, *arguments)
        return self.finish(x, cache)

    def of_layers(self, tokens: jax.Array, x: jax.Array) -> list[jax.Array | None]:
        """Each layer's own embedding of the tokens, mixed with a projection of the model's."""
        layers, own = self.config.num_hidden_layers, self.config.hidden_size_per_layer_input
        if not own:
            return [None] * layers
        embedded = self.model.embed_tokens_per_layer(tokens) * jnp.asarray(own**0.5, x.dtype)
        projected = self.model.per_layer_model_projection(x) * x.shape[-1] ** -0.5
        embedded, projected = (y.reshape(*x.shape[:-1], layers, own) for y in (embedded, projected))
        mixed = (self.model.per_layer_projection_norm(projected) + embedded) * 2**-0.5
        return [mixed[..., i, :] for i in range(layers)]

    @classmethod
    def make_block(cls, config: Gemma4Config, layer: int, rngs: nnx.Rngs) -> Block:
        return Block(config, layer, rngs=rngs)
