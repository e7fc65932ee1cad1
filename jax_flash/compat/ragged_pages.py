"""The pages of serving engines as this library's: caches that hold K and V together, and the sequences in them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._jax import explicit_parts, in_automatic_axes, is_symbolic, reshaped
from ..checker import Checker
from ..options import Implementation
from ..paged.append import append_kv

Layout = Literal["interleaved", "concatenated"]
LAYOUTS = ("interleaved", "concatenated")


@dataclass(frozen=True)
class Pool:
    """A cache `[p, ps, …]`. Its rows are `pairs` of K and V, of `width` columns each; `used` of the pairs hold keys.

    Packing may add pairs. With V after each K, a pair is a head of a pool that keys and values share.
    """

    name: str
    cache: jax.Array
    pairs: int
    width: int
    used: int

    @classmethod
    def of(cls, check: Checker, name: str, cache: Any, layout: str, used: int | None) -> Pool:
        check.one_of("layout", layout, LAYOUTS)
        x = check.array(name, cache)
        if x.ndim not in (4, 5):
            raise check.fail(
                f"{name} must have rank 4 [p ps heads d] or 5 [p ps heads/packing packing d], got shape {x.shape}"
            )
        heads, columns = math.prod(x.shape[2:-1]), x.shape[-1]
        if layout == "interleaved" and heads % 2:
            raise check.fail(f"{name} must have heads K0 V0 K1 V1 …, got {heads} of them")
        if layout == "concatenated" and columns % 2:
            raise check.fail(f"{name} must have K and V side by side, got {columns} columns")
        pairs, width = (heads // 2, columns) if layout == "interleaved" else (heads, columns // 2)
        if used is not None and used > pairs:
            raise check.fail(f"{name} has room for {pairs} heads, keys has {used}")
        pool = cls(name, x, pairs, width, pairs if used is None else used)
        parts = explicit_parts(x)[2:]
        if pool.shape != x.shape and (pool.heads % parts[0] or any(n > 1 for n in parts[1:])):
            raise check.fail(
                f"{name} is {jax.typeof(x)}, but explicit mesh axes may not split K from V or the head dim: with this "
                f"layout only the third dimension may have parts, whose number divides {pool.heads}; reshard {name}"
            )
        return pool

    @property
    def dtype(self) -> Any:
        return self.cache.dtype

    @property
    def page_size(self) -> int:
        return self.cache.shape[1]

    @property
    def heads(self) -> int:
        """The number of KV heads of `shared`: one, with all columns of a row, if only one pair is used."""
        return 1 if self.used == 1 else self.pairs

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of `shared`."""
        columns = math.prod(self.cache.shape[2:]) // self.heads
        return (*self.cache.shape[:2], self.heads, columns)

    def shared(self) -> jax.Array:
        """The pool `[p, ps, heads, …]`: K in the first columns, V from column `width` on."""
        return reshaped(self.cache, self.shape, 3)

    def append(
        self, batch: Batch, new: tuple[jax.Array, jax.Array], implementation: Implementation | None
    ) -> Pool:
        """The pool with new rows at the end of each sequence. A reshape right before an operation in place makes XLA
        copy the cache: hence the rows are reshaped to the cache's shape, and a barrier separates the operation from a
        caller's reshape, such as sglang-jax's. (XLA of JAX 0.10 copies behind a barrier too.)"""
        tokens, heads, d = new[0].shape
        missing = self.pairs - heads, self.width - d

        def rows(new: tuple[jax.Array, jax.Array]) -> jax.Array:
            padded = jnp.pad(jnp.stack(new, 2), ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
            columns = math.prod(padded.shape[1:]) // self.cache.shape[2]
            return padded.astype(self.dtype).reshape(tokens, self.cache.shape[2], columns)

        of_cache = jax.typeof(self.cache).sharding
        by_head = of_cache.update(spec=PartitionSpec(None, of_cache.spec[2], None))
        cache, _, _ = append_kv(
            jax.lax.optimization_barrier(self.cache),
            None,
            in_automatic_axes(rows, new, by_head),
            None,
            batch.tables,
            batch.lengths - jnp.diff(batch.offsets),
            cu_seqlens=batch.offsets,
            implementation=implementation,
        )
        return replace(self, cache=cache)


@dataclass(frozen=True)
class Batch:
    """The sequences: `tables [n, pages]`, `lengths [n]` (0 for unused sequences), and the offsets of their queries."""

    tables: jax.Array
    lengths: jax.Array
    offsets: jax.Array

    @classmethod
    def of(
        cls,
        check: Checker,
        kv_lens: Any,
        page_indices: Any,
        cu_q_lens: Any,
        counts: Any,
        name: str,
        cu_kv_lens: Any,
        pool: Pool,
    ) -> Batch:
        lengths = check.int32("kv_lens", kv_lens)
        check.rank("kv_lens", lengths, "n")
        n = lengths.shape[0]
        offsets = check.int32("cu_q_lens", cu_q_lens)
        check.shape("cu_q_lens", offsets, (n + 1,), "n+1")
        count = jnp.ravel(check.int32(name, counts))[-1:]
        if not count.size:
            raise check.fail(f"{name} must hold the number of sequences, got an empty array")
        number = jnp.arange(n + 1, dtype=jnp.int32)
        last = offsets.at[jnp.clip(count, 0, n)].get()
        return cls(
            _tables(check, page_indices, n, cu_kv_lens, pool),
            jnp.where(number[:n] < count, lengths, 0),
            jnp.where(number <= count, offsets, last),
        )


def _tables(check: Checker, page_indices: Any, n: int, cu_kv_lens: Any, pool: Pool) -> jax.Array:
    indices = check.int32("page_indices", page_indices)
    if cu_kv_lens is None:
        flat = indices.ndim == 1 and n > 0 and indices.shape[0] % n == 0
        if not flat and (indices.ndim != 2 or indices.shape[0] != n):
            raise check.fail(
                f"page_indices must have shape [n, pages] or [n · pages] with n = {n}, got {indices.shape}"
            )
        return indices.reshape(n, -1) if flat else indices
    if indices.ndim != 1:
        raise check.fail(f"page_indices must have rank 1 with cu_kv_lens, got shape {indices.shape}")
    starts = check.int32("cu_kv_lens", cu_kv_lens)
    check.shape("cu_kv_lens", starts, (n + 1,), "n+1")
    first = -(-starts[:n] // pool.page_size)
    entries, pages = indices.shape[0], pool.cache.shape[0]
    # A sequence has no page twice, and all sequences together may have many more than the pool.
    most = entries if is_symbolic(entries) or is_symbolic(pages) else min(entries, max(pages, 1))
    entry = first[:, None] + jnp.arange(most, dtype=jnp.int32)
    return indices.at[entry].get(mode="clip")
