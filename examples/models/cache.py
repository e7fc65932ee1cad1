"""The paged cache that every model of this folder serves from, and one step's view of it.

Layers whose keys and values have one shape share a flat pool of keys and one of values: the l-th of them has the pages
from l · pages on, so its block tables are those of the first one plus l · pages (docs/serving.md, "Many layers").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from scheduler import Batch

from jax_flash import append_kv


class KVShape(NamedTuple):
    """What a layer keeps of each token; without `value_dim`, values are the first columns of the keys."""

    heads: int
    key_dim: int
    value_dim: int | None


class Pool(NamedTuple):
    """The pages of all layers of one shape."""

    k_pages: jax.Array  # [layers · pages, page_size, heads, key_dim]
    v_pages: jax.Array | None  # [layers · pages, page_size, heads, value_dim]


def make_pools(
    shapes: Sequence[KVShape | None],
    pages: int,
    page_size: int,
    dtype: str,
    device: jax.sharding.Sharding | None = None,
) -> list[Pool]:
    """Empty pools for layers of these shapes, one for each distinct shape, each layer with this number of pages."""

    def zeros(layers: int, heads: int, dim: int) -> jax.Array:
        return jnp.zeros((layers * pages, page_size, heads, dim), dtype, device=device)

    return [
        Pool(
            zeros(layers, shape.heads, shape.key_dim),
            None if shape.value_dim is None else zeros(layers, shape.heads, shape.value_dim),
        )
        for shape, layers in Counter(shape for shape in shapes if shape is not None).items()
    ]


class PagedCache:
    """A step's tokens and the pools that its layers append to, one layer after another.

    Make one inside the jitted step from the pools that are donated to it; afterwards `pools` holds the new ones.

    Args:
      shapes: of the model's layers.
      pools: by `make_pools`.
      batch: `t` packed tokens of `s` requests, as `scheduler.Batch` has them.
    """

    def __init__(self, shapes: Sequence[KVShape | None], pools: Sequence[Pool], batch: Batch):
        self.shapes, self.pools, self.batch = shapes, list(pools), batch
        self.kinds = list(dict.fromkeys(shape for shape in shapes if shape is not None))  # of the pools
        self.lengths: jax.Array | None = None  # of the requests with the step's tokens, once a layer has them

    @property
    def positions(self) -> jax.Array:
        """The place of each token in its request, [t]."""
        return self.batch.positions

    @property
    def cu_seqlens(self) -> jax.Array:
        """Where each request's tokens start, and their end, [s + 1]."""
        return self.batch.cu_seqlens

    def append(
        self, layer: int, k: jax.Array, v: jax.Array | None, implementation: str | None = None
    ) -> None:
        """Writes a layer's new keys and values [t, heads, dim] behind those that it has."""
        kind, tables = self._place(layer)
        k_pages, v_pages, self.lengths = append_kv(
            *self.pools[kind],
            k,
            v,
            tables,
            self.batch.cached,
            cu_seqlens=self.cu_seqlens,
            implementation=implementation,
        )
        self.pools[kind] = Pool(k_pages, v_pages)

    def read(self, layer: int) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
        """What `paged_attention` reads of a layer that has been appended to: pools, block tables and lengths."""
        kind, tables = self._place(layer)
        return *self.pools[kind], tables, self.lengths

    def _place(self, layer: int) -> tuple[int, jax.Array]:
        """Which pool a layer has, and its block tables there."""
        shape = self.shapes[layer]
        kind = self.kinds.index(shape)
        pages = self.pools[kind].k_pages.shape[0] // self.shapes.count(shape)
        return kind, self.batch.block_tables + self.shapes[:layer].count(shape) * pages

    def ends(self, spans: jax.Array) -> jax.Array:
        """Up to which place of its request each token sees, exclusive: its own, or the end of its span of ids ≥ 0.

        A span at the end of a request may run on into the next one's tokens: no keys are there.
        """
        rows = jnp.arange(1, spans.shape[0] + 1, dtype=jnp.int32)
        last = jnp.append(spans[1:] != spans[:-1], True)  # whether a token is its span's last, [t]
        end = jax.lax.cummin(jnp.where(last, rows, rows[-1]), reverse=True)  # the row after the span's last
        return self.positions + jnp.where(spans >= 0, end - rows, 0) + 1
