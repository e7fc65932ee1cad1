"""gpt-oss (OpenAI 2025): sinks in the softmax, a window in every other layer, and a mixture of experts.

20B has 24 layers of width 2,880, 64 query and 8 KV heads of 64 features with one sink each, windows of 128 tokens, 32
experts of 2,880 hidden units, of which 4 serve a token, and 201,088 tokens. Projections have biases, and the rotary
embedding is scaled by YaRN. Published weights of experts are MXFP4: 4-bit numbers with a scale for every 32.

Here every expert computes every token, and the weights of all but the chosen ones are 0: right, and simple, but the
experts' work grows by experts / chosen. A fast implementation sorts tokens by expert (`jax.lax.ragged_dot`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from .attention import Attention
from .config import Config
from .decoder import CausalLM
from .layers import Block, choose, linear, weight
from .rope import make_rope


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(Config):
    """The experts' sizes, and the limit and the slope of their activation."""

    num_local_experts: int
    num_experts_per_tok: int
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5


class Experts(nnx.Module):
    """Gated units of every expert; gate and up are the even and odd columns of one projection."""

    def __init__(self, config: GptOssConfig, *, rngs: nnx.Rngs):
        experts, width, hidden = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = weight(config, experts, width, 2 * hidden, rngs=rngs)
        self.gate_up_proj_bias = nnx.Param(jnp.zeros((experts, 2 * hidden), config.dtype))
        self.down_proj = weight(config, experts, hidden, width, rngs=rngs)
        self.down_proj_bias = nnx.Param(jnp.zeros((experts, width), config.dtype))
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """x [..., width] and the experts' weights [..., experts] → [..., width]."""
        both = jnp.einsum("...w,ewh->...eh", x, self.gate_up_proj[...]) + self.gate_up_proj_bias[...]
        gate = jnp.minimum(both[..., ::2], self.limit)
        up = jnp.clip(both[..., 1::2], -self.limit, self.limit)
        hidden = (up + 1) * gate * nnx.sigmoid(self.alpha * gate)
        each = jnp.einsum("...eh,ehw->...ew", hidden, self.down_proj[...]) + self.down_proj_bias[...]
        return jnp.einsum("...ew,...e->...w", each, weights)


class MoE(nnx.Module):
    """The experts with the largest logits, weighted by the softmax of these logits."""

    def __init__(self, config: GptOssConfig, *, rngs: nnx.Rngs):
        self.router = linear(config, config.hidden_size, config.num_local_experts, bias=True, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        self.chosen = config.num_experts_per_tok

    def __call__(self, x: jax.Array) -> jax.Array:
        logits, index = jax.lax.top_k(self.router(x), self.chosen)
        return self.experts(x, choose(jax.nn.softmax(logits), index, self.experts.gate_up_proj.shape[0]))


class GptOss(CausalLM):
    """Tokens → logits, as `CausalLM` says."""

    config_type = GptOssConfig

    @classmethod
    def make_block(cls, config: GptOssConfig, layer: int, rngs: nnx.Rngs) -> Block:
        rope = make_rope(config.head_dim, config.rope_parameters)
        attention = Attention(
            config, layer, rope, window=config.window(layer), sinks=True, bias=True, rngs=rngs
        )
        return Block(config, attention, MoE(config, rngs=rngs))

    def convert(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Multiplies MXFP4 weights out; a checkpoint without them stays as it is."""
        converted = {}
        for name, tensor in tensors.items():
            if name.endswith("_blocks"):
                name, scales = name.removesuffix("_blocks"), tensors[name.replace("_blocks", "_scales")]
                tensor = from_mxfp4(tensor, scales)
            if not name.endswith("_scales"):
                converted[name] = tensor
        return converted


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Weights [e, in, out], bfloat16, of two 4-bit numbers a byte [e, out, in/32, 16] and exponents [e, out, in/32]."""
    halves = np.stack([blocks & 15, blocks >> 4], -1)  # the low half first
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], ml_dtypes.bfloat16)
    exponents = scales.astype(np.int32)[..., None, None] - 127
    weights = np.ldexp(numbers[halves].astype(np.float32), exponents).astype(ml_dtypes.bfloat16)
    return weights.reshape(*blocks.shape[:2], -1).swapaxes(1, 2)
