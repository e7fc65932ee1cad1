"""One token of each sequence over page pools `[hk, p, ps, d]`, as JAX's Pallas kernels have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._jax import split_alike, with_dim_split, with_dims_merged
from ..checker import Checker
from ..options import Implementation, Number
from ..paged.attention import paged_attention
from ..paged.gather import FLOAT8
from ..paged.validate import check_pool_dtype
from . import arguments, costs

_POOL = "hk p ps d"


@dataclass(frozen=True)
class Pools:
    """The two pools, and for each its scales, `[hk, p, ps]` or `[hk, p, ps, d]`, or None."""

    check: Checker
    arrays: tuple[Array, Array]
    scales: tuple[Array | None, Array | None] = (None, None)

    @classmethod
    def of(cls, check: Checker, k_pages: Any, v_pages: Any) -> Pools:
        k = arguments.ranked(check, "k_pages", k_pages, _POOL)
        v = arguments.ranked(check, "v_pages", v_pages, _POOL)
        check.shape("v_pages", v, k.shape, _POOL.replace(" ", ", "))
        return cls(check, (k, v))

    def attend(
        self,
        q: Any,
        name: str,
        block_tables: Any,
        lengths: Any,
        softcap: Number | None,
        implementation: Implementation | None,
    ) -> Array:
        """Attention of q `[n, hq, d]`, which is not scaled; `name` is that of the tables. Without lengths all tables
        are full. Each KV head's pages are a pool of one head, which is read where it is."""
        check = self.check
        query = arguments.ranked(check, "q", q, "n hq d")
        check.dtype("q", query)
        (n, hq, d), (hk, pages, page_size, _) = query.shape, self.arrays[0].shape
        check.dim("k_pages", "head dim", self.arrays[0].shape[-1], d, "q")
        if hk < 1 or hq % hk:
            raise check.fail(f"k_pages has {hk} heads, which does not divide q's {hq}")
        tables = check.int32(name, block_tables)
        check.rank(name, tables, "n pages")
        check.shape(name, tables, (n, tables.shape[1]), "n, pages")
        full = tables.shape[1] * page_size
        ends = (
            jnp.full((n,), full, jnp.int32) if lengths is None else check.lengths("lengths", lengths, n, "n")
        )
        (k, v), scales = self._readable()
        if any(x is not None for x in scales):
            token = jnp.arange(page_size, dtype=jnp.int32)[None, None]
            inside = (tables >= 0) & (tables < pages)
            of_tokens = jnp.where(inside[..., None], tables[..., None] * jnp.int32(page_size) + token, -1)
            tables, page_size = of_tokens.reshape(n, full), 1
        used = query if k is self.arrays[0] else query.astype(jnp.float32)
        for pool, x in (("k_pages", k), ("v_pages", v)):
            check_pool_dtype(check, pool, x, "q", used)

        def of_head(query: Array, k: Array, v: Array, scales: list[Array | None]) -> Array:
            """query [n, hq / hk, d], k and v [p, ps, d], scales [p, ps] → [n, hq / hk, d]"""
            k, v = (x.reshape(-1, page_size, 1, d) for x in (k, v))
            k_scale, v_scale = (None if x is None else x.reshape(-1, 1) for x in scales)
            out: Array = paged_attention(
                query[:, None],
                k,
                v,
                tables,
                ends,
                k_scale=k_scale,
                v_scale=v_scale,
                scale=1.0,
                softcap=softcap,
                implementation=implementation,
            )
            return out[:, 0]

        heads = split_alike(with_dim_split(used, 1, (hk, hq // hk)), 1, k)
        v, scales = jax.tree.map(lambda x: split_alike(x, 0, k), (v, scales))
        out = jax.vmap(of_head, in_axes=(1, 0, 0, 0), out_axes=1)(heads, k, v, scales)
        return with_dims_merged(out, 1, 2).astype(query.dtype)

    def _readable(self) -> tuple[tuple[Array, Array], list[Array | None]]:
        """Pools that kernels read, and their scales by token. Where scales belong to other pools than float8 ones, or
        to elements, both pools become float32, with a warning: keys rounded to 16 bits once more move scores, which are
        sums over unscaled queries, by several times what JAX's kernels are off."""
        k, v = self.arrays
        scaled = [x for x in self.scales if x is not None]
        if not scaled or (k.dtype == v.dtype and k.dtype in FLOAT8 and all(x.ndim == 3 for x in scaled)):
            return (k, v), list(self.scales)
        costs.warn(
            self.check,
            f"k_pages is {k.dtype} and v_pages {v.dtype}, so that every call stores both as float32, "
            f"{costs.size((2, *k.shape), jnp.float32)}",
            "float8 pools, both of one dtype, are read as they are with a scale for each token",
        )
        k, v = (_dequantised(x, scale) for x, scale in zip(self.arrays, self.scales))
        return (k, v), [None, None]


def _dequantised(pool: Array, scale: Array | None) -> Array:
    whole = pool.astype(jnp.float32)
    return whole if scale is None else whole * (scale[..., None] if scale.ndim == 3 else scale)
