"""Llama 3, 3.1, 3.2 and 3.3 (Grattafiori et al. 2024): grouped-query attention and a gated MLP, each after a norm.

8B has 32 layers of width 4,096, 32 query and 8 KV heads of 128 features, an MLP of 14,336 and 128,256 tokens. From 3.1
on, low frequencies of the rotary embedding are scaled for a context of 131,072 tokens (`rope_type` "llama3"). The small
models of 3.2 share the embedding with the output.
"""

from __future__ import annotations

from flax import nnx

from .attention import Attention
from .config import Config
from .decoder import CausalLM
from .layers import MLP, Block
from .rope import make_rope


class Llama3(CausalLM):
    """Tokens → logits, as `CausalLM` says."""

    @classmethod
    def make_block(cls, config: Config, layer: int, rngs: nnx.Rngs) -> Block:
        rope = make_rope(config.head_dim, config.rope_parameters)
        return Block(config, Attention(config, layer, rope, rngs=rngs), MLP(config, rngs=rngs))
