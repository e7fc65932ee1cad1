"""Serving a model from a paged cache: one jitted step for prompts and for decoding.

The step takes the packed tokens of many requests, writes their keys and values into the cache's pages, attends,
and samples one token for each request. The cache is donated to the step, which writes its pages in place.

All layers share one pool for keys and one for values: layer l of a model has the pages from l · pages on, so that its
block tables are those of the first layer plus l · pages. A pool of this kind can also be the carry of a scan over
layers. Pools with a dimension for layers, which a scan takes and returns layer by layer, would be copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from model import ModelConfig, Transformer
from scheduler import Batch, Chunk, Request, Scheduler, ServingConfig

from jax_flash import append_kv, apply_rotary, paged_attention

Cache = Any  # a pytree of pools
Forward = Callable[[Any, Cache, Batch], tuple[jax.Array, Cache]]
Pools = tuple[jax.Array, jax.Array]  # keys and values of all layers, each [layers · pages, page_size, h, d]


@dataclass
class Usage:
    """Counts and times of serving so far."""

    steps: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0  # computed ones; those of requests that started over count again
    new_tokens: int = 0
    peak_pages: int = 0
    peak_shared: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of all steps, those that compute prompts included."""
        return self.new_tokens / max(self.seconds, 1e-9)


def rotary_tables(head_dim: int, length: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of the angles of `model.rotate`, each [length, head_dim / 2]."""
    half = head_dim // 2
    angles = jnp.arange(length)[:, None] * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.cos(angles), jnp.sin(angles)


def next_logits(model: Transformer, cache: Pools, batch: Batch, max_length: int) -> tuple[jax.Array, Pools]:
    """Runs train_lm.py's model on new tokens; the keys and values of earlier ones are in the cache.

    Returns logits [s, 256] for the token after each request's last one, and the cache with the new keys and values.
    """
    k_pages, v_pages = cache
    rotary = rotary_tables(k_pages.shape[-1], max_length)
    pages, implementation = k_pages.shape[0] // len(model.blocks), model.config.attention
    x = model.embed(batch.tokens)
    for layer, block in enumerate(model.blocks):
        tables = batch.block_tables + layer * pages  # unused entries name a page, too, but are never read
        q, k, v = jnp.moveaxis(block.attention.qkv(block.attention_norm(x)), -3, 0)  # each [t, h, d]
        k_pages, v_pages, lengths = append_kv(
            k_pages,
            v_pages,
            k,
            v,
            tables,
            batch.cached,
            cu_seqlens=batch.cu_seqlens,
            rotary=rotary,
            implementation=implementation,
        )
        out = paged_attention(
            apply_rotary(q, batch.positions, *rotary),
            k_pages,
            v_pages,
            tables,
            lengths,
            cu_seqlens_q=batch.cu_seqlens,
            causal=True,
            implementation=implementation,
        )
        x = x + block.attention.out(out)
        x = x + block.mlp(block.mlp_norm(x))
    last = x[batch.cu_seqlens[1:] - 1]
    return model.head(model.norm(last)).astype(jnp.float32), (k_pages, v_pages)


def sample(logits: jax.Array, temperature: float, seed: int, batch: Batch) -> jax.Array:
    """Samples a token for each request, [s]; the random bits depend only on the request's number and the position."""
    if not temperature:
        return jnp.argmax(logits, axis=-1)

    def draw(logits: jax.Array, number: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), position)
        return jax.random.categorical(key, logits / temperature)

    return jax.vmap(draw)(logits, batch.numbers, batch.cached + jnp.diff(batch.cu_seqlens))


class Server:
    """Serves requests: `submit` some, then call `step` while there is something to do (`scheduler.busy`).

    Args:
      model: its weights are placed on the mesh as they are to be used.
      forward: `forward(model, cache, batch)` is (logits of the next token of each request, the cache with the new
        keys and values).
      make_cache: makes the cache in a sharding, which splits its heads.
      serving: the cache's sizes and the sampling.
      mesh: its axis "heads" splits the heads, those of the cache included.
    """

    def __init__(
        self,
        model: nnx.Module,
        forward: Forward,
        make_cache: Callable[[NamedSharding], Cache],
        serving: ServingConfig,
        mesh: Mesh,
    ):
        self.scheduler = Scheduler(serving)
        self.serving, self.mesh, self.usage = serving, mesh, Usage()
        self.graph, self.weights = nnx.split(model)
        by_heads = NamedSharding(mesh, PartitionSpec(None, None, "heads"))
        self.cache = make_cache(by_heads)
        self._everywhere = NamedSharding(mesh, PartitionSpec())

        def step(weights: nnx.State, cache: Cache, batch: Batch) -> tuple[jax.Array, jax.Array, Cache]:
            logits, cache = forward(nnx.merge(self.graph, weights), cache, batch)
            return sample(logits, serving.temperature, serving.seed, batch), logits, cache

        shardings = (self._everywhere, self._everywhere, jax.tree.map(lambda _: by_heads, self.cache))
        self._step = jax.jit(step, donate_argnames="cache", out_shardings=shardings)
        # Two widths, so that a step in which every request decodes is not padded to the size of a prompt chunk.
        self.programs = {width: self._compile(width) for width in {serving.slots, serving.chunk}}

    def submit(self, request: Request) -> None:
        """Queues a request; raises ValueError if it could never be served."""
        self.scheduler.submit(request)

    def step(self) -> list[Request]:
        """Runs one step; returns the requests that have a new token, at the end of their `tokens`."""
        started = time.monotonic()
        chunks = self.scheduler.plan()
        width = self._width(sum(chunk.count for chunk in chunks))
        batch = self._place(self.scheduler.batch(chunks, width))
        sampled, logits, self.cache = self.programs[width](self.weights, self.cache, batch)
        tokens, rows = jax.device_get((sampled, logits))
        self._account(chunks)
        for chunk, row in zip(chunks, rows):
            if chunk.samples:
                chunk.request.logits.append(row)
        advanced = self.scheduler.commit(chunks, tokens)
        self.usage.new_tokens += len(advanced)
        self.usage.seconds += time.monotonic() - started
        return advanced

    def pages(self) -> str:
        """The use of the cache's pages, in words."""
        allocator = self.scheduler.allocator
        return f"{allocator.in_use} pages in use, {allocator.shared} of them shared, {allocator.free} free"

    def _compile(self, width: int) -> jax.stages.Compiled:
        batch = self._place(self.scheduler.batch([], width))
        return self._step.lower(self.weights, self.cache, batch).compile()

    def _width(self, tokens: int) -> int:
        return self.serving.slots if tokens <= self.serving.slots else self.serving.chunk

    def _place(self, batch: Batch) -> Batch:
        return jax.device_put(batch, self._everywhere)

    def _account(self, chunks: list[Chunk]) -> None:
        usage, allocator = self.usage, self.scheduler.allocator
        usage.steps += 1
        usage.prompt_tokens += sum(
            min(chunk.count, max(0, len(chunk.request.prompt) - chunk.request.cached)) for chunk in chunks
        )
        usage.peak_pages = max(usage.peak_pages, allocator.in_use)
        usage.peak_shared = max(usage.peak_shared, allocator.shared)


def serve_transformer(model: Transformer, config: ModelConfig, serving: ServingConfig, mesh: Mesh) -> Server:
    """A server of train_lm.py's model, whose weights are placed on the mesh as they are annotated."""

    def forward(model: Transformer, cache: Pools, batch: Batch) -> tuple[jax.Array, Pools]:
        return next_logits(model, cache, batch, serving.max_length)

    def make_cache(by_heads: NamedSharding) -> Pools:
        shape = (config.layers * serving.pages, serving.page_size, config.heads, config.head_dim)
        keys, values = (jnp.zeros(shape, config.dtype, device=by_heads) for _ in "kv")
        return keys, values

    return Server(model, forward, make_cache, serving, mesh)
