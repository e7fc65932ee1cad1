"""DeepSeek V3, R1 and V3.1 (DeepSeek-AI 2024): multi-head latent attention, and experts chosen within groups.

V3 has 61 layers of width 7,168, 128 heads of 128 + 64 features for queries and keys and 128 for values, latents of
1,536 for queries and 512 for keys and values, 129,280 tokens, and, after 3 dense layers with MLPs of 18,432, 256
experts of 2,048 hidden units, of which 8 and a shared one serve a token. Published weights are float8 with a scale
for each block of 128 × 128.

As in gpt_oss.py, every expert computes every token. Weights of multi-token prediction are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .decoder import CausalLM
from .latent_attention import LatentAttention, LatentConfig
from .layers import MLP, Block, Experts, choose

KNOWN = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "quant_method": "fp8"}


@dataclass(frozen=True, kw_only=True)
class DeepSeekV3Config(LatentConfig):
    """The experts' sizes, and how they are chosen."""

    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    quantization_config: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, json: Mapping[str, Any], **changes: Any) -> Self:
        """As `Config.from_json`; raises ValueError for a setting that this model does not have."""
        given = {**(json.get("quantization_config") or {}), **json}
        for name, value in {**KNOWN, "num_key_value_heads": json.get("num_attention_heads")}.items():
            if given.get(name) not in (None, value):
                raise ValueError(f"{name} is {given[name]!r}; DeepSeek V3 has {value!r}")
        return super().from_json(json, **changes)


class Router(nnx.Module):
    """The weights of the experts: of the best groups the experts with the largest biased scores ("noaux_tc")."""

    def __init__(self, config: DeepSeekV3Config, *, rngs: nnx.Rngs):
        self.config, experts = config, config.n_routed_experts
        shape = (config.hidden_size, experts)
        self.kernel = nnx.Param(
            nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.dtype(config.dtype))
        )
        self.e_score_correction_bias = nnx.Variable(jnp.zeros(experts, jnp.float32))  # no gradient trains it

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] → [..., experts], float32, 0 for experts that are not chosen."""
        c = self.config
        scores = nnx.sigmoid(x.astype(jnp.float32) @ self.kernel[...].astype(jnp.float32))
        biased = (scores + self.e_score_correction_bias[...]).reshape(*x.shape[:-1], c.n_group, -1)
        best_two, _ = jax.lax.top_k(biased, 2)
        _, groups = jax.lax.top_k(best_two.sum(-1), c.topk_group)
        allowed = choose(jnp.ones(groups.shape), groups, c.n_group) > 0
        biased = jnp.where(allowed[..., None], biased, -jnp.inf).reshape(scores.shape)
        _, index = jax.lax.top_k(biased, c.num_experts_per_tok)
        weights = jnp.take_along_axis(scores, index, -1)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return choose(weights * c.routed_scaling_factor, index, c.n_routed_experts)


class MoE(nnx.Module):
    """The chosen experts, and the shared ones, which serve every token."""

    def __init__(self, config: DeepSeekV3Config, *, rngs: nnx.Rngs):
        self.gate = Router(config, rngs=rngs)
        self.experts = Experts(config, config.n_routed_experts, config.moe_intermediate_size, rngs=rngs)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.experts(x, self.gate(x)) + self.shared_experts(x)


class DeepSeekV3(CausalLM):
    """Tokens → logits, as `CausalLM` says."""

    config_type = DeepSeekV3Config

    @classmethod
    def make_block(cls, config: DeepSeekV3Config, layer: int, rngs: nnx.Rngs) -> Block:
        mlp = MLP if layer < config.first_k_dense_replace else MoE
        return Block(config, LatentAttention(config, layer, rngs=rngs), mlp(config, rngs=rngs))

    def convert(self, tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Multiplies float8 weights out and stacks those of the experts."""
        config, found = self.config, {}
        experts: dict[str, dict[int, np.ndarray]] = {}
        for name, tensor in tensors.items():
            if name.endswith("_scale_inv") or name.startswith(f"model.layers.{config.num_hidden_layers}."):
                continue  # a layer past the last one predicts a further token
            if f"{name}_scale_inv" in tensors:
                tensor = from_blocks(tensor, tensors[f"{name}_scale_inv"], config.quantization_config or {})
            if match := re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)\.weight", name):
                experts.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
            else:
                found[name] = tensor
        for name, each in experts.items():
            stacked = np.stack([each[i] for i in range(len(each))])
            if name.endswith("up_proj"):
                gate = experts[name.replace("up_proj", "gate_proj")]
                name = name.replace("up_proj", "gate_up_proj")
                stacked = np.concatenate([np.stack([gate[i] for i in range(len(gate))]), stacked], 1)
            if not name.endswith(".gate_proj"):
                found[name] = stacked
        return found


def from_blocks(weights: np.ndarray, scales: np.ndarray, quantization: Mapping[str, Any]) -> np.ndarray:
    """Weights [out, in], float32, of float8 and a factor [⌈out/m⌉, ⌈in/n⌉] for each block of m × n."""
    m, n = quantization.get("weight_block_size") or (128, 128)
    factors = np.repeat(np.repeat(scales.astype(np.float32), m, 0), n, 1)
    return weights.astype(np.float32) * factors[: weights.shape[0], : weights.shape[1]]
