"""A causal language model: embedding, blocks, a norm, and the logits of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_flash.masks import Mask

from .cache import KVShape, PagedCache
from .config import Config
from .layers import RMSNorm, linear

# Under remat, the residuals of attention are saved: they are small and expensive to recompute.
KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")


class Decoder(nnx.Module):
    """The weights that a checkpoint has under `model.`."""

    def __init__(self, config: Config, blocks: list[nnx.Module], *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List(blocks)
        self.norm = RMSNorm(config, config.hidden_size)


class CausalLM(nnx.Module):
    """The base of the models here, which define `make_block`.

    Attributes are named as a checkpoint's tensors, so that loading is a walk over the weights.
    """

    config_type: ClassVar[type[Config]] = Config
    unread: ClassVar[tuple[str, ...]] = ()  # prefixes of the names of tensors that the model does not use

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.config = config
        blocks = [self.make_block(config, layer, rngs) for layer in range(config.num_hidden_layers)]
        self.model = Decoder(config, blocks, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config, config.hidden_size, config.vocab_size, rngs=rngs)

    def __call__(self, tokens: jax.Array, cache: PagedCache | None = None) -> jax.Array:
        """Logits of the next token, float32.

        Args:
          tokens: int32 `[b, s]`, whole sequences, or `[t]`, the packed tokens of a step, with its cache.

        Returns:
          `[b, s, vocabulary]`, or after the last token of each of the step's requests `[requests, vocabulary]`.
        """
        return self.run(self.embed(tokens), cache)

    def run(self, x: jax.Array, cache: PagedCache | None = None, mask: Mask | None = None) -> jax.Array:
        """Embedded tokens [b, s, width] or [t, width] → logits, as `__call__` says; a mask replaces the causal one."""
        for block in self.model.layers:
            x = self.call(block, x, cache, mask)
        return self.finish(x, cache)

    def call(self, block: nnx.Module, x: Any, cache: PagedCache | None, *arguments: Any) -> Any:
        """A block's results, recomputed in the backward pass if the configuration says so."""
        call = type(block).__call__
        if self.config.remat and cache is None:
            call = nnx.remat(call, policy=KEEP_ATTENTION)
        return call(block, x, cache, *arguments)

    def finish(self, x: jax.Array, cache: PagedCache | None) -> jax.Array:
        """What the last block returns → logits."""
        if cache is not None:
            x = x[cache.cu_seqlens[1:] - 1]
        return self.logits(self.model.norm(x))

    @classmethod
    def make_block(cls, config: Config, layer: int, rngs: nnx.Rngs) -> nnx.Module:
        """A block, called with `(x, cache, mask)`, whose `self_attn` has a `kv_shape`."""
        raise NotImplementedError

    def convert(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """A checkpoint's tensors under the names, and in the form, of this model's weights."""
        return tensors

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[...] → [..., width]."""
        return self.model.embed_tokens(tokens)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., width] → [..., vocabulary], float32."""
        head = self.model.embed_tokens.attend if self.config.tie_word_embeddings else self.lm_head
        return head(x).astype(jnp.float32)

    @property
    def kv_shapes(self) -> list[KVShape | None]:
        """What each layer keeps of a token; None for one that reads another layer's keys and values."""
        return [block.self_attn.kv_shape for block in self.model.layers]
