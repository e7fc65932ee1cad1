"""Qwen 3, dense (Yang et al. 2025): Llama's blocks, with queries and keys normalised in each head.

8B has 36 layers of width 4,096, 32 query and 8 KV heads of 128 features, an MLP of 12,288 and 151,936 tokens. The small
models share the embedding with the output.
"""

from __future__ import annotations

from flax import nnx

from .attention import Attention
from .config import Config
from .decoder import CausalLM
from .layers import MLP, Block
from .rope import make_rope


class Qwen3(CausalLM):
    """Tokens → logits, as `CausalLM` says."""

    @classmethod
    def make_block(cls, config: Config, layer: int, rngs: nnx.Rngs) -> Block:
        rope = make_rope(config.head_dim, config.rope_parameters)
        attention = Attention(config, layer, rope, qk_norm=True, window=config.window(layer), rngs=rngs)
        return Block(config, attention, MLP(config, rngs=rngs))
