"""What the decoders of this folder are made of besides attention."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_flash.masks import Mask

from .cache import PagedCache
from .config import Config

ACTIVATIONS = {"silu": nnx.silu, "gelu_pytorch_tanh": nnx.gelu}


def activation(config: Config) -> Callable[[jax.Array], jax.Array]:
    """The function that `hidden_act` names; raises ValueError for another one."""
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {config.hidden_act!r}; the examples have {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config.hidden_act]


def linear(config: Config, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs) -> nnx.Linear:
    """A projection in the model's dtype."""
    dtype = jnp.dtype(config.dtype)
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def weight(config: Config, *shape: int, rngs: nnx.Rngs) -> nnx.Param:
    """A random weight [..., inputs, outputs] of experts."""
    return nnx.Param(
        nnx.initializers.lecun_normal(batch_axis=0)(rngs.params(), shape, jnp.dtype(config.dtype))
    )


def choose(weights: jax.Array, index: jax.Array, experts: int) -> jax.Array:
    """The weights [..., k] of the chosen experts at their `index` among all [..., experts]; other experts have 0."""
    return jnp.einsum("...k,...ke->...e", weights, jax.nn.one_hot(index, experts, dtype=weights.dtype))


class RMSNorm(nnx.Module):
    """x / rms(x) · weight over the last axis, in float32 (Zhang & Sennrich 2019).

    Args:
      config: its `norm_offset` is added to the weight.
      size: features.
      epsilon: added to the mean square, the model's by default.
    """

    def __init__(self, config: Config, size: int, epsilon: float | None = None):
        self.epsilon = config.rms_norm_eps if epsilon is None else epsilon
        self.offset = config.norm_offset
        self.weight = nnx.Param(jnp.full(size, 1 - self.offset, jnp.dtype(config.dtype)))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = normalised(x, self.epsilon)
        return (y * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)


def normalised(x: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) over the last axis, float32."""
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)


class MLP(nnx.Module):
    """down(activation(gate(x)) · up(x)) (Shazeer 2020)."""

    def __init__(self, config: Config, hidden: int | None = None, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, hidden or config.intermediate_size
        self.gate_proj = linear(config, width, hidden, rngs=rngs)
        self.up_proj = linear(config, width, hidden, rngs=rngs)
        self.down_proj = linear(config, hidden, width, rngs=rngs)
        self.activation = activation(config)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Experts(nnx.Module):
    """Gated units of every expert. gate_up_proj stacks the rows of gate above the rows of up."""

    def __init__(self, config: Config, experts: int, hidden: int, *, rngs: nnx.Rngs):
        make, dtype = nnx.initializers.lecun_normal(-1, -2, batch_axis=0), jnp.dtype(config.dtype)
        self.gate_up_proj = nnx.Param(make(rngs.params(), (experts, 2 * hidden, config.hidden_size), dtype))
        self.down_proj = nnx.Param(make(rngs.params(), (experts, config.hidden_size, hidden), dtype))
        self.activation = activation(config)

    def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """x [..., width] and the experts' weights [..., experts] → [..., width]."""
        gate, up = jnp.split(jnp.einsum("...w,ehw->...eh", x, self.gate_up_proj[...]), 2, -1)
        each = jnp.einsum("...eh,ewh->...ew", self.activation(gate) * up, self.down_proj[...])
        return jnp.einsum("...ew,...e->...w", each, weights).astype(x.dtype)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x is [b, s, width], or [t, width] with a cache."""

    def __init__(self, config: Config, attention: nnx.Module, mlp: nnx.Module):
        self.input_layernorm = RMSNorm(config, config.hidden_size)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size)
        self.mlp = mlp

    def __call__(self, x: jax.Array, cache: PagedCache | None = None, mask: Mask | None = None) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))
