"""Gemma 3 (Gemma Team 2025): five layers with a window for each one without, and images that are seen both ways.

4B has 34 layers of width 2,560, 8 query and 4 KV heads of 256 features, windows of 1,024 tokens, an MLP of 10,240 and
262,208 tokens. Each part has a norm before and behind it, queries and keys one in each head; norms multiply by 1 +
weight. Layers with a window have another base frequency of the rotary embedding than those without.

The image encoder is not here: its vectors are an argument. Every token of an image sees the whole image, and a text
token sees what is before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_flash import masks

from .attention import Attention
from .cache import PagedCache
from .config import Config, rope_parameters
from .decoder import CausalLM
from .layers import MLP, RMSNorm
from .rope import make_rope


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Config):
    """These are the defaults of fields that a checkpoint does not have."""

    vocab_size: int = 262_208
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 131_072
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: float = 256.0  # scores are scaled by 1/√ of it
    final_logit_softcapping: float | None = None
    norm_offset: ClassVar[float] = 1.0

    @classmethod
    def from_json(cls, json: Mapping[str, Any], **changes: Any) -> Self:
        """As `Config.from_json`, with a kind of layer and rotary parameters for each."""
        kinds = [
            "full_attention" if (i + 1) % json.get("sliding_window_pattern", 6) == 0 else "sliding_attention"
            for i in range(json["num_hidden_layers"])
        ]
        local = {"rope_theta": json.get("rope_local_base_freq", 10_000.0)}
        ropes = {"full_attention": rope_parameters(json, 1_000_000.0), "sliding_attention": local}
        json = {
            "layer_types": kinds,
            "rope_parameters": ropes,
            "hidden_act": json.get("hidden_activation"),
            **json,
        }
        return super().from_json(json, **changes)


class Block(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, config: Gemma3Config, layer: int, *, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = Attention(
            config,
            layer,
            make_rope(config.head_dim, config.rope_parameters[config.layer_types[layer]]),
            window=config.window(layer),
            qk_norm=True,
            scale=config.query_pre_attn_scalar**-0.5,
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        self.pre_feedforward_layernorm = RMSNorm(config, config.hidden_size)
        self.mlp = MLP(config, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(config, config.hidden_size)

    def __call__(
        self, x: jax.Array, cache: PagedCache | None = None, mask: masks.Mask | None = None
    ) -> jax.Array:
        attended = self.self_attn(self.input_layernorm(x), cache, mask)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3(CausalLM):
    """Tokens, and vectors of images, → logits."""

    config_type = Gemma3Config
    unread = (
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    )

    def __call__(
        self,
        tokens: jax.Array,
        cache: PagedCache | None = None,
        *,
        spans: jax.Array | None = None,
        images: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token, as `CausalLM.__call__` says.

        Args:
          spans: int32, tokens' shape: which image a token belongs to, < 0 for text. A step with a cache has all tokens
            of an image or none.
          images: tokens' shape and width, the image encoder's vectors, read where spans ≥ 0.
        """
        x = self.embed_with_images(tokens, spans, images)
        return self.run(x, cache, None if spans is None else image_mask(spans, cache))

    @classmethod
    def make_block(cls, config: Gemma3Config, layer: int, rngs: nnx.Rngs) -> Block:
        return Block(config, layer, rngs=rngs)

    def convert(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """A checkpoint with an image encoder has the text model's weights under another name."""
        return {
            name.replace("language_model.model.", "model.").replace("model.language_model.", "model."): x
            for name, x in tensors.items()
        }

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[...] → [..., width], times √width in the model's dtype."""
        return super().embed(tokens) * jnp.asarray(self.config.hidden_size**0.5, self.config.dtype)

    def embed_with_images(
        self, tokens: jax.Array, spans: jax.Array | None, images: jax.Array | None
    ) -> jax.Array:
        """The same with the images' vectors in the place of their tokens; arguments as `__call__` says."""
        x = self.embed(tokens)
        return x if images is None else jnp.where((spans >= 0)[..., None], images.astype(x.dtype), x)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., width] → [..., vocabulary], float32."""
        logits, cap = super().logits(x), self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def image_mask(spans: jax.Array, cache: PagedCache | None) -> masks.Mask:
    """Causal, and within an image both ways."""
    return masks.bidirectional_spans(spans) if cache is None else masks.ranges(0, cache.ends(spans)[None])
