"""A small pre-norm transformer in Flax NNX whose attention is `jax_flash.flash_attention_varlen`.

Weights that belong to attention heads or to the MLP's hidden units carry sharding annotations: with a mesh they are
split over its axis "heads", and XLA partitions everything else accordingly. Where tokens are split over its axis
"sequence", attention is `jax_flash.ring_attention`; all else works token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from text import VOCABULARY

from jax_flash import flash_attention_varlen, ring_attention, zigzag_positions

# Under remat, the residuals of attention are saved: they are small and expensive to recompute.
KEEP_ATTENTION = jax.checkpoint_policies.save_only_these_names("flash_out", "flash_lse")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a `Transformer`; `attention` is the `implementation` of `flash_attention_varlen`.

    With more than one of `sequence_devices`, tokens and positions come sharded over the axis "sequence" of the mesh in
    use (`jax.set_mesh`), in zigzag order unless `sequence_mode` is "all_to_all".
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    head_dim: int = 64
    hidden: int = 1024
    dtype: str = "float32"
    remat: bool = False
    attention: str | None = None
    sequence_devices: int = 1
    sequence_mode: str = "ring"

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number")


def sharded(init: nnx.Initializer, *axes: str | None) -> nnx.Initializer:
    """`init` for a weight whose dimensions are split over these mesh axes."""
    return nnx.with_partitioning(init, axes)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) of x [..., t, h, d] at positions [..., t]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    x1, x2 = x[..., :half], x[..., half:]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention within each packed document."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.width**-0.5)
        init_out = nnx.initializers.normal((2 * config.layers * config.heads * config.head_dim) ** -0.5)
        heads = (config.heads, config.head_dim)
        self.qkv = nnx.LinearGeneral(
            config.width,
            (3, *heads),
            use_bias=False,
            dtype=config.dtype,
            kernel_init=sharded(init, None, None, "heads", None),
            rngs=rngs,
        )
        self.out = nnx.LinearGeneral(
            heads,
            config.width,
            axis=(-2, -1),
            use_bias=False,
            dtype=config.dtype,
            kernel_init=sharded(init_out, "heads", None, None),
            rngs=rngs,
        )
        self.config = config

    def __call__(self, x: jax.Array, positions: jax.Array, cu_seqlens: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(x), -3, 0)  # each [r, t, h, d]
        q, k = rotate(q, positions), rotate(k, positions)
        attend = self.packed if self.config.sequence_devices == 1 else self.ring
        return self.out(attend(q, k, v, cu_seqlens))

    def packed(self, q: jax.Array, k: jax.Array, v: jax.Array, cu_seqlens: jax.Array) -> jax.Array:
        """A row of packed documents is one varlen call."""

        def attend(*row: jax.Array) -> jax.Array:
            return flash_attention_varlen(*row, causal=True, implementation=self.config.attention)

        return jax.vmap(attend)(q, k, v, cu_seqlens)

    def ring(self, q: jax.Array, k: jax.Array, v: jax.Array, cu_seqlens: jax.Array) -> jax.Array:
        """Each device has two chunks of each row in zigzag order, else one; segment ids separate documents.

        Rows of one document need no ids: the causal mask hides the padding after it.
        """
        mode, implementation = self.config.sequence_mode, self.config.attention
        order = "zigzag" if mode == "ring" else "contiguous"
        options = dict(
            axis_name="sequence", mode=mode, order=order, causal=True, implementation=implementation
        )
        shard = PartitionSpec(None, "sequence")
        operands = (q, k, v)
        if cu_seqlens.shape[1] > 2:
            count = q.shape[1]
            zigzag = mode == "ring"
            tokens = zigzag_positions(count, self.config.sequence_devices) if zigzag else jnp.arange(count)
            operands += ((cu_seqlens[:, 1:, None] <= tokens).sum(1, dtype=jnp.int32),)  # [r, t]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None = None) -> jax.Array:
            return ring_attention(q, k, v, segment_ids=documents, **options)

        mapped = jax.shard_map(
            attend, in_specs=(shard,) * len(operands), out_specs=shard, axis_names={"sequence"}
        )
        return mapped(*operands)


class MLP(nnx.Module):
    """Two linear layers with a squared ReLU between them (So et al. 2021), which is as good as a GELU and cheaper."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.width**-0.5)
        init_down = nnx.initializers.normal((2 * config.layers * config.hidden) ** -0.5)
        self.up = nnx.Linear(
            config.width,
            config.hidden,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=sharded(init, None, "heads"),
            rngs=rngs,
        )
        self.down = nnx.Linear(
            config.hidden,
            config.width,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=sharded(init_down, "heads", None),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.square(nnx.relu(self.up(x))))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, cu_seqlens: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), positions, cu_seqlens)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nnx.Module):
    """A byte-level causal language model: packed tokens [r, t] → float32 logits [r, t, 256]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(
            VOCABULARY, config.width, dtype=config.dtype, embedding_init=sharded(init, None, None), rngs=rngs
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(
            config.width,
            256,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=sharded(nnx.initializers.normal(config.width**-0.5), None, None),
            rngs=rngs,
        )
        self.config = config

    def __call__(self, tokens: jax.Array, positions: jax.Array, cu_seqlens: jax.Array) -> jax.Array:
        run = nnx.remat(Block.__call__, policy=KEEP_ATTENTION) if self.config.remat else Block.__call__
        x = self.embed(tokens)
        for block in self.blocks:
            x = run(block, x, positions, cu_seqlens)
        return self.head(self.norm(x)).astype(jnp.float32)
